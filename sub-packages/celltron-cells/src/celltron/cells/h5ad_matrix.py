"""A matrix of an .h5ad file, CSR, CSC or dense, read in blocks of whole rows whose size does not grow with the file.

R rows (cells), K columns (genes), N stored values of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import numpy.typing as npt

from celltron.cells.compiled import compiled
from celltron.core import InputError

BLOCK_VALUES = 2**19
BLOCK_ROWS = 2**17
CSC_BLOCKS = 4
_TRIPLE = ("rows", "columns", "values")
_Triples = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBlock:
    """Rows of a matrix from ``start`` on: ``indptr`` int64 [rows + 1], from 0; ``columns`` and ``values`` [N]."""

    start: int
    indptr: npt.NDArray[np.int64]
    columns: npt.NDArray[np.integer]
    values: npt.NDArray[np.generic]


class Matrix(Protocol):
    """What every storage form of a matrix can do."""

    shape: tuple[int, int]

    def blocks(self, scratch: Path) -> Iterator[RowBlock]:
        """All rows in order; ``scratch`` is a folder for files that are removed again."""

    def head(self, num_values: int) -> RowBlock:
        """About ``num_values`` stored values from the beginning of the file, as rows."""


def row_bounds(indptr: npt.NDArray[np.int64], num_values: int | None = None) -> list[int]:
    """Cut rows into runs of at most ``num_values`` stored values, or one row: ``[0, …, R]``."""
    num_values = BLOCK_VALUES if num_values is None else num_values
    last = len(indptr) - 1
    bounds = [0]
    while bounds[-1] < last:
        start = bounds[-1]
        stop = int(np.searchsorted(indptr, indptr[start] + num_values, side="right")) - 1
        bounds.append(min(max(stop, start + 1), start + BLOCK_ROWS, last))
    return bounds


@compiled
def _order_by(keys: npt.NDArray[np.integer], num_keys: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """A stable counting sort: where each key begins, [num_keys + 1], and the places of the keys in order."""
    begins = np.zeros(num_keys + 1, dtype=np.int64)
    for key in keys:
        begins[key + 1] += 1
    for k in range(num_keys):
        begins[k + 1] += begins[k]
    following = begins.copy()
    order = np.empty(keys.shape[0], dtype=np.int64)
    for i in range(keys.shape[0]):
        order[following[keys[i]]] = i
        following[keys[i]] += 1
    return begins, order


@compiled
def _compress(dense: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[Any]]:
    """Dense rows in compressed form; what is not a number is not zero."""
    indptr = np.zeros(dense.shape[0] + 1, dtype=np.int64)
    columns = np.empty(dense.size, dtype=np.int32)
    values = np.empty(dense.size, dtype=dense.dtype)
    end = np.int64(0)
    for row in range(dense.shape[0]):
        for column in range(dense.shape[1]):
            columns[end] = column
            values[end] = dense[row, column]
            end += np.int64(dense[row, column] != 0)
        indptr[row + 1] = end
    return indptr, columns[:end], values[:end]


class CsrMatrix:
    """Rows compressed: a block is one slice of each array."""

    def __init__(self, group: h5py.Group, shape: tuple[int, int]) -> None:
        self.shape = shape
        self._columns, self._values = group["indices"], group["data"]
        self._indptr = _read_indptr(group, shape[0], "cells")

    def _rows(self, start: int, stop: int) -> RowBlock:
        first, last = int(self._indptr[start]), int(self._indptr[stop])
        return RowBlock(
            start=start,
            indptr=self._indptr[start : stop + 1] - first,
            columns=self._columns[first:last],
            values=self._values[first:last],
        )

    def blocks(self, scratch: Path) -> Iterator[RowBlock]:
        """All rows in order."""
        bounds = row_bounds(self._indptr)
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
            yield self._rows(start, stop)

    def head(self, num_values: int) -> RowBlock:
        """The first rows."""
        return self._rows(0, row_bounds(self._indptr, num_values)[1])


class CscMatrix:
    """Columns compressed: one pass counts the values of each row, one deals them into a file for each run of rows."""

    def __init__(self, group: h5py.Group, shape: tuple[int, int]) -> None:
        self.shape = shape
        self._rows, self._values = group["indices"], group["data"]
        self._indptr = _read_indptr(group, shape[1], "genes")
        self._index_dtype = np.dtype(np.int32 if max(shape) < 2**31 else np.int64)

    def _columns(self, start: int, stop: int) -> _Triples:
        first, last = int(self._indptr[start]), int(self._indptr[stop])
        rows = self._rows[first:last].astype(self._index_dtype)
        if len(rows) and (rows.min() < 0 or rows.max() >= self.shape[0]):
            raise InputError(
                f"{self._rows.file.filename} is damaged: its matrix names cells that it does not have; copy it again"
            )
        columns = np.repeat(np.arange(start, stop, dtype=self._index_dtype), np.diff(self._indptr[start : stop + 1]))
        return rows, columns, self._values[first:last]

    def _column_runs(self) -> Iterator[_Triples]:
        bounds = row_bounds(self._indptr, CSC_BLOCKS * BLOCK_VALUES)
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
            yield self._columns(start, stop)

    def blocks(self, scratch: Path) -> Iterator[RowBlock]:
        """All rows in order; needs scratch space of 8 bytes a stored value and the value itself."""
        per_row = np.zeros(self.shape[0], dtype=np.int64)
        for rows, _, _ in self._column_runs():
            per_row += np.bincount(rows, minlength=self.shape[0])
        bounds = np.array(row_bounds(np.concatenate([[0], np.cumsum(per_row)])))
        run_of_row = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
        files = [[scratch / f"{name}{i:05d}" for name in _TRIPLE] for i in range(len(bounds) - 1)]
        scratch.mkdir(exist_ok=True)
        for triples in self._column_runs():
            begins, order = _order_by(run_of_row[triples[0]], len(files))
            for array, k in zip(triples, range(3), strict=True):
                ordered = array[order]
                for i, paths in enumerate(files):
                    with paths[k].open("ab") as file:
                        file.write(ordered[begins[i] : begins[i + 1]].data)
        dtypes = (self._index_dtype, self._index_dtype, self._values.dtype)
        for paths, start, stop in zip(files, bounds[:-1], bounds[1:], strict=True):
            rows, columns, values = (np.fromfile(path, dtype) for path, dtype in zip(paths, dtypes, strict=True))
            for path in paths:
                path.unlink()
            yield _rows_of((rows, columns, values), int(start), int(stop))
        scratch.rmdir()

    def head(self, num_values: int) -> RowBlock:
        """The first columns; rows whose values lie in later columns look empty."""
        stop = row_bounds(self._indptr, num_values)[1]
        return _rows_of(self._columns(0, stop), 0, self.shape[0])


def _rows_of(triples: _Triples, start: int, stop: int) -> RowBlock:
    """Order triples of the rows ``start .. stop`` by row; within a row their order is kept."""
    rows, columns, values = triples
    indptr, order = _order_by(rows - start, stop - start)
    return RowBlock(start=start, indptr=indptr, columns=columns[order], values=values[order])


class DenseMatrix:
    """Every value stored: a block is a run of rows, its zeros dropped."""

    def __init__(self, dataset: h5py.Dataset) -> None:
        self.shape = (int(dataset.shape[0]), int(dataset.shape[1]))
        self._dataset = dataset

    def _rows(self, start: int, stop: int) -> RowBlock:
        dense = self._dataset[start:stop]
        native = np.dtype(np.float32) if dense.dtype == np.float16 else dense.dtype.newbyteorder("=")
        indptr, columns, values = _compress(dense.astype(native, copy=False))
        return RowBlock(start=start, indptr=indptr, columns=columns, values=values)

    def blocks(self, scratch: Path) -> Iterator[RowBlock]:
        """All rows in order, whole chunks of the file at a time where these are not too tall."""
        num_rows = max(1, BLOCK_VALUES // max(1, self.shape[1]))
        tall = self._dataset.chunks[0] if self._dataset.chunks else 1
        if tall <= 8 * num_rows:
            num_rows = max(1, num_rows // tall) * tall
        for start in range(0, self.shape[0], num_rows):
            yield self._rows(start, min(start + num_rows, self.shape[0]))

    def head(self, num_values: int) -> RowBlock:
        """The first rows."""
        return self._rows(0, min(self.shape[0], 1 + num_values // max(1, self.shape[1])))


def open_matrix(node: h5py.Group | h5py.Dataset) -> Matrix:
    """The reader for a matrix as anndata stores it (also as releases before 0.7 did)."""
    where = f"{node.name} of {node.file.filename}"
    if isinstance(node, h5py.Dataset):
        if node.ndim != 2 or node.dtype.kind not in "iufb":
            raise InputError(
                f"{where} is no matrix of numbers (shape {node.shape}, type {node.dtype}); name another layer"
            )
        return DenseMatrix(node)
    form = _text(node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "")))
    shape = tuple(int(size) for size in node.attrs.get("shape", node.attrs.get("h5sparse_shape", ())))
    if form.removesuffix("_matrix") not in ("csr", "csc") or len(shape) != 2:
        raise InputError(
            f"{where} is stored as {form or 'something unknown'!r}, wanted a CSR, CSC or dense matrix; write it "
            "again with anndata"
        )
    if node["data"].dtype.kind not in "iufb":
        raise InputError(f"{where} holds {node['data'].dtype} values, wanted numbers; name another layer")
    return CsrMatrix(node, (shape[0], shape[1])) if form.startswith("csr") else CscMatrix(node, (shape[0], shape[1]))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _read_indptr(group: h5py.Group, length: int, of: str) -> npt.NDArray[np.int64]:
    indptr: npt.NDArray[np.int64] = group["indptr"][:].astype(np.int64)
    num_values = len(group["data"])
    if (
        len(indptr) != length + 1
        or indptr[0] != 0
        or np.any(np.diff(indptr) < 0)
        or indptr[-1] != num_values
        or len(group["indices"]) != num_values
    ):
        raise InputError(
            f"{group.name} of {group.file.filename} is damaged: its {of} and its {num_values} stored values do not "
            "fit together; copy the file again"
        )
    return indptr
