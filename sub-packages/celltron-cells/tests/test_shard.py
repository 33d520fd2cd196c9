from pathlib import Path

import numpy as np
import pytest

from celltron.cells.shard import Shard, check_shard, open_shard
from celltron.core import InputError

DTYPES = {"indptr": "uint64", "indices": "uint16", "counts": "uint8"}


def shard(indptr: list[int], indices: list[int], counts: list[int]) -> Shard:
    return Shard(
        folder=Path("shard"),
        indptr=np.array(indptr, np.uint64),
        indices=np.array(indices, np.uint16),
        counts=np.array(counts, np.uint8),
    )


def test_a_good_shard_passes() -> None:
    check_shard(shard([0, 2, 2, 3], [0, 4, 1], [1, 2, 3]), 5)


@pytest.mark.parametrize(
    ("indptr", "indices", "counts", "pattern"),
    [
        ([0, 2, 1], [0, 1], [1, 1], "rows do not follow"),
        ([1, 2], [0, 1], [1, 1], "rows do not follow"),
        ([0, 1], [0, 1], [1, 1], "rows do not follow"),
        ([0, 1, 3], [0, 2, 2], [1, 1, 1], "genes of its cell 1 do not rise"),
        ([0, 2], [0, 5], [1, 1], "genes of its cell 0 do not rise below 5"),
        ([0, 2], [0, 1], [1, 0], "counts above zero"),
    ],
)
def test_a_bad_one_does_not(indptr: list[int], indices: list[int], counts: list[int], pattern: str) -> None:
    with pytest.raises(InputError, match=pattern):
        check_shard(shard(indptr, indices, counts), 5)


def test_arrays_are_mapped_read_only(fresh_store: Path) -> None:
    opened = open_shard(fresh_store, 0, {"cells": 12, "nnz": _nnz(fresh_store)}, DTYPES | {"counts": "uint32"})
    assert len(opened.indptr) == 13
    with pytest.raises(ValueError, match="read-only"):
        opened.counts[0] = 1


def _nnz(store: Path) -> int:
    return int(np.fromfile(store / "shards/00000/indptr.bin", "<u8")[-1])


def test_a_file_cut_after_opening_is_refused(fresh_store: Path) -> None:
    path = fresh_store / "shards/00000/indices.bin"
    entry = {"cells": 12, "nnz": _nnz(fresh_store)}
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(InputError, match="indices.bin has .* bytes, wanted"):
        open_shard(fresh_store, 0, entry, DTYPES | {"counts": "uint32"})
    path.unlink()
    with pytest.raises(InputError, match="indices.bin is missing"):
        open_shard(fresh_store, 0, entry, DTYPES | {"counts": "uint32"})
