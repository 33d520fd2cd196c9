"""A matrix as anndata stores it, CSR, CSC or dense, read in blocks of whole rows whose size does not grow with it.

R rows (cells), K columns (genes), N stored values of a block.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from celltron.cells.compiled import compiled
from celltron.cells.ingest.damage import damaged
from celltron.cells.ingest.row_arrays import RowArray
from celltron.cells.ingest.row_order import RUN_VALUES, Triples, deal_rows, open_dealt, order_triples, row_bounds
from celltron.cells.ingest.source import BLOCK_VALUES, RowBlock
from celltron.core import InputError

BLOCK_ROWS = 2**17
TALL_BLOCKS = 8
"""Dense chunks over more blocks of rows than these are dealt out first: each block would unpack all of them."""
LARGEST_ROW = 2**28


class Matrix(Protocol):
    """What every storage form of a matrix can do."""

    shape: tuple[int, int]

    def prepare(self, scratch: Path, identity: dict[str, Any]) -> None:
        """Fill the folder ``scratch`` if rows cannot be read as they are; ``identity`` tells whether it still holds."""

    def blocks(self, start: int, stop: int) -> Iterator[RowBlock]:
        """The rows ``start .. stop`` in order."""

    def head(self, num_values: int) -> RowBlock:
        """About ``num_values`` stored values from the beginning of the file, as rows."""

    def close(self) -> None:
        """Let go of what `prepare` opened."""


@compiled
def _compress(dense: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[Any]]:
    """Dense rows in compressed form; what is not a number is not zero."""
    indptr = np.zeros(dense.shape[0] + 1, dtype=np.int64)
    end = np.int64(0)
    for row in range(dense.shape[0]):
        for column in range(dense.shape[1]):
            end += np.int64(dense[row, column] != 0)
        indptr[row + 1] = end
    columns = np.empty(end, dtype=np.int32)
    values = np.empty(end, dtype=dense.dtype)
    end = np.int64(0)
    for row in range(dense.shape[0]):
        for column in range(dense.shape[1]):
            if dense[row, column] != 0:
                columns[end] = column
                values[end] = dense[row, column]
                end += 1
    return indptr, columns, values


def _kernel_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type that values of ``dtype`` have for kernels."""
    return np.dtype({"f2": "f4", "b1": "u1"}.get(dtype.str[1:], dtype))


