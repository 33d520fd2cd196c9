"""The tables and arrays of a SOMA experiment, their rows found by the ids that join them.

C cells, K genes, N stored values of a block. Ids are ``soma_joinid``, int64, rising, with or without gaps.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from celltron.cells.ingest.anndata_frame import CATEGORY, as_text
from celltron.cells.ingest.anndata_matrix import DenseMatrix, Matrix
from celltron.cells.ingest.damage import damaged, reading
from celltron.cells.ingest.row_arrays import ChunkedArray
from celltron.cells.ingest.row_order import order_triples, row_bounds
from celltron.cells.ingest.source import BLOCK_VALUES, RowBlock

JOIN_ID = "soma_joinid"
READ_VALUES = 2**21
"""Stored values fetched at once, about: each fetch from an object store waits, and a tile holds many rows."""
FIRST_ROWS, MOST_ROWS = 2**8, 2**13
"""Rows of the first fetch, before it is known how full they are, and of any."""
Ids = npt.NDArray[np.int64]


@contextmanager
def soma_reading(name: str) -> Iterator[None]:
    """Turn the errors of tiledbsoma, which have no base of Python's, into an InputError."""
    with reading(name):
        try:
            yield
        except Exception as error:
            if is_soma_error(error):
                raise damaged(name, soma_words(error)) from error
            raise


def is_soma_error(error: BaseException) -> bool:
    """Whether tiledbsoma raised it."""
    return type(error).__module__.startswith("tiledbsoma")


def soma_words(error: BaseException) -> str:
    """What an error of tiledbsoma says, without the traceback that it may carry."""
    return str(error).split("\nAt:")[0].strip().removeprefix("SOMAError: ").strip("'\"") or type(error).__name__


def coordinates(ids: Ids) -> Any:
    """Ids as tiledbsoma takes them: a run as a slice, with its end."""
    if len(ids) and ids[-1] - ids[0] == len(ids) - 1:
        return slice(int(ids[0]), int(ids[-1]))
    return pa.array(ids)


class SomaFrame:
    """Rows of a SOMA data frame; see `celltron.cells.ingest.source.Frame`.

    Args:
        table: the open data frame.
        ids: the ids of the rows.
        index: the column of the row names; None takes the ids.
        columns: the other columns.
        name: the source's name, for messages.
    """

    def __init__(self, table: Any, ids: Ids, index: str | None, columns: Sequence[str], name: str) -> None:
        self.num_rows = len(ids)
        self.columns = list(columns)
        self.notes = {column: note for column in columns if (note := _note(table.schema.field(column).type))}
        self._table, self._ids, self._index, self._name = table, ids, index, name
        self._is_by_id = tuple(table.index_column_names) == (JOIN_ID,)

    def index(self, start: int = 0, stop: int | None = None) -> pa.Array:
        """The row names as text."""
        if self._index is None:
            return pa.array(self._ids[start:stop]).cast(pa.string())
        return as_text(self.column(self._index, start, stop))

    def column(self, name: str, start: int = 0, stop: int | None = None) -> pa.Array:
        """A run of one column."""
        ids = self._ids[start:stop]
        kind = self._table.schema.field(name).type
        if not len(ids):
            return _plain(pa.array([], type=kind))
        with soma_reading(self._name):
            found = self._read(name, ids)
            order = np.argsort(found[JOIN_ID].to_numpy(), kind="stable")
            if not np.array_equal(found[JOIN_ID].to_numpy()[order], ids):
                raise damaged(self._name, f"{self._table.uri} lacks rows or names them twice")
            return _plain(_one_array(found[name]).take(pa.array(order)))

    def _read(self, name: str, ids: Ids) -> pa.Table:
        names = [JOIN_ID, name]
        if self._is_by_id:
            table: pa.Table = self._table.read(coords=(coordinates(ids),), column_names=names).concat()
            return table
        span = f"{JOIN_ID} >= {ids[0]} and {JOIN_ID} <= {ids[-1]}"
        table = self._table.read(value_filter=span, column_names=names).concat()
        return table.filter(pa.array(np.isin(table[JOIN_ID].to_numpy(), ids)))


def read_ids(table: Any, value_filter: str | None = None) -> Ids:
    """The ids of all rows of a data frame, or of those that fit the filter, rising."""
    parts = [part[JOIN_ID].to_numpy() for part in table.read(column_names=[JOIN_ID], value_filter=value_filter)]
    ids: Ids = np.sort(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.int64)
    return ids


def _note(kind: pa.DataType) -> str:
    if pa.types.is_dictionary(kind):
        return "" if _is_text(kind.value_type) else "categories that are not text"
    return "" if _is_number(kind) or _is_text(kind) else "neither numbers nor text"


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    if column.num_chunks == 1:
        return column.chunk(0)
    if pa.types.is_dictionary(column.type):
        column = column.unify_dictionaries()
    return column.combine_chunks()


def _plain(array: pa.Array) -> pa.Array:
    """A number, truth value or text column as it is, a category as a dictionary of text, everything else as text."""
    if pa.types.is_dictionary(array.type):
        words = array.dictionary if _is_text(array.type.value_type) else [str(w) for w in array.dictionary.to_pylist()]
        indices = array.indices.cast(CATEGORY.index_type)
        return pa.DictionaryArray.from_arrays(indices, pa.array(words).cast(pa.string()))
    if _is_number(array.type):
        return array.cast(pa.float32()) if pa.types.is_float16(array.type) else array
    return as_text(array)


