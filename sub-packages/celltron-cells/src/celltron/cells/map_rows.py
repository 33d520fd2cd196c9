"""Rows of source counts, checked and brought to the store's genes.

Most blocks are plain: small whole counts, the genes of every row rising. They have a kernel of their own, which gives
up at the first value that is not; such a block is done again by the kernel that knows everything.

C cells of a block, N stored values of the block, G genes of the store, K columns (genes) of the source.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from celltron.cells.compiled import compiled
from celltron.cells.ingest.source import RowBlock

FINE, NEGATIVE, NOT_FINITE, NOT_INTEGER, TOO_LARGE, BAD_COLUMN = range(6)
LARGEST_EXACT = 2.0**53 - 1.0
LARGEST_PLAIN = 2.0**16 - 1.0
MOST_PLAIN_GENES = 2**16
COUNT_DTYPES = ("uint8", "uint16", "uint32", "uint64", "float32")
"""Types of counts, each wider than those before; a fraction needs the last."""
INDEX_DTYPES = ("uint16", "uint32")


def index_dtype(num_genes: int) -> str:
    """The smallest unsigned type for the places of ``num_genes`` genes."""
    return "uint16" if num_genes <= 1 << 16 else "uint32"


def count_dtype(largest: float, *, is_whole: bool) -> str:
    """The smallest unsigned type that holds whole numbers up to ``largest``; float32 where they are not whole."""
    if not is_whole:
        return "float32"
    return next(name for name in COUNT_DTYPES[:-1] if largest <= np.iinfo(name).max)


class Types(NamedTuple):
    """The types of gene indices and counts, by name."""

    indices: str = INDEX_DTYPES[0]
    counts: str = COUNT_DTYPES[0]


def widest(first: Types, second: Types) -> Types:
    """The smaller of the types that hold what both hold; whole counts among fractions become float32."""
    return Types(
        max(first.indices, second.indices, key=INDEX_DTYPES.index),
        max(first.counts, second.counts, key=COUNT_DTYPES.index),
    )


class MappedRows(NamedTuple):
    """Rows in the store's genes: strictly rising gene indices in each row, counts above zero.

    ``ends`` int64 [C], where each row ends; ``genes`` (uint16 or int32) and ``counts`` (uint16 or float64), one for
    each value kept; ``totals`` float64 [C], the sum over all columns of the source row, unmapped ones too; ``unmapped``
    is the part of them that no gene took; ``types`` are the smallest that hold genes and counts.
    """

    ends: npt.NDArray[np.int64]
    genes: npt.NDArray[np.integer]
    counts: npt.NDArray[np.generic]
    totals: npt.NDArray[np.float64]
    unmapped: float
    types: Types


@dataclass(frozen=True, slots=True, kw_only=True)
class BadValue:
    """The first value of a block that is not a count: what is wrong, and its row and place in the block."""

    problem: int
    row: int
    place: int


class _Block(NamedTuple):
    indptr: npt.NDArray[np.int64]
    columns: npt.NDArray[Any]
    values: npt.NDArray[Any]
    gene_of_column: npt.NDArray[np.int32]


class _Rows(NamedTuple):
    """As in `MappedRows`, with room for all values of the block."""

    ends: npt.NDArray[np.int64]
    genes: npt.NDArray[Any]
    counts: npt.NDArray[Any]
    totals: npt.NDArray[np.float64]


class _Result(NamedTuple):
    """What a kernel met: a problem with its row and place, or none, and then the sum that no gene took."""

    problem: int
    row: int
    place: Any
    unmapped: float
    is_whole: bool


class Room(NamedTuple):
    """A sum for each gene, and a bit for each gene that is in the row; ``bit_of`` finds the place of a lone bit."""

    sums: npt.NDArray[np.float64]
    seen: npt.NDArray[np.uint64]
    bit_of: npt.NDArray[np.int64]


LONE_BIT = np.uint64(0x03F79D71B4CB0A89)
"""A De Bruijn sequence: the six bits on top of ``LONE_BIT << n`` differ for every n below 64."""


def make_room(num_genes: int) -> Room:
    """What `map_rows` works in, sums and bits zero before and after; one for each thread."""
    bit_of = np.empty(64, dtype=np.int64)
    bits = np.arange(64, dtype=np.uint64)
    bit_of[(LONE_BIT << bits) >> np.uint64(58)] = bits
    return Room(np.zeros(num_genes, dtype=np.float64), np.zeros(num_genes // 64 + 1, dtype=np.uint64), bit_of)


@compiled
def _problem_of(value: float, allow_floats: bool) -> int:
    if not np.isfinite(value):
        return NOT_FINITE
    if value < 0.0:
        return NEGATIVE
    if value != np.floor(value):
        return FINE if allow_floats else NOT_INTEGER
    return TOO_LARGE if value > LARGEST_EXACT else FINE


@compiled
def _sum_row(source: _Block, row: int, room: Room, out: _Rows, end: Any) -> tuple[int, Any, bool]:
    """Order a row by gene and add up what falls on one gene; its values have been checked one by one.

    Returns:
        The problem, the row's new end, and whether all its counts are whole.
    """
    sums, seen, bit_of = room
    one = np.uint64(1)
    problem, is_whole = FINE, True
    for place in range(np.uint64(source.indptr[row]), np.uint64(source.indptr[row + 1])):
        gene: Any = np.int64(source.gene_of_column[np.uint64(source.columns[place])])
        if gene >= 0 and source.values[place] != 0:
            sums[np.uint64(gene)] += source.values[place]
            seen[np.uint64(gene >> 6)] |= one << np.uint64(gene & 63)
    for word in range(seen.shape[0]):
        bits = seen[word]
        while bits != 0:
            lone = bits & (~bits + one)
            bits ^= lone
            gene = word * 64 + bit_of[(lone * LONE_BIT) >> np.uint64(58)]
            value = sums[gene]
            sums[gene] = 0.0
            if value > LARGEST_EXACT:
                problem = TOO_LARGE
            if np.float32(value) != 0.0:
                is_whole = is_whole and value == np.floor(value)
                out.genes[end], out.counts[end] = gene, value
                end += one
        seen[word] = 0
    return problem, end, is_whole


@compiled
def _map_rows(source: _Block, allow_floats: bool, room: Room, out: _Rows) -> _Result:
    """Fill ``out``."""
    indptr, columns, values, gene_of_column = source
    genes, counts = out.genes, out.counts
    unmapped = 0.0
    all_whole: Any = True
    end: Any = np.uint64(0)  # unsigned: numba need not ask whether it counts from the back
    for row in range(indptr.shape[0] - 1):
        begin = end
        total = 0.0
        last: Any = np.int64(-1)
        is_sorted: Any = True
        is_whole: Any = True
        for place in range(np.uint64(indptr[row]), np.uint64(indptr[row + 1])):
            column = columns[place]
            if column < 0 or column >= gene_of_column.shape[0]:
                return _Result(BAD_COLUMN, row, np.int64(place), 0.0, True)
            value: Any = np.float64(values[place])
            if value == 0.0:
                continue
            gene: Any = np.int64(gene_of_column[np.uint64(column)])
            if not (1.0 <= value <= LARGEST_EXACT and value == np.float64(np.int64(value))):
                problem = _problem_of(value, allow_floats)
                if problem != FINE:
                    return _Result(problem, row, np.int64(place), 0.0, True)
                if np.float32(value) == 0.0:  # too small to be stored
                    gene = np.int64(-1)
                is_whole = is_whole and gene < 0
            total += value
            if gene < 0:
                unmapped += value
            else:
                is_sorted = is_sorted and gene > last
                last = gene
                genes[end], counts[end] = gene, value
                end += np.uint64(1)
        if not is_sorted:
            problem, end, is_whole = _sum_row(source, row, room, out, begin)
            if problem != FINE:
                return _Result(problem, row, np.int64(indptr[row]), 0.0, True)
        all_whole = all_whole and is_whole
        out.ends[row] = end
        out.totals[row] = total
    return _Result(FINE, 0, np.int64(0), unmapped, all_whole)


@compiled
def _are_small_counts(columns: npt.NDArray[Any], values: npt.NDArray[Any], num_columns: int) -> bool:
    """Whether every column exists and every value is a whole number from 0 to 65,535."""
    is_other = False
    for i in range(columns.shape[0]):  # without a branch, so that many are compared at once
        value = values[i]
        is_other |= (value < 0) | (value > LARGEST_PLAIN) | (value != np.floor(value))  # NaN differs from itself
        is_other |= np.uint64(columns[i]) >= np.uint64(num_columns)
    return not is_other


@compiled
def _keep_some(
    columns: npt.NDArray[Any],
    values: npt.NDArray[Any],
    gene_of_column: npt.NDArray[np.int32],
    genes: npt.NDArray[np.uint16],
    counts: npt.NDArray[np.uint16],
) -> int:
    """Write the genes and counts of a row's values that a gene takes and that are not zero; returns their number."""
    num = np.uint64(0)
    for i in range(columns.shape[0]):  # without a branch, which could not be predicted
        gene, count = gene_of_column[np.uint64(columns[i])], np.int32(values[i])
        genes[num], counts[num] = np.uint16(gene), np.uint16(count)
        num += np.uint64((gene >= 0) & (count > 0))
    return int(num)


