from collections.abc import Iterator
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
import scipy.sparse as sp

from celltron.cells.ingest import anndata_matrix, row_order
from celltron.cells.ingest.anndata_matrix import Matrix
from celltron.cells.ingest.row_order import row_bounds
from celltron.cells.ingest.source import RowBlock
from celltron.core import InputError

FORMS = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}


def dense_of(blocks: Iterator[RowBlock] | list[RowBlock], shape: tuple[int, int]) -> np.ndarray:
    dense = np.zeros(shape)
    row = 0
    for block in blocks:
        assert block.start == row
        num_rows = len(block.indptr) - 1
        np.add.at(dense, (row + np.repeat(np.arange(num_rows), np.diff(block.indptr)), block.columns), block.values)
        row += num_rows
    assert row == shape[0]
    return dense


def open_matrix(node: object) -> Matrix:
    return anndata_matrix.open_matrix(node, "x.h5", lambda array: array)


def write(path: Path, matrix: object) -> h5py.File:
    with h5py.File(path, "w") as file:
        anndata.io.write_elem(file, "X", matrix)
    return h5py.File(path, "r")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_values", [1, 7, 1000, 10**6])
@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint16])
def test_blocks_are_the_matrix(tmp_path: Path, monkeypatch, form: str, num_values: int, dtype: type) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(anndata_matrix, "BLOCK_VALUES", num_values)
    monkeypatch.setattr(row_order, "RUN_VALUES", 3 * num_values)
    monkeypatch.setattr(anndata_matrix, "RUN_VALUES", 2 * num_values)
    monkeypatch.setattr(anndata_matrix, "BLOCK_ROWS", 9)
    dense = np.random.default_rng(0).poisson(0.3, (41, 13)).astype(dtype)
    dense[5] = 0
    with write(tmp_path / "x.h5", FORMS[form](dense)) as file:
        matrix = open_matrix(file["X"])
        assert matrix.shape == dense.shape
        matrix.prepare(tmp_path / "scratch", {"bytes": 1})
        blocks = list(matrix.blocks(0, len(dense)))
        assert np.array_equal(dense_of(blocks, dense.shape), dense)
        assert all(len(block.values) <= max(num_values, 13) for block in blocks) or form == "dense"
        for start, stop in ((0, 0), (3, 4), (5, 30), (40, 41)):
            part = np.zeros((stop, 13))
            for block in matrix.blocks(start, stop):
                num_rows = len(block.indptr) - 1
                rows = block.start + np.repeat(np.arange(num_rows), np.diff(block.indptr))
                np.add.at(part, (rows, block.columns), block.values)
            assert np.array_equal(part[start:], dense[start:stop]) and not part[:start].any()
        matrix.close()


@pytest.mark.parametrize("form", FORMS)
def test_head_is_the_beginning(tmp_path: Path, form: str) -> None:
    dense = np.arange(1.0, 61.0).reshape(12, 5)
    with write(tmp_path / "x.h5", FORMS[form](dense)) as file:
        head = open_matrix(file["X"]).head(10)
    assert 1.0 in head.values and len(head.values) < 40


def test_row_bounds_cover_rows_longer_than_the_budget() -> None:
    assert row_bounds(np.array([0, 0, 50, 51, 52, 52]), 2) == [0, 1, 2, 5]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("indptr", lambda a: a[:-1]),
        ("indptr", lambda a: a[::-1]),
        ("indptr", lambda a: a + 1),
        ("data", lambda a: a[:-1]),
        ("indices", lambda a: a[:-1]),
    ],
)
@pytest.mark.parametrize("form", ["csr", "csc"])
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, form: str, name: str, change) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path / "x.h5", FORMS[form](np.eye(4))).close()
    with h5py.File(tmp_path / "x.h5", "r+") as file:
        values = change(file["X"][name][:])
        del file["X"][name]
        file["X"][name] = values
        with pytest.raises(InputError, match="damaged"):
            open_matrix(file["X"])


def test_a_csc_matrix_that_names_missing_cells_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "x.h5", sp.csc_matrix(np.eye(4))).close()
    with h5py.File(tmp_path / "x.h5", "r+") as file:
        file["X"]["indices"][2] = 99
        with pytest.raises(InputError, match="cells that it does not have"):
            open_matrix(file["X"]).prepare(tmp_path / "scratch", {})


def test_what_is_no_matrix_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["words"] = [["a", "b"]]
        file["line"] = [1.0, 2.0]
        file.create_group("empty")
        for name in ("words", "line", "empty"):
            with pytest.raises(InputError, match=name):
                open_matrix(file[name])


def test_the_sparse_layout_of_old_files_is_read(tmp_path: Path) -> None:
    dense = np.random.default_rng(0).poisson(0.3, (11, 6)).astype(np.float32)
    matrix = sp.csr_matrix(dense)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        group = file.create_group("X")
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = b"csr", matrix.shape
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(matrix, name)
        assert np.array_equal(dense_of(open_matrix(group).blocks(0, 11), dense.shape), dense)