class SparseMatrix:
    """A sparse SOMA array as rows of cells; see `celltron.cells.ingest.anndata_matrix.Matrix`.

    Args:
        array: the open array.
        cells: the ids of the rows, [C].
        genes: the ids of the columns, [K].
        name: the source's name, for messages.
    """

    def __init__(self, array: Any, cells: Ids, genes: Ids, name: str) -> None:
        self.shape = (len(cells), len(genes))
        self._array, self._cells, self._genes, self._name = array, cells, genes, name

    def prepare(self, scratch: Path, identity: dict[str, Any]) -> None:
        """Rows are read as they are."""

    def blocks(self, start: int, stop: int) -> Iterator[RowBlock]:
        """The rows ``start .. stop`` in order."""
        num_rows = FIRST_ROWS
        while start < stop:
            end = min(start + num_rows, stop)
            block = self._read(start, end)
            yield from _cut(block, BLOCK_VALUES)
            fitting = READ_VALUES * (end - start) // max(1, len(block.values))
            num_rows = max(1, min(fitting, 4 * num_rows, MOST_ROWS))
            start = end

    def head(self, num_values: int) -> RowBlock:
        """The first rows."""
        return next(_cut(self._read(0, min(self.shape[0], FIRST_ROWS)), num_values))

    def close(self) -> None:
        """The array belongs to the experiment."""

    def _read(self, start: int, stop: int) -> RowBlock:
        ids = self._cells[start:stop]
        with soma_reading(self._name):
            parts = list(self._array.read(coords=(coordinates(ids), slice(None))).tables())
            table = pa.concat_tables(parts) if parts else self._array.schema.empty_table()
            cells, genes, values = (table.column(k).to_numpy() for k in range(3))
        rows = self._places(ids, cells, "cells")
        columns = self._places(self._genes, genes, "genes")
        values = np.ascontiguousarray(values.astype(np.uint8) if values.dtype.kind == "b" else values)
        rows_of = np.arange(stop - start, dtype=np.int32)
        indptr, (_, columns, values) = order_triples(rows, columns, values, rows_of, stop - start)
        return RowBlock(start=start, indptr=indptr, columns=columns, values=values)

    def _places(self, ids: Ids, found: Ids, what: str) -> npt.NDArray[np.int32]:
        """The place of each found id among ``ids``."""
        if len(ids) and ids[-1] - ids[0] == len(ids) - 1:
            places = found - ids[0]
            is_there = (places >= 0) & (places < len(ids))
        else:
            places = np.minimum(np.searchsorted(ids, found), len(ids) - 1)
            is_there = ids[places] == found
        if not is_there.all():
            raise damaged(self._name, f"{self._array.uri} holds values of {what} that are not named")
        small: npt.NDArray[np.int32] = places.astype(np.int32)
        return small


def _cut(block: RowBlock, num_values: int) -> Iterator[RowBlock]:
    bounds = row_bounds(block.indptr, num_values)
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        first, last = int(block.indptr[begin]), int(block.indptr[end])
        yield RowBlock(
            start=block.start + begin,
            indptr=block.indptr[begin : end + 1] - first,
            columns=block.columns[first:last],
            values=block.values[first:last],
        )


class SomaRows:
    """Rows of a SOMA array as a dense array [C, D], such as one of obsm; what is not stored is zero."""

    def __init__(self, array: Any, ids: Ids, columns: Ids, name: str) -> None:
        self.shape: tuple[int, ...] = (len(ids), len(columns))
        self.dtype = np.dtype(array.schema.field("soma_data").type.to_pandas_dtype())
        self._array, self._ids, self._columns, self._name = array, ids, columns, name

    def __getitem__(self, rows: slice, /) -> npt.NDArray[Any]:
        """Rows ``start .. stop``."""
        ids = self._ids[rows]
        out = np.zeros((len(ids), self.shape[1]), dtype=self.dtype)
        if not out.size:
            return out
        with soma_reading(self._name):
            if self._array.soma_type == "SOMADenseNDArray":
                for first, last in _runs(ids):
                    span = (slice(int(ids[first]), int(ids[last - 1])), slice(None))
                    out[first:last] = self._array.read(coords=span).to_numpy()[:, self._columns]
            else:
                for part in self._array.read(coords=(coordinates(ids), slice(None))).tables():
                    places, columns, values = (part.column(k).to_numpy() for k in range(3))
                    out[np.searchsorted(ids, places), columns] = values
        return out


def _runs(ids: Ids) -> Iterator[tuple[int, int]]:
    """Begin and end of each run of ids without a gap."""
    edges = [0, *(np.flatnonzero(np.diff(ids) != 1) + 1).tolist(), len(ids)]
    return zip(edges[:-1], edges[1:], strict=True)


def soma_matrix(array: Any, cells: Ids, genes: Ids, name: str) -> Matrix:
    """The reader of a sparse or dense array whose rows are ``cells`` and whose columns are ``genes``, by their ids."""
    if array.soma_type != "SOMADenseNDArray":
        return SparseMatrix(array, cells, genes, name)
    rows = SomaRows(array, cells, genes, name)
    height = 4 * max(1, BLOCK_VALUES // max(1, len(genes)))  # a tile holds many rows

    def load(numbers: list[int]) -> list[npt.NDArray[Any]]:
        return [rows[number * height : (number + 1) * height] for number in numbers]

    shape = (len(cells), len(genes))
    return DenseMatrix(ChunkedArray(shape, rows.dtype, (height, len(genes)), load), (height, len(genes)), (name, "X"))
