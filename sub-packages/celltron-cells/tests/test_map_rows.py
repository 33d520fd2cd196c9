import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from celltron.cells.map_rows import (
    BAD_COLUMN,
    NEGATIVE,
    NOT_FINITE,
    NOT_INTEGER,
    TOO_LARGE,
    BadValue,
    MappedRows,
    map_rows,
)


def dense_of(rows: MappedRows, num_genes: int) -> np.ndarray:
    shape = (len(rows.totals), num_genes)
    return sp.csr_matrix((rows.values, rows.genes, rows.indptr), shape=shape).toarray()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), num_rows=st.integers(0, 6), num_columns=st.integers(1, 20))
def test_equals_a_matrix_product(seed: int, num_rows: int, num_columns: int) -> None:
    """Columns in any order, repeated, unmapped, and several on one gene: the same as counts @ indicator."""
    random = np.random.default_rng(seed)
    sizes = random.integers(0, 30, num_rows)
    indptr = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    columns = random.integers(0, num_columns, indptr[-1]).astype(np.int32)
    values = random.integers(0, 300, indptr[-1]).astype(np.float32)
    gene_of_column = random.integers(-1, 5, num_columns)
    rows = map_rows(indptr, columns, values, gene_of_column, num_genes=5)
    assert isinstance(rows, MappedRows)
    dense = np.zeros((num_rows, num_columns))
    np.add.at(dense, (np.repeat(np.arange(num_rows), sizes), columns), values)
    indicator = (gene_of_column[:, None] == np.arange(5)).astype(float)
    assert np.array_equal(dense_of(rows, 5), dense @ indicator)
    assert np.array_equal(rows.totals, dense.sum(1))
    assert rows.unmapped_total == dense[:, gene_of_column < 0].sum()
    for i in range(num_rows):
        assert np.all(np.diff(rows.genes[rows.indptr[i] : rows.indptr[i + 1]]) > 0)
    assert np.all(rows.values > 0)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64, np.float32, np.float64, np.bool_])
@pytest.mark.parametrize("index_dtype", [np.int32, np.int64, np.uint16])
def test_every_type_of_number(dtype: type, index_dtype: type) -> None:
    rows = map_rows(
        np.array([0, 2], dtype=np.int64),
        np.array([1, 0], dtype=index_dtype),
        np.array([1, 1], dtype=dtype),
        np.array([0, 1], dtype=np.int64),
        num_genes=2,
    )
    assert isinstance(rows, MappedRows)
    assert rows.genes.tolist() == [0, 1] and rows.values.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("value", "column", "problem"),
    [
        (-1.0, 0, NEGATIVE),
        (np.nan, 0, NOT_FINITE),
        (np.inf, 0, NOT_FINITE),
        (-np.inf, 0, NOT_FINITE),
        (0.5, 0, NOT_INTEGER),
        (2.0**60, 0, TOO_LARGE),
        (1.0, 9, BAD_COLUMN),
        (1.0, -1, BAD_COLUMN),
    ],
)
def test_says_where_a_bad_value_is(value: float, column: int, problem: int) -> None:
    indptr = np.array([0, 1, 3], dtype=np.int64)
    columns = np.array([0, 1, column], dtype=np.int32)
    bad = map_rows(indptr, columns, np.array([1.0, 1.0, value]), np.array([0, 1]), num_genes=2)
    assert bad == BadValue(problem=problem, row=1, place=2)


def test_fractions_are_taken_when_allowed() -> None:
    rows = map_rows(
        np.array([0, 1], dtype=np.int64),
        np.array([0], dtype=np.int32),
        np.array([0.5]),
        np.array([0]),
        num_genes=1,
        allow_floats=True,
    )
    assert isinstance(rows, MappedRows) and rows.values.tolist() == [0.5]
