import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from celltron.cells.ingest.source import RowBlock
from celltron.cells.map_rows import (
    BAD_COLUMN,
    COUNT_DTYPES,
    INDEX_DTYPES,
    NEGATIVE,
    NOT_FINITE,
    NOT_INTEGER,
    TOO_LARGE,
    BadValue,
    MappedRows,
    Types,
    check_values,
    count_dtype,
    count_genes,
    index_dtype,
    make_room,
    map_rows,
    widest,
)


def block_of(indptr: list[int], columns: object, values: object) -> RowBlock:
    return RowBlock(
        start=0, indptr=np.array(indptr, dtype=np.int64), columns=np.asarray(columns), values=np.asarray(values)
    )


def dense_of(rows: MappedRows, num_genes: int) -> np.ndarray:
    indptr = np.concatenate([[0], rows.ends])
    shape = (len(rows.totals), num_genes)
    dense: np.ndarray = sp.csr_matrix((rows.counts, rows.genes, indptr), shape=shape).toarray()
    return dense


def random_block(seed: int, num_rows: int, num_columns: int, *, dtype: type = np.float32) -> RowBlock:
    """Columns in any order and repeated, zeros among the values."""
    random = np.random.default_rng(seed)
    sizes = random.integers(0, 30, num_rows)
    indptr = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    columns = random.integers(0, num_columns, indptr[-1]).astype(np.int32)
    return RowBlock(start=0, indptr=indptr, columns=columns, values=random.integers(0, 300, indptr[-1]).astype(dtype))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_rows=st.integers(0, 6),
    num_columns=st.integers(1, 200),
    num_genes=st.integers(1, 200),
)
def test_equals_a_matrix_product(seed: int, num_rows: int, num_columns: int, num_genes: int) -> None:
    """Columns in any order, repeated, unmapped, and several on one gene: the same as counts @ indicator."""
    block = random_block(seed, num_rows, num_columns)
    gene_of_column = np.random.default_rng(seed).integers(-1, num_genes, num_columns).astype(np.int32)
    room = make_room(num_genes)
    rows = map_rows(block, gene_of_column, room)
    assert isinstance(rows, MappedRows)
    dense = np.zeros((num_rows, num_columns))
    np.add.at(dense, (np.repeat(np.arange(num_rows), np.diff(block.indptr)), block.columns), block.values)
    indicator = (gene_of_column[:, None] == np.arange(num_genes)).astype(float)
    mapped = dense @ indicator
    assert np.array_equal(dense_of(rows, num_genes), mapped)
    assert np.array_equal(rows.totals, dense.sum(1))
    assert rows.unmapped == dense[:, gene_of_column < 0].sum()
    for start, end in zip([0, *rows.ends], rows.ends, strict=False):
        assert np.all(np.diff(rows.genes[start:end].astype(int)) > 0)
    assert np.all(rows.counts > 0)
    num_cells = np.zeros(num_genes, dtype=np.int64)
    count_genes(rows.genes, num_cells)
    assert np.array_equal(num_cells, (mapped > 0).sum(0))
    assert not room.sums.any() and not room.seen.any()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), num_rows=st.integers(0, 6), dtype=st.sampled_from(["<f4", "<f8", "<i4", "<u2"]))
def test_plain_rows_are_mapped_as_all_others(seed: int, num_rows: int, dtype: str) -> None:
    """Rising columns and small counts, zeros and unmapped columns among them."""
    random = np.random.default_rng(seed)
    dense = random.integers(0, 3, (num_rows, 50)) * random.integers(1, 40_000, (num_rows, 50))
    csr = sp.csr_matrix(dense.astype(np.float64))
    csr.data[random.random(csr.nnz) < 0.1] = 0.0
    genes = np.where(random.random(50) < 0.2, -1, np.arange(50)).astype(np.int32)
    block = block_of(list(csr.indptr), csr.indices.astype(np.int32), np.minimum(csr.data, 65_535).astype(dtype))
    rows = map_rows(block, genes, make_room(50))
    assert isinstance(rows, MappedRows)
    assert num_rows == 0 or rows.genes.dtype == rows.counts.dtype == np.uint16
    other = map_rows(block, genes, make_room(70_000))  # too many genes for the plain kernel
    assert isinstance(other, MappedRows) and other.genes.dtype == np.int32
    for ours, theirs in zip(rows, other, strict=True):
        assert np.array_equal(ours, theirs)
    stored = sp.csr_matrix((block.values.astype(float), csr.indices, csr.indptr), shape=csr.shape).toarray()
    kept = np.where(genes >= 0, stored, 0.0)
    assert np.array_equal(dense_of(rows, 50), kept)
    assert np.array_equal(rows.totals, stored.sum(1)) and rows.unmapped == stored.sum() - kept.sum()


@pytest.mark.parametrize("value", [0.5, -1.0, np.nan, np.inf, -np.inf, 65_536.0, 1e-60])
def test_one_value_that_is_not_plain(value: float) -> None:
    """It is found wherever it stands among values that are compared many at once."""
    for place in (0, 7, 16, 32):
        values = np.ones(33)
        values[place] = value
        rows = map_rows(block_of([0, 33], np.arange(33), values), np.arange(33, dtype=np.int32), make_room(33))
        if value == 65_536.0:
            assert isinstance(rows, MappedRows) and rows.types.counts == "uint32" and rows.counts[place] == value
        else:
            assert isinstance(rows, BadValue) and (rows.row, rows.place) == (0, place)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.int64, np.uint64, np.float64, np.bool_])
