"""Where the counts of cells lie, of runs of cells whose arrays are in memory: shards of a store, blocks of tar shards.

R runs, K cells asked for.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from celltron.cells.compiled import compiled
from celltron.cells.memory import array_at
from celltron.cells.reader import Located
from celltron.core import InputError

_FLOAT64 = np.empty(0, dtype=np.float64)


class RowTable(NamedTuple):
    """For each run its first cell, its number of counts, the addresses of its arrays, their item sizes, its kind."""

    starts: npt.NDArray[np.int64]
    nnz: npt.NDArray[np.int64]
    indptr: npt.NDArray[np.uint64]
    indices: npt.NDArray[np.uint64]
    counts: npt.NDArray[np.uint64]
    totals: npt.NDArray[np.uint64]
    index_bytes: npt.NDArray[np.uint64]
    count_bytes: npt.NDArray[np.uint64]
    kinds: npt.NDArray[np.int64]
    """Which of the kinds of `locate_rows` the run is of."""


class _Places(NamedTuple):
    """What `_locate` finds out about each cell; see `Located`."""

    indices: npt.NDArray[np.uint64]
    counts: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.int64]
    totals: npt.NDArray[np.float64]


@compiled
def _locate(
    cells: npt.NDArray[np.int64],
    run_of: npt.NDArray[np.int64],
    table: RowTable,
    ends_like: npt.NDArray[Any],
    totals_like: npt.NDArray[np.float64],
    out: _Places,
) -> int:
    """Fill ``out``; returns the first run with a cell that ends where the run does not, or -1."""
    for k in range(cells.shape[0]):
        i = run_of[k]
        local = cells[k] - table.starts[i]
        ends = array_at(table.indptr[i] + np.uint64(ends_like.itemsize * local), 2, ends_like)
        begin, end = np.int64(ends[0]), np.int64(ends[1])
        if begin < 0 or end < begin or end > table.nnz[i]:
            return int(i)
        out.indices[k] = table.indices[i] + np.uint64(begin) * table.index_bytes[i]
        out.counts[k] = table.counts[i] + np.uint64(begin) * table.count_bytes[i]
        out.sizes[k] = end - begin
        out.totals[k] = array_at(table.totals[i] + np.uint64(8 * local), 1, totals_like)[0]
    return -1


def locate_rows(
    cells: npt.NDArray[np.int64],
    run_of: npt.NDArray[np.int64],
    table: RowTable,
    ends_like: npt.NDArray[Any],
    kinds: Sequence[tuple[str, str, int]],
    *,
    memory: tuple[object, ...],
    damage: Callable[[int], InputError],
) -> list[Located]:
    """Where the counts of cells lie: one `Located` for each kind that occurs, its slots rising.

    Args:
        cells: int64 [K], checked numbers.
        run_of: int64 [K], the run that each is in, whose arrays are in memory.
        table: the runs.
        ends_like: an empty array of the type in which rows end.
        kinds: types of gene indices and counts, and the number of the gene list.
        memory: keeps the arrays where they are.
        damage: the error for a run of which a cell ends where the run does not.
    """
    places = _Places(
        np.empty(len(cells), dtype=np.uint64),
        np.empty(len(cells), dtype=np.uint64),
        np.empty(len(cells), dtype=np.int64),
        np.empty(len(cells), dtype=np.float64),
    )
    bad = _locate(cells, run_of, table, ends_like, _FLOAT64, places)
    if bad >= 0:
        raise damage(bad)
    return [
        Located(slots, *found, *kinds[number], memory) for number, slots, found in _by_kind(table.kinds[run_of], places)
    ]


def _by_kind(kind_of: npt.NDArray[np.int64], places: _Places) -> list[tuple[int, npt.NDArray[np.int64], _Places]]:
    """Each kind that occurs, its slots in rising order, and what was found out about them."""
    if len(kind_of) == 0:
        return []
    if (kind_of == kind_of[0]).all():
        return [(int(kind_of[0]), np.arange(len(kind_of), dtype=np.int64), places)]
    order = np.argsort(kind_of, kind="stable")
    bounds = [0, *(np.flatnonzero(np.diff(kind_of[order])) + 1), len(order)]
    indices, counts, sizes, totals = places
    found = []
    for begin, end in pairwise(bounds):
        slots = order[begin:end]
        part = _Places(indices[slots], counts[slots], sizes[slots], totals[slots])
        found.append((int(kind_of[slots[0]]), slots, part))
    return found
