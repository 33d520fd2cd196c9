"""The compiled ranking against a plain sort, where rounding is close and where keys are too short."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celltron.cells.memory import Addresses, address_of, like
from celltron.cells.rank_kernel import MOST_PLACES, Frame, GeneTokens, rank_cells


def ranked(
    cells: list[tuple[np.ndarray, np.ndarray]], median: np.ndarray, token: np.ndarray, max_length: int
) -> list[list[int]]:
    """The kernel's tokens of cells given as gene indices and counts, laid out one after the other."""
    sizes = np.array([len(genes) for genes, _ in cells], dtype=np.int64)
    genes = np.concatenate([genes for genes, _ in cells])
    counts = np.concatenate([counts for _, counts in cells])
    begins = np.cumsum(sizes) - sizes
    rows = Addresses(
        slots=np.arange(len(cells)),
        indices=(address_of(genes) + begins * genes.itemsize).astype(np.uint64),
        counts=(address_of(counts) + begins * counts.itemsize).astype(np.uint64),
        sizes=sizes,
        totals=np.array([counts.sum(dtype=np.float64) for _, counts in cells]),
    )
    tables = GeneTokens(token.astype(np.int32), median, np.where(token >= 0, 1.0 / median, 0.0))
    tokens, lengths = np.full(sizes.sum(), -7, dtype=np.int32), np.zeros(len(cells), dtype=np.int32)
    types = like(genes.dtype.name), like(counts.dtype.name)
    assert rank_cells(rows, *types, tables, Frame(max_length, -1, -1), begins, (tokens, lengths)) == -1
    return [tokens[begin : begin + length].tolist() for begin, length in zip(begins, lengths, strict=True)]


def plainly_ranked(
    cells: list[tuple[np.ndarray, np.ndarray]], median: np.ndarray, token: np.ndarray, max_length: int
) -> list[list[int]]:
    """Every score by the formula, sorted by falling score and rising token."""
    result = []
    for genes, counts in cells:
        score = counts.astype(np.float64) / counts.sum(dtype=np.float64) * 10_000.0 / median[genes]
        pairs = sorted((-s, t) for s, t in zip(score.tolist(), token[genes].tolist(), strict=True) if t >= 0)
        result.append([t for _, t in pairs[:max_length]])
    return result


def random_cells(
    random: np.random.Generator, num_genes: int, num_cells: int, most: int, dtype: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    cells = []
    for _ in range(num_cells):
        size = int(random.integers(0, min(num_genes, most) + 1))
        genes = np.sort(random.permutation(num_genes)[:size])
        cells.append((genes.astype(np.uint16 if num_genes <= 65536 else np.uint32), random.integers(1, 9, size)))
    return [(genes, counts.astype(dtype)) for genes, counts in cells]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0, 1, 2, 3, 64, 2**20, 2**40, 2**51]),
    dtype=st.sampled_from(["uint8", "uint16", "float32"]),
    max_length=st.sampled_from([1, 5, 40, 2048]),
)
def test_medians_that_differ_in_their_last_bits(seed: int, spread: int, dtype: str, max_length: int) -> None:
    """Medians a few units in the last place apart: products round to a wrong order, the exact scores decide."""
    random = np.random.default_rng(seed)
    num_genes = 300
    bits = np.float64(2.7).view(np.uint64) + random.integers(0, spread + 1, num_genes).astype(np.uint64)
    median = bits.view(np.float64) * random.choice([1.0, 2.0, 3.0], num_genes)
    token = random.permutation(num_genes) + 2
    token[random.random(num_genes) < 0.2] = -1
    cells = random_cells(random, num_genes, 6, 250, dtype)
    assert ranked(cells, median, token, max_length) == plainly_ranked(cells, median, token, max_length)


@pytest.mark.parametrize("size", [1, 2, MOST_PLACES - 1, MOST_PLACES, MOST_PLACES + 1, 70_000])
def test_cells_of_every_size(size: int) -> None:
    random = np.random.default_rng(size)
    num_genes = 80_000
    median = random.lognormal(0.0, 2.0, num_genes).round(2) + 0.01  # with many equal ones
    token = random.permutation(num_genes) + 2
    genes = np.sort(random.permutation(num_genes)[:size]).astype(np.uint32)
    cells = [(genes, random.integers(1, 300, size).astype(np.uint16))]
    assert ranked(cells, median, token, 100_000) == plainly_ranked(cells, median, token, 100_000)


def test_scores_of_every_magnitude_and_a_cell_without_a_token() -> None:
    random = np.random.default_rng(0)
    num_genes = 500
    median = 10.0 ** random.uniform(-15, 15, num_genes)
    token = np.arange(num_genes) + 2
    token[:100] = -1
    everything = (np.arange(num_genes, dtype=np.uint16), random.integers(1, 2**40, num_genes).astype(np.float32))
    unknown = (np.arange(100, dtype=np.uint16), np.ones(100, dtype=np.float32))
    nothing = (np.zeros(0, dtype=np.uint16), np.zeros(0, dtype=np.float32))
    cells = [unknown, everything, nothing, everything]
    assert ranked(cells, median, token, 2048) == plainly_ranked(cells, median, token, 2048)
    assert [len(cell) for cell in ranked(cells, median, token, 2048)] == [0, 400, 0, 400]


def test_all_scores_equal() -> None:
    """One run of equal scores as long as the cell: the order is that of the tokens."""
    token = np.random.default_rng(1).permutation(3000) + 2
    cells = [(np.arange(3000, dtype=np.uint16), np.ones(3000, dtype=np.uint8))]
    assert ranked(cells, np.full(3000, 1.5), token, 2048) == [sorted(token.tolist())[:2048]]


@pytest.mark.parametrize(("gene", "total", "code"), [(10, 5.0, 1), (3, 0.0, -3), (3, np.nan, -3)])
def test_damage_is_reported_by_slot(gene: int, total: float, code: int) -> None:
    genes, counts = np.array([3, gene], dtype=np.uint16), np.array([5, 5], dtype=np.uint8)
    rows = Addresses(
        slots=np.arange(2),
        indices=np.array([address_of(genes), address_of(genes) + 2], dtype=np.uint64),
        counts=np.array([address_of(counts), address_of(counts) + 1], dtype=np.uint64),
        sizes=np.ones(2, dtype=np.int64),
        totals=np.array([5.0, total]),
    )
    tables = GeneTokens(np.arange(10, dtype=np.int32), np.ones(10), np.ones(10))
    out = np.zeros(2, dtype=np.int32), np.zeros(2, dtype=np.int32)
    assert rank_cells(rows, like("uint16"), like("uint8"), tables, Frame(8, -1, -1), np.arange(2), out) == code
