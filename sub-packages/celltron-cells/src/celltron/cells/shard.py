"""One shard of a store: four arrays mapped from disk, and where the counts of some of its cells lie.

C cells of the shard, N their non-zero counts, K cells asked for.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from celltron.core import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Whole cells in compressed rows: ``indptr`` uint64 [C+1], ``indices`` and ``counts`` [N]; read-only.

    ``totals`` float64 [C] are the sums of the cells' counts in their source; None in stores of version 1, where only
    obs has them.
    """

    folder: Path
    indptr: npt.NDArray[np.uint64]
    indices: npt.NDArray[Any]
    counts: npt.NDArray[Any]
    totals: npt.NDArray[np.float64] | None

    @property
    def types(self) -> tuple[str, str]:
        """The names of the types of ``indices`` and ``counts``."""
        return self.indices.dtype.name, self.counts.dtype.name


def open_shard(store: Path, i: int, entry: dict[str, Any], *, has_totals: bool) -> Shard:
    """Map the arrays of shard ``i``; ``entry`` is its line of the manifest."""
    folder = shard_folder(store, i)
    cells, nnz = entry["cells"], entry["nnz"]
    return Shard(
        folder=folder,
        indptr=map_file(folder / "indptr.bin", "uint64", cells + 1),
        indices=map_file(folder / "indices.bin", entry["indices"], nnz),
        counts=map_file(folder / "counts.bin", entry["counts"], nnz),
        totals=map_file(folder / "totals.bin", "float64", cells) if has_totals else None,
    )


def shard_folder(store: Path, i: int) -> Path:
    """Where the files of shard ``i`` are."""
    return store / "shards" / f"{i:05d}"


def map_file(path: Path, dtype: str, length: int) -> npt.NDArray[Any]:
    """Map a file of ``length`` little-endian values, read-only; one of another length is an InputError."""
    little = np.dtype(dtype).newbyteorder("<")
    try:
        # The memory stays mapped when the file is closed: a thousand stores need more files than a process may hold.
        with pa.memory_map(str(path)) as file:
            size = file.size()
            # Cut or grown since the store was opened? Reading beyond its end would end in a bus error.
            if size != length * little.itemsize:
                raise InputError(f"{path} has {size} bytes, wanted {length * little.itemsize}; copy the store again")
            return np.frombuffer(file.read_buffer(), dtype=little) if size else np.zeros(0, dtype=dtype)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: copy the store again") from error
