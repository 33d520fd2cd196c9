"""Values that come ordered by column, dealt out into rows: on disk, with memory that does not grow with the matrix.

C cells (rows), N stored values of the matrix, n of a run of it.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from celltron.cells.compiled import compiled
from celltron.cells.ingest.row_arrays import FlatArray, LocalFile
from celltron.core import write_atomically
from celltron.core.durable import name_file_in_errors

RUN_VALUES = 2**22
"""Values held at once while they are dealt out."""
MARKER, MATRIX = "complete.json", "matrix"
Triples = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]
"""The row, the column and the value of each of n stored values."""


def row_bounds(indptr: npt.NDArray[np.int64], num_values: int) -> list[int]:
    """Cut rows into runs of at most ``num_values`` stored values, or one row: ``[0, …, R]``."""
    last = len(indptr) - 1
    bounds = [0]
    while bounds[-1] < last:
        start = bounds[-1]
        stop = int(np.searchsorted(indptr, indptr[start] + num_values, side="right")) - 1
        bounds.append(min(max(stop, start + 1), last))
    return bounds


@compiled
def order_triples(
    rows: npt.NDArray[np.integer],
    columns: npt.NDArray[Any],
    values: npt.NDArray[Any],
    key_of_row: npt.NDArray[np.int32],
    num_keys: int,
) -> tuple[npt.NDArray[np.int64], Triples]:
    """A stable counting sort of triples by the key of their row: where each key begins, [num_keys + 1], the triples."""
    begins = np.zeros(num_keys + 1, dtype=np.int64)
    for row in rows:
        begins[key_of_row[row] + 1] += 1
    for k in range(num_keys):
        begins[k + 1] += begins[k]
    following = begins.copy()
    ordered = np.empty_like(rows), np.empty_like(columns), np.empty_like(values)
    for i in range(rows.shape[0]):
        key = key_of_row[rows[i]]
        place = following[key]
        ordered[0][place], ordered[1][place], ordered[2][place] = rows[i], columns[i], values[i]
        following[key] = place + 1
    return begins, ordered


@compiled
def _count_rows(rows: npt.NDArray[np.integer], counts: npt.NDArray[np.int64]) -> None:
    for row in rows:
        counts[row] += 1


class _Layout(NamedTuple):
    """The file of compressed rows: the first byte of ``columns`` [N], ``values`` [N] and ``indptr`` int64 [C+1]."""

    columns: int
    values: int
    indptr: int
    index_dtype: np.dtype[Any]
    value_dtype: np.dtype[Any]


def _layout(shape: tuple[int, int], num_values: int, value_dtype: np.dtype[Any]) -> _Layout:
    index_dtype = np.dtype(np.int32 if max(shape) < 2**31 else np.int64)
    values = num_values * index_dtype.itemsize
    return _Layout(0, values, values + num_values * value_dtype.itemsize, index_dtype, value_dtype)


def deal_rows(
    scratch: Path,
    shape: tuple[int, int],
    value_dtype: np.dtype[Any],
    identity: dict[str, Any],
    *,
    count: Callable[[], Iterator[npt.NDArray[Any]]],
    triples: Callable[[], Iterator[Triples]],
) -> LocalFile:
    """Write a matrix as compressed rows into ``scratch``, unless it is there already; see `open_dealt`.

    Two passes: the first counts the values of each row, so that each run of rows has its place in the file; the second
    puts every value into its run. Then each run is ordered by row where it lies. A marker is written last.

    Args:
        scratch: a folder of its own; takes 4 to 8 bytes a stored value and the value itself, 4 to 8 more meanwhile.
        shape: rows and columns.
        value_dtype: the type of the values.
        identity: what says that the source is the one that was dealt out.
        count: the rows of all stored values, a run at a time.
        triples: all stored values, a run at a time, columns rising for each row.
    """
    if not _is_complete(scratch, shape, identity):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        indptr = np.zeros(shape[0] + 1, dtype=np.int64)
        for rows in count():
            _count_rows(rows, indptr[1:])
        np.cumsum(indptr, out=indptr)
        bounds = np.array(row_bounds(indptr, RUN_VALUES))
        layout = _layout(shape, int(indptr[-1]), value_dtype)
        with (scratch / MATRIX).open("w+b", buffering=0) as file:
            with (scratch / "rows").open("w+b", buffering=0) as rows_file:
                _deal(layout, triples(), indptr, bounds, (rows_file, file))
            _order_runs(scratch, layout, indptr, bounds, file)
            _write(file, indptr, layout.indptr)
            os.fsync(file.fileno())
        (scratch / "rows").unlink()
        marker = {"identity": identity, "shape": list(shape), "values": int(indptr[-1]), "dtype": value_dtype.str}
        write_atomically(scratch / MARKER, json.dumps(marker))
    return LocalFile(scratch / MATRIX)


def _deal(
    layout: _Layout,
    triples: Iterator[Triples],
    indptr: npt.NDArray[np.int64],
    bounds: npt.NDArray[np.int64],
    files: tuple[Any, Any],
) -> None:
    """Put every value into the part of the files, that of rows and that of the matrix, that belongs to its run."""
    run_of_row = np.repeat(np.arange(len(bounds) - 1, dtype=np.int32), np.diff(bounds))
    following = indptr[bounds[:-1]].copy()
    targets = (
        (files[0], 0, layout.index_dtype),
        (files[1], layout.columns, layout.index_dtype),
        (files[1], layout.values, layout.value_dtype),
    )
    for triple in triples:
        begins, ordered = order_triples(*triple, run_of_row, len(bounds) - 1)
        for array, (file, offset, dtype) in zip(ordered, targets, strict=True):
            array = array.astype(dtype, copy=False)
            for run in np.flatnonzero(np.diff(begins)):
                part = array[begins[run] : begins[run + 1]]
                _write(file, part, offset + int(following[run]) * dtype.itemsize)
        following += np.diff(begins)
    assert np.array_equal(following, indptr[bounds[1:]]), f"dealt {following} of {indptr[bounds[1:]]} values"


def _order_runs(
    scratch: Path, layout: _Layout, indptr: npt.NDArray[np.int64], bounds: npt.NDArray[np.int64], file: Any
) -> None:
    """Order the values of each run by row, where they lie; within a row their order is kept."""
    num_values = (int(indptr[-1]),)
    with closing(LocalFile(scratch / "rows")) as rows_file, closing(LocalFile(scratch / MATRIX)) as matrix_file:
        rows = FlatArray(rows_file, 0, layout.index_dtype, num_values)
        columns = FlatArray(matrix_file, layout.columns, layout.index_dtype, num_values)
        values = FlatArray(matrix_file, layout.values, layout.value_dtype, num_values)
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
            first, last = int(indptr[start]), int(indptr[stop])
            triple = (rows[first:last] - layout.index_dtype.type(start), columns[first:last], values[first:last])
            _, ordered = order_triples(*triple, np.arange(stop - start, dtype=np.int32), int(stop - start))
            for array, offset in zip(ordered[1:], (layout.columns, layout.values), strict=True):
                _write(file, array, offset + first * array.itemsize)


def open_dealt(file: LocalFile, scratch: Path) -> tuple[FlatArray, FlatArray, FlatArray]:
    """``indptr`` [C+1], ``columns`` [N] and ``values`` [N] of the file that `deal_rows` gave for ``scratch``."""
    marker = json.loads((scratch / MARKER).read_text())
    shape, num_values = marker["shape"], marker["values"]
    layout = _layout(shape, num_values, np.dtype(marker["dtype"]))
    return (
        FlatArray(file, layout.indptr, np.dtype(np.int64), (shape[0] + 1,)),
        FlatArray(file, layout.columns, layout.index_dtype, (num_values,)),
        FlatArray(file, layout.values, layout.value_dtype, (num_values,)),
    )


def _is_complete(scratch: Path, shape: tuple[int, int], identity: dict[str, Any]) -> bool:
    try:
        marker = json.loads((scratch / MARKER).read_text())
    except (OSError, ValueError):
        return False
    return bool(marker["identity"] == json.loads(json.dumps(identity)) and marker["shape"] == list(shape))


def _write(file: Any, array: npt.NDArray[Any], offset: int) -> None:
    data = np.ascontiguousarray(array).data.cast("B") if len(array) else memoryview(b"")
    with name_file_in_errors(Path(file.name)):
        while data:
            count = os.pwrite(file.fileno(), data, offset)
            data, offset = data[count:], offset + count