@compiled
def _falls(genes: npt.NDArray[np.uint16]) -> bool:
    """Whether a gene is not above the one before it."""
    falls = False
    for i in range(1, genes.shape[0]):
        falls |= genes[i] <= genes[i - 1]
    return falls


@compiled
def _sum(counts: npt.NDArray[Any]) -> int:
    """The sum of whole counts below 2^31."""
    total = np.int64(0)
    for i in range(counts.shape[0]):
        total += np.int32(counts[i])
    return int(total)


@compiled
def _map_plain_rows(source: _Block, out: _Rows) -> float:
    """Fill ``out``; returns the sum that no gene took, -1 where a row is not plain."""
    unmapped = end = 0
    for row in range(source.indptr.shape[0] - 1):
        first, size = source.indptr[row], source.indptr[row + 1] - source.indptr[row]
        columns, values = source.columns[first : first + size], source.values[first : first + size]
        if not _are_small_counts(columns, values, source.gene_of_column.shape[0]):
            return -1.0
        genes, counts = out.genes[end : end + size], out.counts[end : end + size]
        kept = _keep_some(columns, values, source.gene_of_column, genes, counts)
        if _falls(genes[:kept]):
            return -1.0
        total = _sum(values)
        end += kept
        out.ends[row], out.totals[row] = end, total
        unmapped += total - _sum(counts[:kept])
    return float(unmapped)


