"""Rows of SOMA tables and arrays come by their ids, with gaps, across fragments, from several threads."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp

from celltron.cells.ingest import soma_arrays
from celltron.cells.ingest.soma_arrays import SomaFrame, SomaRows, SparseMatrix, read_ids, soma_matrix
from celltron.core import InputError

tiledbsoma = pytest.importorskip("tiledbsoma")

IDS = np.array([2, 3, 4, 9, 11, 12, 30], dtype=np.int64)


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Any]:
    """Rows with the ids `IDS`, written in another order and in two parts."""
    schema = pa.schema(
        [
            ("soma_joinid", pa.int64()),
            ("name", pa.large_string()),
            ("kind", pa.dictionary(pa.int8(), pa.string())),
            ("level", pa.dictionary(pa.int32(), pa.int64())),
            ("age", pa.int16()),
            ("score", pa.float32()),
            ("flag", pa.bool_()),
            ("day", pa.timestamp("s")),
        ]
    )
    uri = str(tmp_path / "table")
    tiledbsoma.DataFrame.create(uri, schema=schema, index_column_names=("soma_joinid",), domain=((0, 99),)).close()
    for ids in (IDS[[6, 0, 3]], IDS[[5, 4, 2, 1]]):
        values = ids.tolist()
        columns = {
            "soma_joinid": pa.array(values),
            "name": pa.array([f"β{i}" for i in values], pa.large_string()),
            "kind": pa.array([f"kind {i % 3}" for i in values]).dictionary_encode().cast(schema.field("kind").type),
            "level": pa.array([i % 2 for i in values]).dictionary_encode().cast(schema.field("level").type),
            "age": pa.array(values, pa.int16()),
            "score": pa.array([i / 4 for i in values], pa.float32()),
            "flag": pa.array([i > 9 for i in values]),
            "day": pa.array(values, pa.timestamp("s")),
        }
        with tiledbsoma.DataFrame.open(uri, "w") as opened:
            opened.write(pa.table(columns, schema=schema))
    with tiledbsoma.DataFrame.open(uri) as opened:
        yield opened


def test_columns(table: Any) -> None:
    ids = read_ids(table)
    assert np.array_equal(ids, IDS)
    names = ["kind", "level", "age", "score", "flag", "day"]
    frame = SomaFrame(table, ids, "name", names, "a")
    assert frame.num_rows == 7 and frame.columns == names
    assert frame.notes == {"level": "categories that are not text", "day": "neither numbers nor text"}
    wanted = {
        "kind": [f"kind {i % 3}" for i in IDS],
        "level": [str(i % 2) for i in IDS],
        "age": IDS.tolist(),
        "score": (IDS / 4).tolist(),
        "flag": (IDS > 9).tolist(),
        "day": [f"1970-01-01 00:00:{i:02d}" for i in IDS],
    }
    category = pa.dictionary(pa.int32(), pa.string())
    kinds = [category, category, pa.int16(), pa.float32(), pa.bool_(), pa.string()]
    for (name, values), kind in zip(wanted.items(), kinds, strict=True):
        for start, stop in ((0, None), (0, 3), (2, 6), (6, 7), (4, 4)):
            found = frame.column(name, start, stop)
            assert found.type == kind and found.to_pylist() == values[start:stop], name
    assert frame.index(3, 5).to_pylist() == ["β9", "β11"]
    assert SomaFrame(table, ids, None, [], "a").index(3, 5).to_pylist() == ["9", "11"]


def test_a_filter(table: Any) -> None:
    ids = read_ids(table, "age > 9 and kind in ['kind 0', 'kind 2']")
    assert ids.tolist() == [11, 12, 30]
    assert SomaFrame(table, ids, None, ["age"], "a").column("age").to_pylist() == [11, 12, 30]


def test_rows_that_are_gone(table: Any) -> None:
    frame = SomaFrame(table, np.array([2, 5]), None, ["age"], "a.soma")
    with pytest.raises(InputError, match="a.soma is truncated or damaged .*lacks rows"):
        frame.column("age")


def test_a_table_in_another_order(tmp_path: Path) -> None:
    schema = pa.schema([("soma_joinid", pa.int64()), ("name", pa.large_string())])
    uri = str(tmp_path / "by_name")
    with tiledbsoma.DataFrame.create(uri, schema=schema, index_column_names=("name",), domain=(None,)) as opened:
        columns = {"soma_joinid": pa.array([5, 1, 9]), "name": pa.array(["a", "b", "c"], pa.large_string())}
        opened.write(pa.table(columns, schema=schema))
    with tiledbsoma.DataFrame.open(uri) as opened:
        frame = SomaFrame(opened, read_ids(opened), "name", [], "a")
        assert frame.index().to_pylist() == ["b", "a", "c"] and frame.index(1, 2).to_pylist() == ["a"]
        assert SomaFrame(opened, np.array([1, 9]), "name", [], "a").index().to_pylist() == ["b", "c"]


def write_sparse(uri: str, dense: np.ndarray, parts: int = 1) -> None:
    kind = pa.from_numpy_dtype(dense.dtype)
    tiledbsoma.SparseNDArray.create(uri, type=kind, shape=dense.shape).close()
    order = np.random.default_rng(0).permutation(np.flatnonzero(dense))
    for part in np.array_split(order, parts):
        rows, columns = np.unravel_index(part, dense.shape)
        names = ("soma_dim_0", "soma_dim_1", "soma_data")
        arrays = (rows, columns, dense[rows, columns])
        with tiledbsoma.SparseNDArray.open(uri, "w") as opened:
            opened.write(pa.table({name: pa.array(array) for name, array in zip(names, arrays, strict=True)}))


@pytest.fixture(scope="module")
def dense() -> np.ndarray:
    found = np.random.default_rng(1).poisson(0.6, (40, 25)).astype(np.int32)
    found[[0, 9, 39]] = 0
    return found


CHOICES = [
    (np.arange(40), np.arange(25)),
    (np.array([0, 3, 4, 9, 17, 39]), np.arange(25)),
    (np.arange(5, 22), np.arange(25)),
    (np.array([7]), np.arange(25)),
]


@pytest.mark.parametrize("choice", range(len(CHOICES)))
@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.uint8])
def test_rows_of_a_sparse_array(tmp_path: Path, dense, choice: int, dtype: type, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(soma_arrays, "READ_VALUES", 90)
    monkeypatch.setattr(soma_arrays, "FIRST_ROWS", 3)
    monkeypatch.setattr(soma_arrays, "BLOCK_VALUES", 40)
    cells, genes = CHOICES[choice]
    write_sparse(str(tmp_path / "x"), dense.astype(dtype), parts=3)
    wanted = dense[np.ix_(cells, genes)]
    with tiledbsoma.open(str(tmp_path / "x")) as array:
        matrix = SparseMatrix(array, cells, genes, "a")
        assert matrix.shape == wanted.shape
        for start, stop in ((0, len(cells)), (len(cells) // 3, len(cells)), (0, 0)):
            row, found = start, []
            for block in matrix.blocks(start, stop):
                assert block.start == row and block.values.dtype == dtype
                row += len(block.indptr) - 1
                size = (len(block.indptr) - 1, len(genes))
                found.append(sp.csr_matrix((block.values, block.columns, block.indptr), shape=size).toarray())
                assert size[0] == 1 or len(block.values) <= 40
            assert row == stop
            assert np.array_equal(np.concatenate([wanted[:0], *found]), wanted[start:stop])
        head = matrix.head(30)
        assert 0 < len(head.indptr) - 1 <= 3 and len(head.values) <= 30
        assert head.values.sum() == wanted[: len(head.indptr) - 1].sum()


def test_genes_with_gaps_and_values_of_others(tmp_path: Path, dense: np.ndarray) -> None:
    some = dense.copy()
    some[:, [3, 4, 20]] = 0
    write_sparse(str(tmp_path / "x"), some)
    genes = np.setdiff1d(np.arange(25), [3, 4, 20])
    with tiledbsoma.open(str(tmp_path / "x")) as array:
        block = SparseMatrix(array, np.arange(40), genes, "a").head(10**6)
        found = sp.csr_matrix((block.values, block.columns, block.indptr), shape=(40, 22)).toarray()
        assert np.array_equal(found, some[:, genes])
        with pytest.raises(
            InputError, match="a.soma is truncated or damaged .*holds values of genes that are not named"
        ):
            SparseMatrix(array, np.arange(40), genes[1:], "a.soma").head(10**6)


@pytest.mark.parametrize("choice", range(len(CHOICES)))
def test_rows_of_a_dense_array(tmp_path: Path, dense: np.ndarray, choice: int) -> None:
    cells, genes = CHOICES[choice]
    uri = str(tmp_path / "x")
    with tiledbsoma.DenseNDArray.create(uri, type=pa.int32(), shape=dense.shape) as array:
        array.write((slice(None), slice(None)), pa.Tensor.from_numpy(dense))
    wanted = dense[np.ix_(cells, genes)]
    with tiledbsoma.open(uri) as array:
        assert np.array_equal(SomaRows(array, cells, genes, "a")[1:5], wanted[1:5])
        blocks = list(soma_matrix(array, cells, genes, "a").blocks(0, len(cells)))
        found = [
            sp.csr_matrix((b.values, b.columns, b.indptr), shape=(len(b.indptr) - 1, 25)).toarray() for b in blocks
        ]
        assert np.array_equal(np.concatenate(found), wanted)


def test_dense_rows_of_a_sparse_array(tmp_path: Path, dense: np.ndarray) -> None:
    write_sparse(str(tmp_path / "x"), dense.astype(np.float32) / 2)
    with tiledbsoma.open(str(tmp_path / "x")) as array:
        rows = SomaRows(array, CHOICES[1][0], np.arange(25), "a")
        assert rows.shape == (6, 25) and rows.dtype == np.float32
        assert np.array_equal(rows[1:5], dense[[3, 4, 9, 17]] / 2)
        assert rows[3:3].shape == (0, 25)
