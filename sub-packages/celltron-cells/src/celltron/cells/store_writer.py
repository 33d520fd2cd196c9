"""Rows of counts written as shards of whole cells, each array appended as it comes."""

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from celltron.cells.map_rows import MappedRows, index_dtype

COUNT_DTYPES = ("uint8", "uint16", "uint32", "uint64")
COPY_VALUES = 2**22


def count_dtype(largest: float, *, is_whole: bool) -> str:
    """The smallest unsigned type that holds whole numbers up to ``largest``; float32 where they are not whole."""
    if not is_whole:
        return "float32"
    return next(name for name in COUNT_DTYPES if largest <= np.iinfo(name).max)


def wider_dtype(first: str, second: str) -> str:
    """The smaller of the types that hold what both hold; whole counts among fractions become float32."""
    order = (*COUNT_DTYPES, "float32")
    return max(first, second, key=order.index)


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Give the file's name to write errors that come without one (a full disk does)."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _append(path: Path, array: npt.NDArray[Any], dtype: str) -> None:
    with _named_errors(path), path.open("ab") as file:
        file.write(np.ascontiguousarray(array, dtype=np.dtype(dtype).newbyteorder("<")).data)


def write_table(table: pa.Table, path: Path) -> None:
    """Write a parquet file; arrow's write errors are OSErrors that name the file."""
    with _named_errors(path):
        try:
            pq.write_table(table, path, compression="zstd")
        except pa.ArrowException as error:
            raise OSError(errno.EIO, str(error), str(path)) from error


class StoreWriter:
    """Fills the shards of a store; ``finish`` returns what the manifest must say about them."""

    def __init__(self, folder: Path, *, num_genes: int, shard_cells: int) -> None:
        self.folder = folder
        self.num_cells = 0
        self.nnz = 0
        self.shards: list[dict[str, Any]] = []
        self._shard_cells = shard_cells
        self._index_dtype = index_dtype(num_genes)
        self._indptr: list[npt.NDArray[np.int64]] = []
        self._obs: list[pa.Table] = []

    def append(self, rows: MappedRows, obs: pa.Table) -> None:
        """Add rows with their table of cells, cut where a shard is full."""
        start = 0
        while start < len(rows.totals):
            if not self._indptr:
                self._begin_shard()
            room = self._shard_cells - self.shards[-1]["cells"]
            stop = min(start + room, len(rows.totals))
            self._append_part(rows, start, stop)
            self._obs.append(obs.slice(start, stop - start))
            if self.shards[-1]["cells"] == self._shard_cells:
                self._end_shard()
            start = stop

    def finish(self, *, meta: dict[str, Any]) -> dict[str, Any]:
        """Close the last shard and bring all shards to one count type."""
        if self._indptr:
            self._end_shard()
        dtype = COUNT_DTYPES[0]
        for shard in self.shards:
            dtype = wider_dtype(dtype, shard["dtype"])
        for i, shard in enumerate(self.shards):
            self._widen(i, dtype)
            del shard["dtype"]
        meta |= {"cells": self.num_cells, "nnz": self.nnz, "shards": self.shards}
        meta |= {"dtypes": {"indptr": "uint64", "indices": self._index_dtype, "counts": dtype}}
        json.dumps(meta)
        return meta

    def _shard_folder(self, i: int) -> Path:
        return self.folder / "shards" / f"{i:05d}"

    def _begin_shard(self) -> None:
        folder = self._shard_folder(len(self.shards))
        folder.mkdir(parents=True)
        for name in ("indices.bin", "counts.bin"):
            (folder / name).touch()
        self.shards.append({"cells": 0, "nnz": 0, "dtype": COUNT_DTYPES[0]})
        self._indptr = [np.zeros(1, dtype=np.int64)]

    def _append_part(self, rows: MappedRows, start: int, stop: int) -> None:
        shard, folder = self.shards[-1], self._shard_folder(len(self.shards) - 1)
        first, last = rows.indptr[start], rows.indptr[stop]
        values = rows.values[first:last]
        self._widen(
            len(self.shards) - 1, wider_dtype(shard["dtype"], count_dtype(rows.largest, is_whole=rows.is_whole))
        )
        _append(folder / "indices.bin", rows.genes[first:last], self._index_dtype)
        _append(folder / "counts.bin", values, shard["dtype"])
        self._indptr.append(rows.indptr[start + 1 : stop + 1] - first + shard["nnz"])
        shard["cells"] += stop - start
        shard["nnz"] += int(last - first)
        self.num_cells += stop - start
        self.nnz += int(last - first)

    def _end_shard(self) -> None:
        folder = self._shard_folder(len(self.shards) - 1)
        _append(folder / "indptr.bin", np.concatenate(self._indptr), "uint64")
        write_table(pa.concat_tables(self._obs).unify_dictionaries().combine_chunks(), folder / "obs.parquet")
        self._indptr, self._obs = [], []

    def _widen(self, i: int, dtype: str) -> None:
        """Rewrite the counts of a shard in a wider type, a piece at a time."""
        shard, path = self.shards[i], self._shard_folder(i) / "counts.bin"
        if shard["dtype"] == dtype:
            return
        old, wide = np.dtype(shard["dtype"]).newbyteorder("<"), path.with_suffix(".wide")
        wide.touch()
        with path.open("rb") as file:
            while piece := file.read(COPY_VALUES * old.itemsize):
                _append(wide, np.frombuffer(piece, dtype=old), dtype)
        wide.replace(path)
        shard["dtype"] = dtype