def _numbers(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Values of a type that kernels know."""
    return values.astype(_kernel_dtype(values.dtype), copy=False)


class CsrMatrix:
    """Rows compressed: a block is one slice of each array."""

    def __init__(
        self, indptr: RowArray, columns: RowArray, values: RowArray, shape: tuple[int, int], where: tuple[str, str]
    ) -> None:
        self.shape = shape
        self._indptr, self._columns, self._values = indptr, columns, values
        self._file, self._name = where
        _check_arrays(self._file, self._name, (indptr, columns, values), shape[0])

    def prepare(self, scratch: Path, identity: dict[str, Any]) -> None:
        """Rows lie as they are wanted."""

    def blocks(self, start: int, stop: int) -> Iterator[RowBlock]:
        """The rows ``start .. stop`` in order."""
        for first in range(start, stop, BLOCK_ROWS):
            indptr = self._row_ends(first, min(first + BLOCK_ROWS, stop))
            bounds = row_bounds(indptr, BLOCK_VALUES)
            for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
                yield self._rows(first + begin, indptr[begin : end + 1])

    def head(self, num_values: int) -> RowBlock:
        """The first rows."""
        indptr = self._row_ends(0, min(self.shape[0], BLOCK_ROWS))
        return self._rows(0, indptr[: row_bounds(indptr, num_values)[1] + 1])

    def close(self) -> None:
        """There is nothing to close."""

    def _row_ends(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        indptr = self._indptr[start : stop + 1].astype(np.int64)
        sizes = np.diff(indptr)
        if indptr[0] < 0 or indptr[-1] > self._values.shape[0] or np.any(sizes < 0) or np.any(sizes > LARGEST_ROW):
            raise damaged(self._file, f"the row bounds of {self._name} do not rise from 0 to its stored values")
        return indptr

    def _rows(self, start: int, indptr: npt.NDArray[np.int64]) -> RowBlock:
        first, last = int(indptr[0]), int(indptr[-1])
        return RowBlock(
            start=start,
            indptr=indptr - first,
            columns=self._columns[first:last],
            values=_numbers(self._values[first:last]),
        )


class _Dealt(CsrMatrix):
    """Compressed rows in a scratch folder; ``runs`` are the `deal_rows` arguments ``count`` and ``triples``."""

    def __init__(
        self,
        scratch: Path,
        shape: tuple[int, int],
        dtype: np.dtype[Any],
        identity: dict[str, Any],
        runs: tuple[Callable[[], Iterator[npt.NDArray[Any]]], Callable[[], Iterator[Triples]]],
    ) -> None:
        self._scratch_file = deal_rows(scratch, shape, dtype, identity, count=runs[0], triples=runs[1])
        super().__init__(*open_dealt(self._scratch_file, scratch), shape, (str(scratch), "the matrix in rows"))

    def close(self) -> None:
        """Close the file."""
        self._scratch_file.close()


class CscMatrix:
    """Columns compressed: dealt out into rows once, in a scratch folder."""

    def __init__(
        self, indptr: RowArray, rows: RowArray, values: RowArray, shape: tuple[int, int], where: tuple[str, str]
    ) -> None:
        self.shape = shape
        self._rows, self._values = rows, values
        self._file, self._name = where
        _check_arrays(self._file, self._name, (indptr, rows, values), shape[1])
        self._indptr = indptr[0 : shape[1] + 1].astype(np.int64)
        if np.any(np.diff(self._indptr) < 0):
            raise damaged(self._file, f"the column bounds of {self._name} do not rise")
        self._index_dtype = np.dtype(np.int32 if max(shape) < 2**31 else np.int64)
        self._dealt: _Dealt | None = None

    def prepare(self, scratch: Path, identity: dict[str, Any]) -> None:
        """Deal the values out into rows."""
        dtype = _kernel_dtype(self._values.dtype)
        self._dealt = _Dealt(scratch, self.shape, dtype, identity, (self._count, self._triples))

    def blocks(self, start: int, stop: int) -> Iterator[RowBlock]:
        """The rows ``start .. stop`` in order."""
        assert self._dealt is not None, "prepare comes before blocks"
        return self._dealt.blocks(start, stop)

    def close(self) -> None:
        """Close the file in the scratch folder."""
        if self._dealt is not None:
            self._dealt.close()

    def head(self, num_values: int) -> RowBlock:
        """The first columns; rows whose values lie in later columns look empty."""
        stop = row_bounds(self._indptr, num_values)[1]
        keys = np.arange(self.shape[0], dtype=np.int32)
        indptr, (_, columns, values) = order_triples(*self._columns(0, stop), keys, self.shape[0])
        return RowBlock(start=0, indptr=indptr, columns=columns, values=values)

    def _column_runs(self) -> Iterator[tuple[int, int]]:
        bounds = row_bounds(self._indptr, RUN_VALUES)
        return zip(bounds[:-1], bounds[1:], strict=True)

    def _rows_of(self, start: int, stop: int) -> npt.NDArray[Any]:
        rows = self._rows[int(self._indptr[start]) : int(self._indptr[stop])]
        if len(rows) and (rows.min() < 0 or rows.max() >= self.shape[0]):
            raise damaged(self._file, f"{self._name} names cells that it does not have")
        return rows.astype(self._index_dtype, copy=False)

    def _columns(self, start: int, stop: int) -> Triples:
        columns = np.repeat(np.arange(start, stop, dtype=self._index_dtype), np.diff(self._indptr[start : stop + 1]))
        values = self._values[int(self._indptr[start]) : int(self._indptr[stop])]
        return self._rows_of(start, stop), columns, _numbers(values)

    def _count(self) -> Iterator[npt.NDArray[Any]]:
        return (self._rows_of(start, stop) for start, stop in self._column_runs())

    def _triples(self) -> Iterator[Triples]:
        return (self._columns(start, stop) for start, stop in self._column_runs())


class DenseMatrix:
    """Every value stored: a block is a run of rows, its zeros dropped."""

    def __init__(self, array: RowArray, chunks: tuple[int, ...] | None, where: tuple[str, str]) -> None:
        self.shape = (int(array.shape[0]), int(array.shape[1]))
        self._array, self._name = array, where[1]
        self._chunks = chunks or (1, self.shape[1])
        self._block_rows = max(1, BLOCK_VALUES // max(1, self.shape[1]))
        self._is_tall = self._chunks[0] > TALL_BLOCKS * self._block_rows
        self._dealt: _Dealt | None = None
        if not self._is_tall:  # whole chunks at a time
            self._block_rows = max(1, self._block_rows // self._chunks[0]) * self._chunks[0]

    def prepare(self, scratch: Path, identity: dict[str, Any]) -> None:
        """Deal tall chunks out into rows; others are read as they are."""
        if self._is_tall:
            dtype = _kernel_dtype(self._array.dtype)
            runs = (lambda: (rows for rows, _, _ in self._tiles()), self._tiles)
            self._dealt = _Dealt(scratch, self.shape, dtype, identity, runs)

    def blocks(self, start: int, stop: int) -> Iterator[RowBlock]:
        """The rows ``start .. stop`` in order."""
        if self._is_tall:
            assert self._dealt is not None, "prepare comes before blocks"
            yield from self._dealt.blocks(start, stop)
            return
        while start < stop:
            end = min((start // self._block_rows + 1) * self._block_rows, stop)
            yield self._rows(start, end)
            start = end

    def head(self, num_values: int) -> RowBlock:
        """The first rows."""
        return self._rows(0, min(self.shape[0], 1 + num_values // max(1, self.shape[1])))

    def close(self) -> None:
        """Close the file in the scratch folder."""
        if self._dealt is not None:
            self._dealt.close()

    def _rows(self, start: int, stop: int) -> RowBlock:
        indptr, columns, values = _compress(_numbers(self._array[start:stop]))
        return RowBlock(start=start, indptr=indptr, columns=columns, values=values)

    def _tiles(self) -> Iterator[Triples]:
        """The non-zero values, a tile of whole chunks at a time, columns rising within each band of rows."""
        tall, wide = self._chunks
        wide *= max(1, RUN_VALUES // (tall * wide))
        for top in range(0, self.shape[0], tall):
            bottom = min(top + tall, self.shape[0])
            for left in range(0, self.shape[1], wide):
                tile = np.ascontiguousarray(self._array[top:bottom, left : min(left + wide, self.shape[1])])
                indptr, columns, values = _compress(_numbers(tile))
                rows = np.repeat(np.arange(top, bottom, dtype=np.int64), np.diff(indptr))
                yield rows, columns + left, values


def _check_arrays(file: str, name: str, arrays: tuple[RowArray, RowArray, RowArray], length: int) -> None:
    """Refuse arrays of a sparse matrix whose lengths do not fit together; ``length`` is its rows or columns."""
    indptr, indices, values = arrays
    fits = all(len(array.shape) == 1 for array in arrays) and indptr.shape[0] == length + 1
    fits = fits and indices.dtype.kind in "iu" and indptr.dtype.kind in "iu"
    num_values = values.shape[0]
    if (
        not fits
        or indices.shape[0] != num_values
        or int(indptr[0:1][0]) != 0
        or int(indptr[length : length + 1][0]) != num_values
    ):
        raise InputError(
            f"{file} is damaged: the row or column bounds of {name} and its {num_values} stored values do not fit "
            "together; copy the file again"
        )


def open_matrix(node: Any, file: str, open_array: Callable[[Any], RowArray]) -> Matrix:
    """The reader for a matrix as anndata stores it in HDF5 or zarr (also as releases before 0.7 did).

    Args:
        node: the array or group of the matrix.
        file: the source's name, for messages.
        open_array: how an array of it is read.
    """
    name = str(node.name).lstrip("/")
    where = f"{name} of {file}"
    if hasattr(node, "dtype"):
        if node.ndim != 2 or node.dtype.kind not in "iufb":
            raise InputError(
                f"{where} is no matrix of numbers (shape {node.shape}, type {node.dtype}); name another layer"
            )
        return DenseMatrix(open_array(node), node.chunks, (file, name))
    form = _text(node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "")))
    shape = tuple(int(size) for size in node.attrs.get("shape", node.attrs.get("h5sparse_shape", ())))
    if form.removesuffix("_matrix") not in ("csr", "csc") or len(shape) != 2:
        raise InputError(
            f"{where} is stored as {form or 'something unknown'!r}, wanted a CSR, CSC or dense matrix; write it "
            "again with anndata"
        )
    parts = [node[part] for part in ("indptr", "indices", "data")]
    if not all(hasattr(part, "dtype") for part in parts) or parts[2].dtype.kind not in "iufb":
        raise InputError(f"{where} does not hold numbers; name another layer")
    indptr, indices, values = (open_array(part) for part in parts)
    kind = CsrMatrix if form.startswith("csr") else CscMatrix
    return kind(indptr, indices, values, (shape[0], shape[1]), (file, name))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
