"""Rows of source counts, checked and brought to the store's genes.

C cells of a block, N stored values of the block, G genes of the store, K columns (genes) of the source.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from celltron.cells.compiled import compiled

FINE, NEGATIVE, NOT_FINITE, NOT_INTEGER, TOO_LARGE, BAD_COLUMN = range(6)
LARGEST_EXACT = 2.0**53


def index_dtype(num_genes: int) -> str:
    """The smallest unsigned type for the places of ``num_genes`` genes."""
    return "uint16" if num_genes <= 1 << 16 else "uint32"


@dataclass(frozen=True, slots=True, kw_only=True)
class MappedRows:
    """Rows in the store's genes: strictly rising gene indices in each row, values above zero.

    ``indptr`` int64 [C+1]; ``genes`` uint16 or uint32 and ``values`` float64, one for each value kept; ``totals``
    float64 [C], the sum over all columns of the source row, unmapped ones too; ``unmapped_total`` is the part of them
    that no gene took; ``largest`` is the largest value, ``is_whole`` says that none has a fraction.
    """

    indptr: npt.NDArray[np.int64]
    genes: npt.NDArray[Any]
    values: npt.NDArray[np.float64]
    totals: npt.NDArray[np.float64]
    unmapped_total: float
    largest: float
    is_whole: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BadValue:
    """The first value of a block that is not a count: what is wrong, and its row and place in the block."""

    problem: int
    row: int
    place: int


class _Rows(NamedTuple):
    indptr: npt.NDArray[np.int64]
    places: npt.NDArray[Any]
    values: npt.NDArray[Any]


class _Scratch(NamedTuple):
    """One gene each: a sum, and whether the gene is in the row; ``seen_words`` is ``seen``, eight genes at a look."""

    sums: npt.NDArray[np.float64]
    seen: npt.NDArray[np.uint8]
    seen_words: npt.NDArray[np.uint64]


@compiled
def _problem_of(value: float, allow_floats: bool) -> int:
    if not np.isfinite(value):
        return NOT_FINITE
    if value < 0.0:
        return NEGATIVE
    if not allow_floats and value != np.floor(value):
        return NOT_INTEGER
    return TOO_LARGE if value > LARGEST_EXACT else FINE


@compiled
def _order_row(genes: npt.NDArray[Any], values: npt.NDArray[np.float64], begin: int, end: int, room: _Scratch) -> int:
    """Order a row by gene and add up what falls on one gene; returns its new end."""
    sums, seen, seen_words = room
    for k in range(begin, end):
        sums[genes[k]] += values[k]
        seen[genes[k]] = 1
    end = begin
    for word in range(seen_words.shape[0]):
        if seen_words[word] != 0:
            for gene in range(word * 8, word * 8 + 8):
                if seen[gene] != 0:
                    genes[end], values[end] = gene, sums[gene]
                    sums[gene], seen[gene] = 0.0, 0
                    end += 1
    return end


@compiled
def _map_rows_kernel(
    source: _Rows,
    gene_of_column: npt.NDArray[np.int64],
    num_genes: int,
    allow_floats: bool,
    out: _Rows,
    totals: npt.NDArray[np.float64],
) -> tuple[int, int, int, float]:
    """Fill ``out`` and ``totals``; returns the problem, its row and place, and the unmapped sum."""
    indptr, columns, values = source
    out_indptr, out_genes, out_values = out
    seen = np.zeros((num_genes + 7) // 8 * 8, dtype=np.uint8)
    room = _Scratch(np.zeros(num_genes, dtype=np.float64), seen, seen.view(np.uint64))
    unmapped_total = 0.0
    end = 0
    for row in range(indptr.shape[0] - 1):
        begin = end
        total = 0.0
        last = np.int64(-1)
        is_sorted = True
        for place in range(indptr[row], indptr[row + 1]):
            column = columns[place]
            if column < 0 or column >= gene_of_column.shape[0]:
                return BAD_COLUMN, row, place, 0.0
            value = np.float64(values[place])
            if value == 0.0:
                continue
            problem = _problem_of(value, allow_floats)
            if problem != FINE:
                return problem, row, place, 0.0
            total += value
            gene = gene_of_column[column]
            if gene < 0:
                unmapped_total += value
                continue
            is_sorted = is_sorted and gene > last
            last = gene
            out_genes[end], out_values[end] = gene, value
            end += 1
        if not is_sorted:
            end = _order_row(out_genes, out_values, begin, end, room)
        out_indptr[row + 1] = end
        totals[row] = total
    return FINE, 0, 0, unmapped_total


@compiled
def _extremes(values: npt.NDArray[np.float64]) -> tuple[float, bool]:
    """The largest value and whether all are whole."""
    largest, is_whole = 0.0, True
    for value in values:
        largest = max(largest, value)
        is_whole &= value == np.floor(value)
    return largest, is_whole


def map_rows(
    indptr: npt.NDArray[np.int64],
    columns: npt.NDArray[np.integer],
    values: npt.NDArray[np.generic],
    gene_of_column: npt.NDArray[np.int64],
    *,
    num_genes: int,
    allow_floats: bool = False,
) -> MappedRows | BadValue:
    """Check every value and add up the columns that fall on one gene.

    Args:
        indptr: int64 [C+1], starting at 0.
        columns: [N] column of the source of each stored value, in any order, repeats allowed (they add up).
        values: [N] the stored values; explicit zeros are dropped.
        gene_of_column: int64 [K], the store's gene of a column, -1 where it has none.
        num_genes: G.
        allow_floats: Accept values that are not whole numbers.
    """
    columns = columns if columns.dtype == np.int32 else columns.astype(np.int64, copy=False)
    values = (
        values if values.dtype in (np.dtype(np.float32), np.dtype(np.int64)) else values.astype(np.float64, copy=False)
    )
    num_rows = len(indptr) - 1
    out = _Rows(
        np.zeros(num_rows + 1, dtype=np.int64),
        np.empty(len(columns), dtype=index_dtype(num_genes)),
        np.empty(len(columns), dtype=np.float64),
    )
    totals = np.zeros(num_rows, dtype=np.float64)
    source = _Rows(indptr, columns, values)
    problem, row, place, unmapped_total = _map_rows_kernel(source, gene_of_column, num_genes, allow_floats, out, totals)
    if problem != FINE:
        return BadValue(problem=problem, row=row, place=place)
    end = out.indptr[-1]
    largest, is_whole = _extremes(out.values[:end])
    return MappedRows(
        indptr=out.indptr,
        genes=out.places[:end],
        values=out.values[:end],
        totals=totals,
        unmapped_total=unmapped_total,
        largest=largest,
        is_whole=is_whole,
    )
