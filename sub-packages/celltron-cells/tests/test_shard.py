from pathlib import Path

import numpy as np
import pytest

from celltron.cells import CellStore
from celltron.cells.shard import open_shard
from celltron.core import InputError


def test_arrays_are_mapped_read_only(store: CellStore) -> None:
    opened = open_shard(store.path, 0, store.manifest["shards"][0], has_totals=True)
    assert len(opened.indptr) == store.manifest["shards"][0]["cells"] + 1
    assert opened.types == ("uint16", store.manifest["shards"][0]["counts"])
    for array in (opened.indptr, opened.indices, opened.counts, opened.totals):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_a_file_cut_after_opening_is_refused(fresh_store: Path) -> None:
    entry = CellStore.open(fresh_store).manifest["shards"][0]
    path = fresh_store / "shards/00000/indices.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(InputError, match=r"indices\.bin has .* bytes, wanted"):
        open_shard(fresh_store, 0, entry, has_totals=True)
    path.unlink()
    with pytest.raises(InputError, match=r"indices\.bin is missing"):
        open_shard(fresh_store, 0, entry, has_totals=True)


def test_no_file_stays_open(store: CellStore) -> None:
    """A mapped file that counted as open would end a store of some hundred shards."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    again = CellStore.open(store.path)
    kept = [again.shard(i) for i in range(again.num_shards)]
    assert kept and len(list(Path("/proc/self/fd").iterdir())) == before
    assert np.array_equal(kept[0].indptr, again.shard(0).indptr)
