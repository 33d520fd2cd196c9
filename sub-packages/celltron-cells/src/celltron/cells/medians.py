"""Non-zero medians of genes over a corpus, exact, in bounded memory."""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from celltron.cells.compiled import compiled
from celltron.cells.store import CellStore, Rows
from celltron.core import InputError, MedianTable

TARGET_TOTAL = 10_000.0
"""Counts are scaled to this total a cell before they are compared."""
VALUES_IN_MEMORY = 2**25
CELLS_AT_ONCE = 4096


@compiled
def _collect(
    rows: Rows,
    totals: npt.NDArray[np.float64],
    first_gene: int,
    ends: npt.NDArray[np.int64],
    values: npt.NDArray[np.float64],
) -> None:
    """Put the scaled counts of each gene from ``first_gene`` on into its own stretch of ``values``, at its ``ends``."""
    indptr, gene_index, counts = rows
    for cell in range(totals.shape[0]):
        for place in range(indptr[cell], indptr[cell + 1]):
            gene = np.int64(gene_index[place]) - first_gene
            if gene >= 0 and gene < ends.shape[0]:
                values[ends[gene]] = np.float64(counts[place]) / totals[cell] * TARGET_TOTAL
                ends[gene] += 1


def compute_medians(
    store: CellStore,
    *,
    cells: npt.ArrayLike | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MedianTable:
    """The median of count / total_counts x 10,000 over the cells where a gene is not zero, of all genes ever seen.

    One pass counts, then one pass collects for each block of genes whose values fit in memory (2^25, or one gene).

    Args:
        store: the corpus.
        cells: the cells to use; all otherwise.
        progress: called with (cells read, cells to read over all passes).
    """
    chosen = np.arange(len(store), dtype=np.int64) if cells is None else np.sort(store.check_cells(cells))
    per_gene = np.zeros(store.num_genes, dtype=np.int64)
    read = 0
    for part, rows in _passes(store, chosen):
        if len(rows.gene_index) and int(rows.gene_index.max()) >= store.num_genes:
            raise InputError(f"{store.path} is damaged: it has counts of genes that it does not list; convert it again")
        per_gene += np.bincount(rows.gene_index, minlength=store.num_genes)
        read += len(part)
        if progress is not None:
            progress(read, 2 * len(chosen))
    if not per_gene.any():
        raise InputError(
            f"no gene has a count in the {len(chosen)} cells asked of {store.path}: no medians can be had, choose "
            "other cells"
        )
    bounds = _gene_bounds(per_gene)
    total = len(chosen) * len(bounds)
    medians = np.full(store.num_genes, np.nan)
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        begins = np.concatenate([[0], np.cumsum(per_gene[first:last])])
        values = np.empty(begins[-1], dtype=np.float64)
        ends = begins[:-1].copy()
        for part, rows in _passes(store, chosen):
            _collect(rows, store.total_counts[part], first, ends, values)
            read += len(part)
            if progress is not None:
                progress(read, total)
        for i in range(last - first):
            if begins[i + 1] > begins[i]:
                medians[first + i] = np.median(values[begins[i] : begins[i + 1]])
    seen = np.flatnonzero(per_gene)
    return MedianTable([store.gene_ids[i] for i in seen], medians[seen])


def _passes(store: CellStore, chosen: npt.NDArray[np.int64]) -> Iterator[tuple[npt.NDArray[np.int64], Rows]]:
    for start in range(0, len(chosen), CELLS_AT_ONCE):
        part = chosen[start : start + CELLS_AT_ONCE]
        yield part, store.rows(part)


def _gene_bounds(per_gene: npt.NDArray[np.int64]) -> list[int]:
    """Cut the genes into runs of at most `VALUES_IN_MEMORY` values, or one gene: ``[0, …, G]``."""
    ends = np.concatenate([[0], np.cumsum(per_gene)])
    bounds = [0]
    while bounds[-1] < len(per_gene):
        stop = int(np.searchsorted(ends, ends[bounds[-1]] + VALUES_IN_MEMORY, side="right")) - 1
        bounds.append(max(stop, bounds[-1] + 1))
    return bounds
