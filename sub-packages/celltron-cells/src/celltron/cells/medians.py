"""Non-zero medians of genes over a corpus, exact, in one pass over the counts and in bounded memory.

Every value on disk would take three times the store. Instead a sample of some ten thousand cells brackets the median of
each gene; in the pass over all cells the values below the bracket are only counted, and those inside it are kept. As
ranks are counted and not estimated, the median is exact, and a bracket that missed it is known: the genes concerned, if
there are any, are passed over again with all their values kept. Which cells are sampled follows from their number only;
medians do not depend on the sample, on the threads or on what was held in memory.

A sample of k values brackets the median by its order statistics at k / 2 -+ 5 sqrt(k) / 2: the number of sampled values
below the median is binomial, or narrower as no cell is drawn twice, with a standard deviation of sqrt(k) / 2, so that a
gene is missed once in 2 million. Kept are about 5 / sqrt(k) of a gene's values; with 20,000 genes and 1,600 of them in
a cell an eighth of all: 1 byte a non-zero count, a third of the store. A corpus of up to 25 million non-zero counts is
kept whole in memory.

Medians of medians are no medians, so tables cannot be merged: those of several stores are computed of their collection.

Memory, whatever the corpus: 2^25 values of 8 bytes held, 2^22 of 12 being read and 2^22 of 20 being ordered, 0.4 GB,
besides the genes' names and the cells, if some are chosen. C cells, G genes, K located cells.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from celltron.cells.compiled import compiled
from celltron.cells.median_runs import ValueRuns
from celltron.cells.memory import Addresses, addresses_of, array_at, like
from celltron.cells.reader import CellReader, Located
from celltron.cells.threads import map_in_order, num_workers
from celltron.core import InputError, KeyedPermutation, MedianTable, key_from

TARGET_TOTAL = 10_000.0
"""Counts are scaled to this total a cell before they are compared."""
CELLS_AT_ONCE = 1024
VALUES_AT_ONCE = 2**22
"""Non-zero counts that all threads together look at."""
DEVIATIONS = 5.0
SAMPLE_SEED = 0x6D656469616E73
SAMPLE_VALUES = 3 * 2**23
"""Some less than what `ValueRuns` holds in memory, as it is estimated from `PROBE_CELLS`."""
PROBE_CELLS = 256
RUNS_AT_ONCE = 8
"""Runs on disk that are read from together: what comes from afar is fetched by runs, and held while it is looked at."""
MOST_SAMPLED_CELLS = 2**22
Int64Array = npt.NDArray[np.int64]


class _Brackets(NamedTuple):
    """The values of each gene from ``lowest`` to ``highest``, both included, are kept; float64 [G]."""

    lowest: npt.NDArray[np.float64]
    highest: npt.NDArray[np.float64]


class _Tally(NamedTuple):
    """How many values each gene has, and how many are below its bracket; int64 [G]."""

    seen: Int64Array
    below: Int64Array


@compiled
def _sift(
    rows: Addresses,
    alike: tuple[npt.NDArray[Any], npt.NDArray[Any]],
    places: Int64Array,
    brackets: _Brackets,
    tally: _Tally,
    kept: tuple[npt.NDArray[np.uint32], npt.NDArray[np.float64]],
) -> int:
    """Count and keep the values of located cells; ``places`` are their genes' places in the reader's list.

    Returns:
        How many values are in ``kept``, which has room for all and one more; -1 - k when cell k is none that a store
        may have: a gene beyond the list, or a value that is not above zero and finite.
    """
    kept_genes, kept_values = kept
    num_kept = 0
    for k in range(rows.sizes.shape[0]):
        size, total = rows.sizes[k], rows.totals[k]
        if size > 0 and not total > 0.0:
            return -1 - k
        gene_index, counts = array_at(rows.indices[k], size, alike[0]), array_at(rows.counts[k], size, alike[1])
        for i in range(size):
            if np.uint64(gene_index[i]) >= np.uint64(places.shape[0]):
                return -1 - k
            gene = places[gene_index[i]]
            value = np.float64(counts[i]) / total * TARGET_TOTAL
            if not (value > 0.0 and value < np.inf):
                return -1 - k
            tally.seen[gene] += 1
            tally.below[gene] += value < brackets.lowest[gene]
            # Without a branch, which could not be predicted: the next value takes the place of one that is not kept.
            kept_genes[num_kept] = gene
            kept_values[num_kept] = value
            num_kept += (value >= brackets.lowest[gene]) & (value <= brackets.highest[gene])
    return num_kept


@dataclasses.dataclass(slots=True, kw_only=True)
class _Sieve:
    """Passes over the cells of a reader."""

    reader: CellReader
    workers: int
    scratch: str | Path | None
    progress: Callable[[int, int], None] | None
    places: list[Int64Array] = dataclasses.field(init=False)
    cells_read: int = 0
    cells_to_read: int = 0

    def __post_init__(self) -> None:
        same = np.arange(self.reader.num_genes, dtype=np.int64)
        self.places = [same if places is None else places for places in self.reader.gene_maps]

    def sift(self, cells: "_Cells", brackets: _Brackets, runs: ValueRuns) -> _Tally:
        """Pass over cells: what is in the brackets goes into ``runs``, all is counted."""
        tally = _Tally(*np.zeros((2, self.reader.num_genes), dtype=np.int64))

        def sift_some(start: int) -> tuple[int, _Tally]:
            part = cells.part(start, start + CELLS_AT_ONCE)
            counted = _Tally(*np.zeros((2, self.reader.num_genes), dtype=np.int64))
            for near in _near_each_other(self.reader, part):
                for located in self.reader.locate(near):
                    self._sift_located(near, located, brackets, counted, runs)
            return len(part), counted

        for num_cells, counted in map_in_order(sift_some, range(0, cells.num, CELLS_AT_ONCE), self.workers):
            for total, some in zip(tally, counted, strict=True):
                total += some
            self.cells_read += num_cells
            if self.progress is not None:
                self.progress(self.cells_read, self.cells_to_read)
        return tally

    def _sift_located(
        self, cells: Int64Array, located: Located, brackets: _Brackets, tally: _Tally, runs: ValueRuns
    ) -> None:
        rows, alike = addresses_of(located), (like(located.index_dtype), like(located.count_dtype))
        ends = np.cumsum(located.sizes)
        begin = 0
        while begin < len(ends):
            before = ends[begin - 1] if begin else 0
            end = max(begin + 1, int(np.searchsorted(ends, before + VALUES_AT_ONCE // self.workers, side="right")))
            room = int(ends[end - 1] - before) + 1
            kept = np.empty(room, dtype=np.uint32), np.empty(room, dtype=np.float64)
            some = Addresses._make(array[begin:end] for array in rows)
            num_kept = _sift(some, alike, self.places[located.member], brackets, tally, kept)
            if num_kept < 0:
                cell = int(cells[some.slots[-1 - num_kept]])
                raise InputError(
                    f"{self.reader.name} is damaged: cell {cell} has a gene that is not listed, or a count or total "
                    "that is not above zero; run celltron verify"
                )
            if num_kept:
                runs.add(kept[0][:num_kept].copy(), kept[1][:num_kept].copy())
            begin = end


class _Cells(NamedTuple):
    """``num`` cells, either those that were chosen, in rising order, or all."""

    num: int
    chosen: Int64Array | None

    def part(self, start: int, stop: int) -> Int64Array:
        """The cells at some places."""
        if self.chosen is not None:
            return self.chosen[start:stop]
        return np.arange(start, min(stop, self.num), dtype=np.int64)


def compute_medians(
    reader: CellReader,
    *,
    cells: npt.ArrayLike | None = None,
    workers: int | None = None,
    scratch: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MedianTable:
    """The median of count / total_counts x 10,000 over the cells where a gene is not zero, of all genes ever seen.

    In float64 and in this order of operations; of an even number of values the mean of the middle two.

    Args:
        reader: the corpus: a store, or a collection of stores, whose medians are those of all its cells.
        cells: the cells to use, one that comes twice counts twice; all otherwise.
        workers: threads; None takes one a processor. The medians do not depend on it.
        scratch: folder for values that do not fit in memory; None takes the system's for temporary files (TMPDIR).
        progress: called with (cells read, cells to read); the sample's cells are read twice.
    """
    chosen = None if cells is None else np.sort(reader.check_cells(cells))
    used = _Cells(len(reader) if chosen is None else len(chosen), chosen)
    sieve = _Sieve(reader=reader, workers=num_workers(workers), scratch=scratch, progress=progress)
    brackets = _all_open(reader.num_genes)
    sieve.cells_to_read = used.num
    sample = _sample(reader, used)
    if sample is not None:
        sieve.cells_to_read += sample.num
        with ValueRuns(reader.num_genes, scratch) as runs:
            brackets = _bracket(sieve.sift(sample, brackets, runs).seen, runs, sieve.workers)
    with ValueRuns(reader.num_genes, scratch) as runs:
        tally = sieve.sift(used, brackets, runs)
        medians, missed = _medians_of(tally, runs, sieve.workers)
    if missed.any():
        sieve.cells_to_read += used.num
        brackets = _Brackets(np.where(missed, 0.0, np.inf), np.full(reader.num_genes, np.inf))
        with ValueRuns(reader.num_genes, scratch) as runs:
            again, _ = _medians_of(sieve.sift(used, brackets, runs), runs, sieve.workers)
        medians[missed] = again[missed]
    seen = np.flatnonzero(tally.seen)
    if not len(seen):
        raise InputError(
            f"no gene has a count in the {used.num} cells asked of {reader.name}: no medians can be had, choose other "
            "cells"
        )
    gene_ids = reader.gene_ids
    return MedianTable([gene_ids[i] for i in seen], medians[seen])


def _all_open(num_genes: int) -> _Brackets:
    return _Brackets(np.zeros(num_genes), np.full(num_genes, np.inf))


def _near_each_other(reader: CellReader, cells: Int64Array) -> list[Int64Array]:
    """Cut rising cells where they go on in other runs on disk."""
    runs = np.searchsorted(reader.disk_runs, cells, side="right") // RUNS_AT_ONCE
    return np.split(cells, np.flatnonzero(np.diff(runs)) + 1)


def _sample(reader: CellReader, used: _Cells) -> _Cells | None:
    """Cells that bracket the medians of all: as many as fit in memory, at most an eighth; None when all fit."""
    order = KeyedPermutation(used.num, key_from(SAMPLE_SEED, used.num))

    def first(num: int) -> Int64Array:
        places = np.sort(order(np.arange(min(num, used.num), dtype=np.int64)))
        return places if used.chosen is None else used.chosen[places]

    probe = first(PROBE_CELLS)
    near = _near_each_other(reader, probe)
    values = sum(int(located.sizes.sum()) for some in near for located in reader.locate(some))
    num = int(SAMPLE_VALUES * len(probe) / max(1, values))
    if num >= used.num:
        return None
    num = max(1, min(num, used.num // 8, MOST_SAMPLED_CELLS))
    return _Cells(num, first(num))


def _bracket(seen: Int64Array, runs: ValueRuns, workers: int) -> _Brackets:
    """Brackets from a sample that was kept whole; open for genes of which too few values are in it."""
    margin = np.ceil(DEVIATIONS * np.sqrt(seen) / 2).astype(np.int64)
    low, high = (seen - 1) // 2 - margin, seen // 2 + margin
    is_bracketed = (low >= 0) & (high < seen)
    selected = runs.select(np.where(is_bracketed, low, -1), high, workers)
    lowest, highest = _all_open(len(seen))
    return _Brackets(np.where(is_bracketed, selected[:, 0], lowest), np.where(is_bracketed, selected[:, 1], highest))


def _medians_of(tally: _Tally, runs: ValueRuns, workers: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """The median of each gene, float64 [G], and whether its bracket missed it, bool [G]."""
    low, high = (tally.seen - 1) // 2 - tally.below, tally.seen // 2 - tally.below
    kept = runs.counts()
    missed = (tally.seen > 0) & ((low < 0) | (high >= kept))
    selected = runs.select(np.where((tally.seen > 0) & ~missed, low, -1), high, workers)
    return (selected[:, 0] + selected[:, 1]) / 2, missed