@pytest.mark.parametrize("index_dtype", [np.int32, np.int64, np.uint16])
def test_every_type_of_number(dtype: type, index_dtype: type) -> None:
    block = block_of([0, 2], np.array([1, 0], dtype=index_dtype), np.array([1, 1], dtype=dtype))
    rows = map_rows(block, np.array([0, 1], dtype=np.int32), make_room(2))
    assert isinstance(rows, MappedRows)
    assert rows.genes.tolist() == [0, 1] and rows.counts.tolist() == [1, 1] and rows.types == Types()


@pytest.mark.parametrize(
    ("value", "column", "problem"),
    [
        (-1.0, 0, NEGATIVE),
        (np.nan, 0, NOT_FINITE),
        (np.inf, 0, NOT_FINITE),
        (-np.inf, 0, NOT_FINITE),
        (0.5, 0, NOT_INTEGER),
        (2.0**53, 0, TOO_LARGE),
        (2.0**60, 0, TOO_LARGE),
        (2.0**70, 0, TOO_LARGE),
        (1.0, 9, BAD_COLUMN),
        (1.0, -1, BAD_COLUMN),
    ],
)
def test_says_where_a_bad_value_is(value: float, column: int, problem: int) -> None:
    block = block_of([0, 1, 3], np.array([0, 1, column], dtype=np.int32), [1.0, 1.0, value])
    bad = BadValue(problem=problem, row=1, place=2)
    assert map_rows(block, np.array([0, 1], dtype=np.int32), make_room(2)) == bad
    assert check_values(block, 2, allow_floats=False) == bad


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_integers_that_no_float_tells_apart_are_refused(dtype: type) -> None:
    """2^53 + 1 is 2^53 as a float."""
    bad = map_rows(block_of([0, 1], [0], np.array([2**53 + 1], dtype=dtype)), np.zeros(1, np.int32), make_room(1))
    assert isinstance(bad, BadValue) and bad.problem == TOO_LARGE


def test_a_sum_beyond_what_is_exact_is_refused() -> None:
    block = block_of([0, 2], [0, 1], [2.0**52, 2.0**52])
    room = make_room(1)
    bad = map_rows(block, np.zeros(2, dtype=np.int32), room)
    assert isinstance(bad, BadValue) and bad.problem == TOO_LARGE
    assert not room.sums.any() and not room.seen.any()


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([254.0, 1.0], "uint8"),
        ([255.0, 1.0], "uint16"),
        ([65_535.0, 0.0], "uint16"),
        ([65_535.0, 1.0], "uint32"),
        ([2.0**32 - 1, 1.0], "uint64"),
        ([0.5, 1.0], "float32"),
        ([0.5, 0.5], "uint8"),
    ],
)
def test_the_types_are_those_of_the_stored_sums(values: list[float], dtype: str) -> None:
    """Two columns fall on one gene; a third, of no gene, needs no type whatever its value."""
    genes = np.array([3, 3, -1], dtype=np.int32)
    rows = map_rows(block_of([0, 3], [0, 1, 2], [*values, 1e6 + 0.5]), genes, make_room(4), allow_floats=True)
    assert isinstance(rows, MappedRows) and rows.types == Types("uint16", dtype)
    assert rows.counts.tolist() == [sum(values)] and rows.unmapped == 1e6 + 0.5


def test_the_types_are_those_of_the_genes_that_are_met() -> None:
    genes = np.array([65_535, 65_536], dtype=np.int32)
    room = make_room(70_000)
    for columns, dtype in [([0], "uint16"), ([1], "uint32"), ([0, 1], "uint32"), ([1, 0], "uint32")]:
        rows = map_rows(block_of([0, len(columns)], columns, [1.0] * len(columns)), genes, room)
        assert isinstance(rows, MappedRows) and rows.types == Types(dtype, "uint8")
        assert rows.genes.tolist() == sorted(genes[columns].tolist())


@pytest.mark.parametrize("columns", [[0, 1], [1, 0]])
def test_what_float32_holds_as_zero_is_left_out(columns: list[int]) -> None:
    genes = np.array([0, 1], dtype=np.int32)
    rows = map_rows(block_of([0, 2], columns, [1e-60, 2.0]), genes, make_room(2), allow_floats=True)
    assert isinstance(rows, MappedRows) and rows.counts.tolist() == [2.0] and rows.genes.tolist() == [columns[1]]
    assert rows.types == Types()


def test_smallest_and_widest_types() -> None:
    for largest, dtype in [(0, "uint8"), (255, "uint8"), (256, "uint16"), (65_536, "uint32"), (2**32, "uint64")]:
        assert count_dtype(largest, is_whole=True) == dtype
        assert count_dtype(largest, is_whole=False) == "float32"
    assert index_dtype(65_536) == "uint16" and index_dtype(65_537) == "uint32"
    for first in COUNT_DTYPES:
        for second in COUNT_DTYPES:
            wide = widest(Types("uint16", first), Types("uint32", second))
            assert wide == Types("uint32", COUNT_DTYPES[max(COUNT_DTYPES.index(first), COUNT_DTYPES.index(second))])
    assert INDEX_DTYPES == ("uint16", "uint32")
