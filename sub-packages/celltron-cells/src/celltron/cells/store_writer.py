"""One shard of a store written as its rows come: arrays in the smallest types that hold it, hashed on the way.

C cells of the shard, N their non-zero counts, G genes of the store.
"""

import errno
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from celltron.cells.map_rows import MappedRows, Types, count_genes, widest
from celltron.core import write_atomically
from celltron.core.durable import FileEntry, HashedFile, hash_file

COPY_VALUES = 2**20


class _Column:
    """One array of a shard, appended to and, when it must be, rewritten in a wider type."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.path = path
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._file = HashedFile(path)

    def append(self, array: npt.NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(array, dtype=self._dtype))

    def widen(self, dtype: str) -> None:
        """Bring what is there to another type, a piece at a time."""
        narrow, self._dtype = self._dtype, np.dtype(dtype).newbyteorder("<")
        if narrow == self._dtype:
            return
        self._file.close()
        aside = self.path.with_suffix(".wide")
        self._file = HashedFile(aside)
        with self.path.open("rb") as file:
            while piece := file.read(COPY_VALUES * narrow.itemsize):
                self.append(np.frombuffer(piece, dtype=narrow))
        aside.replace(self.path)
        self._file.path = self.path

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Values that were written, after `finish`."""
        size = self._dtype.itemsize
        return np.fromfile(self.path, dtype=self._dtype, count=stop - start, offset=start * size)

    def finish(self) -> FileEntry:
        self._file.close()
        return self._file.entry()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """What is known of a complete shard, in numbers and in the lengths and checksums of its files, by name.

    ``total_counts`` sums over all genes of the sources, ``unmapped_counts`` over those that the store lacks.
    ``num_cells`` is the entry of the file of the number of cells in which each gene is.
    """

    cells: int
    nnz: int
    indices: str
    counts: str
    total_counts: float
    unmapped_counts: float
    files: dict[str, FileEntry]
    num_cells: FileEntry

    def manifest_entry(self) -> dict[str, Any]:
        """Its line in the manifest's list of shards."""
        return {"cells": self.cells, "nnz": self.nnz, "indices": self.indices, "counts": self.counts}

    @property
    def types(self) -> Types:
        """The types of its indices and counts."""
        return Types(self.indices, self.counts)


class ShardWriter:
    """Fills the folder of one shard: `add` its rows, `end_rows`, `write_obs`, then `finish`."""

    def __init__(self, folder: Path, *, num_genes: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.cells = 0
        self.nnz = 0
        self.num_cells = np.zeros(num_genes, dtype=np.int64)
        self._types = Types()
        self._total_counts = self._unmapped_counts = 0.0
        self._files: dict[str, FileEntry] = {}
        dtypes = {"indptr": "uint64", "indices": self._types.indices, "counts": self._types.counts, "totals": "float64"}
        self._columns = {name: _Column(folder / f"{name}.bin", dtype) for name, dtype in dtypes.items()}
        self._columns["indptr"].append(np.zeros(1, dtype=np.uint64))

    def add(self, rows: MappedRows) -> None:
        """Add rows of a source."""
        count_genes(rows.genes, self.num_cells)
        self._types = widest(self._types, rows.types)
        self._columns["indices"].widen(self._types.indices)
        self._columns["counts"].widen(self._types.counts)
        self._columns["indices"].append(rows.genes)
        self._columns["counts"].append(rows.counts)
        self._columns["indptr"].append(rows.ends + self.nnz)
        self._columns["totals"].append(rows.totals)
        self.cells += len(rows.totals)
        self.nnz += len(rows.genes)
        self._total_counts += float(rows.totals.sum())
        self._unmapped_counts += rows.unmapped

    def end_rows(self) -> None:
        """Close the arrays; `totals` can be read from then on."""
        for name, column in self._columns.items():
            self._files[f"{name}.bin"] = column.finish()

    def totals(self, start: int, stop: int) -> npt.NDArray[np.float64]:
        """Sums over all genes of the sources, of a run of the shard's cells."""
        return self._columns["totals"].read(start, stop).astype(np.float64, copy=False)

    def write_obs(self, tables: Iterable[pa.Table]) -> None:
        """Write the table of cells, a row group for each part."""
        self._files["obs.parquet"] = write_tables(tables, self.folder / "obs.parquet")

    def finish(self, num_cells_path: Path) -> ShardRecord:
        """The record of the shard; the numbers of cells of the genes go to a file of their own."""
        with HashedFile(num_cells_path) as file:
            file.write(self.num_cells.astype("<i8", copy=False))
        return ShardRecord(
            cells=self.cells,
            nnz=self.nnz,
            indices=self._types.indices,
            counts=self._types.counts,
            total_counts=self._total_counts,
            unmapped_counts=self._unmapped_counts,
            files=self._files,
            num_cells=file.entry(),
        )


def write_record(record: ShardRecord, path: Path) -> None:
    """Write a record, in one step, once all files of its shard are written.

    Nothing is pushed to the disk: what a machine that failed lost does not fit the record's checksums.
    """
    write_atomically(path, json.dumps(asdict(record)), sync=False)


def read_record(path: Path, num_cells_path: Path, shard: Path) -> ShardRecord | None:
    """The record of a complete shard, all its files read and compared with it; None where anything differs."""
    try:
        record = ShardRecord(**json.loads(path.read_text(encoding="utf-8")))
        files = {shard / name: entry for name, entry in record.files.items()} | {num_cells_path: record.num_cells}
        is_whole = all(file.stat().st_size == entry["bytes"] for file, entry in files.items())
        return record if is_whole and all(hash_file(file) == entry for file, entry in files.items()) else None
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None


def write_tables(tables: Iterable[pa.Table], path: Path) -> FileEntry:
    """Write tables of one schema as row groups of a parquet file; arrow's errors become OSErrors that name the file."""
    with HashedFile(path) as file:
        writer: pq.ParquetWriter | None = None
        try:
            for table in tables:
                writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
                writer.write_table(_compact(table), row_group_size=max(1, table.num_rows))
            assert writer is not None, f"{path}: no table to write"
            writer.close()
        except pa.ArrowException as error:
            raise OSError(errno.EIO, str(error), str(path)) from error
        finally:
            if writer is not None:
                writer.is_open = False  # after an error it would write on when it is collected
    return file.entry()


def _compact(table: pa.Table) -> pa.Table:
    """Chunks joined, and dictionaries that are longer than the table cut to the words in use."""
    table = table.unify_dictionaries().combine_chunks()
    for i, column in enumerate(table.columns):
        if pa.types.is_dictionary(column.type) and table.num_rows and len(column.chunk(0).dictionary) > len(column):
            table = table.set_column(i, table.field(i), _words_in_use(column.chunk(0)))
    return table


def _words_in_use(array: pa.DictionaryArray) -> pa.DictionaryArray:
    missing = array.is_null().to_numpy(zero_copy_only=False)
    codes = array.indices.fill_null(0).to_numpy()
    used = np.unique(codes[~missing])
    places = np.searchsorted(used, codes)
    places[missing] = 0
    indices = pa.array(places.astype(codes.dtype), mask=missing)
    return pa.DictionaryArray.from_arrays(indices, array.dictionary.take(pa.array(used)))