@compiled
def count_genes(genes: npt.NDArray[Any], num_cells: npt.NDArray[np.int64]) -> None:
    """Count in ``num_cells`` [G] the rows in which each gene is; ``genes`` has a gene once a row."""
    for gene in genes:
        num_cells[gene] += 1


def map_rows(
    block: RowBlock, gene_of_column: npt.NDArray[np.int32], room: Room, *, allow_floats: bool = False
) -> MappedRows | BadValue:
    """Check every value and add up the columns that fall on one gene.

    Explicit zeros are dropped, and what float32 holds as zero.

    Args:
        block: columns in any order, repeats allowed (they add up).
        gene_of_column: int32 [K], the store's gene of a column, -1 where it has none.
        room: from `make_room`.
        allow_floats: Accept values that are not whole numbers.
    """
    source = _Block(block.indptr, _as_columns(block.columns), _as_values(block.values), gene_of_column)
    if len(room.sums) <= MOST_PLAIN_GENES:
        out = _room_for(block, "uint16", "uint16")
        unmapped = _map_plain_rows(source, out)
        if unmapped >= 0:
            return _mapped(out, unmapped, is_whole=True)
    out = _room_for(block, "int32", "float64")
    found = _map_rows(source, allow_floats, room, out)
    if found.problem != FINE:
        return BadValue(problem=found.problem, row=found.row, place=int(found.place))
    return _mapped(out, found.unmapped, is_whole=found.is_whole)


def _room_for(block: RowBlock, index_type: str, count_type: str) -> _Rows:
    size, num_rows = len(block.columns), len(block.indptr) - 1
    return _Rows(
        np.zeros(num_rows, dtype=np.int64),
        np.empty(size, dtype=index_type),
        np.empty(size, dtype=count_type),
        np.zeros(num_rows, dtype=np.float64),
    )


def _mapped(out: _Rows, unmapped: float, *, is_whole: bool) -> MappedRows:
    end = int(out.ends[-1]) if len(out.ends) else 0
    genes, counts = out.genes[:end], out.counts[:end]
    types = Types(
        index_dtype(int(genes.max(initial=0)) + 1), count_dtype(float(counts.max(initial=0)), is_whole=is_whole)
    )
    return MappedRows(out.ends, genes, counts, out.totals, unmapped, types)


def check_values(block: RowBlock, num_columns: int, *, allow_floats: bool) -> BadValue | None:
    """The first value of a block that is not a count, if there is one."""
    nowhere = np.full(num_columns, -1, dtype=np.int32)
    found = map_rows(block, nowhere, make_room(0), allow_floats=allow_floats)
    return found if isinstance(found, BadValue) else None


def _as_columns(columns: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return columns if columns.dtype == np.int32 else columns.astype(np.int64, copy=False)


def _as_values(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Few types, so that few kernels are compiled: float32 where it holds every value of the type, else float64."""
    is_exact = np.can_cast(values.dtype, np.float32, "safe")
    return values.astype(np.float32 if is_exact else np.float64, copy=False)
