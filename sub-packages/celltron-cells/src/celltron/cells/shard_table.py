"""The shards of one store or of many as one run of cells: where the counts of any of these cells lie.

S shards, K cells asked for.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from celltron.cells.compiled import compiled
from celltron.cells.memory import address_of, array_at
from celltron.cells.reader import Located
from celltron.cells.shard import Shard
from celltron.core import InputError

_UINT64, _FLOAT64 = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.float64)


class _Columns(NamedTuple):
    """For each shard its first cell [S+1], its number of counts, the addresses of its arrays and their item sizes."""

    starts: npt.NDArray[np.int64]
    nnz: npt.NDArray[np.int64]
    indptr: npt.NDArray[np.uint64]
    indices: npt.NDArray[np.uint64]
    counts: npt.NDArray[np.uint64]
    totals: npt.NDArray[np.uint64]
    index_bytes: npt.NDArray[np.uint64]
    count_bytes: npt.NDArray[np.uint64]


class _Places(NamedTuple):
    """What `_locate` finds out about each cell; see `Located`."""

    indices: npt.NDArray[np.uint64]
    counts: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.int64]
    totals: npt.NDArray[np.float64]


@compiled
def _locate(
    cells: npt.NDArray[np.int64],
    shard_of: npt.NDArray[np.int64],
    table: _Columns,
    ends_like: npt.NDArray[np.uint64],
    totals_like: npt.NDArray[np.float64],
    out: _Places,
) -> int:
    """Fill ``out``; returns the first shard with a cell that ends where the shard does not, or -1."""
    for k in range(cells.shape[0]):
        i = shard_of[k]
        local = cells[k] - table.starts[i]
        ends = array_at(table.indptr[i] + np.uint64(8 * local), 2, ends_like)
        begin, end = np.int64(ends[0]), np.int64(ends[1])
        if begin < 0 or end < begin or end > table.nnz[i]:
            return int(i)
        out.indices[k] = table.indices[i] + np.uint64(begin) * table.index_bytes[i]
        out.counts[k] = table.counts[i] + np.uint64(begin) * table.count_bytes[i]
        out.sizes[k] = end - begin
        out.totals[k] = array_at(table.totals[i] + np.uint64(8 * local), 1, totals_like)[0]
    return -1


class ShardTable:
    """Finds cells in S shards, which are opened when the first of their cells is asked for and stay open.

    Args:
        entries: for each shard its ``cells``, ``nnz`` and the types of its ``indices`` and ``counts``.
        open_shard: maps a shard by its number; its ``totals`` must be there.
        gene_lists: int64 [S], which gene list the indices of each shard mean.
    """

    def __init__(
        self,
        entries: Sequence[Mapping[str, Any]],
        open_shard: Callable[[int], Shard],
        gene_lists: npt.NDArray[np.int64],
    ) -> None:
        def item_bytes(name: str) -> npt.NDArray[np.uint64]:
            return np.array([np.dtype(entry[name]).itemsize for entry in entries], dtype=np.uint64)

        def unknown() -> npt.NDArray[np.uint64]:
            return np.zeros(len(entries), dtype=np.uint64)

        self._columns = _Columns(
            starts=np.cumsum([0] + [int(entry["cells"]) for entry in entries], dtype=np.int64),
            nnz=np.array([int(entry["nnz"]) for entry in entries], dtype=np.int64),
            indptr=unknown(),
            indices=unknown(),
            counts=unknown(),
            totals=unknown(),
            index_bytes=item_bytes("indices"),
            count_bytes=item_bytes("counts"),
        )
        kinds = [
            (str(entry["indices"]), str(entry["counts"]), int(genes))
            for entry, genes in zip(entries, gene_lists, strict=True)
        ]
        self._kinds = sorted(set(kinds))
        number_of = {kind: number for number, kind in enumerate(self._kinds)}
        self._kind_of = np.array([number_of[kind] for kind in kinds], dtype=np.int64)
        self._open_shard = open_shard
        self._open: dict[int, Shard] = {}
        self._is_open = np.zeros(len(entries), dtype=np.bool_)
        self._lock = threading.Lock()

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """int64 [S+1]: the first cell of each shard, then the number of all cells."""
        return self._columns.starts

    def locate(self, cells: npt.NDArray[np.int64]) -> list[Located]:
        """Where the counts of cells (checked numbers) lie: one `Located` for each pair of types and gene list."""
        shard_of = np.searchsorted(self.starts, cells, side="right") - 1
        is_open = self._is_open[shard_of]
        if not is_open.all():
            for i in np.unique(shard_of[~is_open]).tolist():
                self.shard(i)
        places = _Places(
            np.empty(len(cells), dtype=np.uint64),
            np.empty(len(cells), dtype=np.uint64),
            np.empty(len(cells), dtype=np.int64),
            np.empty(len(cells), dtype=np.float64),
        )
        bad = _locate(cells, shard_of, self._columns, _UINT64, _FLOAT64, places)
        if bad >= 0:
            raise InputError(
                f"{self._open[bad].folder / 'indptr.bin'} is damaged: a cell ends where the shard does not; run "
                "celltron verify"
            )
        return [
            Located(slots, *found, *self._kinds[number][:2], self._kinds[number][2], (self,))
            for number, slots, found in _by_kind(self._kind_of[shard_of], places)
        ]

    def shard(self, i: int) -> Shard:
        """The mapped arrays of a shard."""
        with self._lock:
            if not self._is_open[i]:
                self._open[i] = shard = self._open_shard(i)
                assert shard.totals is not None, f"no totals of {shard.folder}"
                self._columns.indptr[i] = address_of(shard.indptr)
                self._columns.indices[i] = address_of(shard.indices)
                self._columns.counts[i] = address_of(shard.counts)
                self._columns.totals[i] = address_of(shard.totals)
                self._is_open[i] = True  # last: other threads look at it without the lock
            return self._open[i]


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
