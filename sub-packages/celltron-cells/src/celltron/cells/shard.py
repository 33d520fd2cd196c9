"""One shard of a store: three arrays mapped from disk."""

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from celltron.cells.compiled import compiled
from celltron.core import InputError


class ShardArrays(NamedTuple):
    """What kernels take of a shard."""

    indptr: npt.NDArray[np.uint64]
    indices: npt.NDArray[Any]
    counts: npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Whole cells in compressed rows: ``indptr`` uint64 [C+1], ``indices`` and ``counts`` [N]; read-only."""

    folder: Path
    indptr: npt.NDArray[np.uint64]
    indices: npt.NDArray[Any]
    counts: npt.NDArray[Any]


def open_shard(store: Path, i: int, entry: dict[str, Any], dtypes: dict[str, str]) -> Shard:
    """Map the arrays of shard ``i``; ``entry`` is its line of the manifest."""
    folder = store / "shards" / f"{i:05d}"
    return Shard(
        folder=folder,
        indptr=_map(folder / "indptr.bin", dtypes["indptr"], entry["cells"] + 1),
        indices=_map(folder / "indices.bin", dtypes["indices"], entry["nnz"]),
        counts=_map(folder / "counts.bin", dtypes["counts"], entry["nnz"]),
    )


def _map(path: Path, dtype: str, length: int) -> npt.NDArray[Any]:
    little = np.dtype(dtype).newbyteorder("<")
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            # Cut or grown since the store was opened? Reading beyond its end would end in a bus error.
            if size != length * little.itemsize:
                raise InputError(f"{path} has {size} bytes, wanted {length * little.itemsize}; copy the store again")
            if size == 0:
                return np.zeros(0, dtype=dtype)
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=little)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: copy the store again") from error


@compiled
def _first_bad_row(
    indptr: npt.NDArray[np.uint64], indices: npt.NDArray[np.uint16], counts: npt.NDArray[np.uint8], num_genes: int
) -> int:
    for row in range(indptr.shape[0] - 1):
        last = np.int64(-1)
        for place in range(indptr[row], indptr[row + 1]):
            gene = np.int64(indices[place])
            if gene <= last or gene >= num_genes or not counts[place] > 0:
                return row
            last = gene
    return -1


def check_shard(shard: Shard, num_genes: int) -> None:
    """Check that rows follow each other, that gene indices rise and stay below G, and that counts are above zero."""
    ends = shard.indptr
    if ends[0] != 0 or ends[-1] != len(shard.indices) or np.any(ends[1:] < ends[:-1]):
        raise InputError(
            f"{shard.folder / 'indptr.bin'} is damaged: its rows do not follow each other; convert the files again"
        )
    row = _first_bad_row(shard.indptr, shard.indices, shard.counts, num_genes)
    if row >= 0:
        raise InputError(
            f"{shard.folder} is damaged: the genes of its cell {row} do not rise below {num_genes} with counts above "
            "zero; convert the files again"
        )
