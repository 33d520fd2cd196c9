"""Loom files as loompy and anndata write them, and as the specification allows, give the counts that they hold."""

from contextlib import closing
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from celltron.cells.ingest import anndata_matrix
from celltron.cells.ingest.loom import open_loom
from celltron.cells.ingest.source import SourceOptions
from celltron.core import InputError

CELLS = [f"sample:{i}β" for i in range(150)]
GENES = [f"ENSG{i:011d}" for i in range(90)]


def some_counts() -> np.ndarray:
    return np.random.default_rng(0).poisson(0.5, (150, 90)).astype(np.int32)


def write_loom(path: Path, counts: np.ndarray, *, version: str = "3.0.0", layers: Any = None, **storage: Any) -> Path:
    """Cells x genes by the specification; texts of version 2 are ASCII with entities."""
    text = h5py.string_dtype() if version >= "3" else None

    def words(texts: list[str]) -> Any:
        return texts if text else np.array([word.encode("ascii", "xmlcharrefreplace") for word in texts])

    with h5py.File(path, "w") as file:
        if version >= "3":
            file["attrs/LOOM_SPEC_VERSION"] = version
        elif version:
            file.attrs["LOOM_SPEC_VERSION"] = version
        file.create_dataset("matrix", data=counts.T, **storage)
        for name, layer in (layers or {}).items():
            file.create_dataset(f"layers/{name}", data=layer.T, **storage)
        file.create_dataset("col_attrs/CellID", data=words(CELLS[: len(counts)]), dtype=text)
        file.create_dataset("col_attrs/Kind", data=words(["T & <b> β"] * len(counts)), dtype=text)
        file["col_attrs/Age"] = np.arange(len(counts), dtype=np.int16)
        file["col_attrs/Pairs"] = np.zeros(len(counts), dtype=[("x", "i4"), ("y", "f4")])  # the format knows none
        file["col_attrs/Embedding"] = np.arange(len(counts) * 2.0).reshape(-1, 2)
        file.create_dataset("row_attrs/Gene", data=words([f"name {i}" for i in range(counts.shape[1])]), dtype=text)
        file.create_dataset("row_attrs/Accession", data=words(GENES[: counts.shape[1]]), dtype=text)
        for group in ("row_graphs", "col_graphs", "layers"):
            file.require_group(group)
    return path


def open_file(path: Path, **options: Any) -> Any:
    return closing(open_loom(str(path), SourceOptions(**options)))


STORAGE: dict[str, dict[str, Any]] = {
    "gzip": {"chunks": (64, 64), "compression": "gzip"},
    "small chunks, shuffled": {"chunks": (7, 11), "compression": "gzip", "shuffle": True},
    "whole rows": {"chunks": (1, 150), "compression": "gzip"},
    "whole columns": {"chunks": (90, 1)},
    "flat": {},
    "another packing": {"chunks": (20, 30), "compression": "lzf"},
}


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("block_values", [2**19, 200])
def test_any_storage(tmp_path: Path, read_source, storage: str, block_values: int, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """With small blocks what lies by genes is dealt out."""
    monkeypatch.setattr(anndata_matrix, "BLOCK_VALUES", block_values)
    counts = some_counts()
    with open_file(write_loom(tmp_path / "a.loom", counts, **STORAGE[storage])) as source:
        assert source.shape == (150, 90) and source.matrix_name == "matrix"
        assert (read_source(source) != sp.csr_matrix(counts)).nnz == 0


@pytest.mark.parametrize("storage", ["flat", "whole rows"])
def test_the_head_is_no_whole_file(tmp_path: Path, storage: str, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(anndata_matrix, "BLOCK_VALUES", 200)
    monkeypatch.setattr(anndata_matrix, "RUN_VALUES", 1000)
    counts = some_counts()
    with open_file(write_loom(tmp_path / "a.loom", counts, **STORAGE[storage])) as source:
        head = source.head(10)
    found = sp.csr_matrix((head.values, head.columns, head.indptr), shape=(len(head.indptr) - 1, 90)).toarray()
    assert np.array_equal(found[:, :6], counts[: len(found), :6]) and not found[:, 6:].any() and found.any()


def test_a_chunk_is_unpacked_once_for_each_block(tmp_path: Path, read_source, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(anndata_matrix, "BLOCK_VALUES", 30 * 90)
    counts = some_counts()
    path = write_loom(tmp_path / "a.loom", counts, chunks=(10, 15), compression="gzip")
    with open_file(path) as source:
        unpacked: list[int] = []
        array = source.matrix._array._array
        load = array._load
        array._load = lambda numbers: unpacked.extend(numbers) or load(numbers)
        blocks = list(source.blocks(0, 150))
    assert [len(block.indptr) - 1 for block in blocks] == [30] * 5
    assert sorted(unpacked) == list(range(9 * 10))


@pytest.mark.parametrize("version", ["3.0.0", "2.0.1", ""])
def test_attributes(tmp_path: Path, version: str) -> None:
    """Ids become row names, texts of old files are unescaped, wide attributes are obsm."""
    with open_file(write_loom(tmp_path / "a.loom", some_counts(), version=version)) as source:
        assert source.obs.index().to_pylist() == CELLS and source.obs.index(3, 5).to_pylist() == CELLS[3:5]
        assert source.obs.columns == ["Age", "Kind"]
        assert source.obs.column("Kind", 2, 4).to_pylist() == ["T & <b> β"] * 2
        assert source.obs.column("Age", 2, 4).to_pylist() == [2, 3] and source.obs.notes == {}
        assert source.var.index().to_pylist() == GENES and source.var.columns == ["Gene"]
        assert source.var.column("Gene", 88).to_pylist() == ["name 88", "name 89"]
        assert list(source.obsm) == ["Embedding"]
        assert source.obsm["Embedding"].shape == (150, 2)
        assert source.obsm["Embedding"][4:6].tolist() == [[8.0, 9.0], [10.0, 11.0]]


def test_entities_of_version_3_are_texts(tmp_path: Path) -> None:
    path = write_loom(tmp_path / "a.loom", some_counts())
    with h5py.File(path, "r+") as file:
        file["col_attrs/Kind"][0] = "a &amp; b"
    with open_file(path) as source:
        assert source.obs.column("Kind", 0, 1).to_pylist() == ["a &amp; b"]


def test_without_names_cells_and_genes_are_numbered(tmp_path: Path, read_source) -> None:  # type: ignore[no-untyped-def]
    path = write_loom(tmp_path / "a.loom", some_counts())
    with h5py.File(path, "r+") as file:
        for name in ("col_attrs/CellID", "row_attrs/Gene", "row_attrs/Accession"):
            del file[name]
    with open_file(path) as source:
        assert source.obs.index(8, 12).to_pylist() == ["8", "9", "10", "11"]
        assert source.var.index(0, 2).to_pylist() == ["0", "1"]
        assert read_source(source).shape == (150, 90)


def test_layers_and_advice(tmp_path: Path, read_source) -> None:  # type: ignore[no-untyped-def]
    counts = some_counts()
    layers = {"spliced": counts * 2, "ambiguous": counts - 1, "scaled": counts / 3}
    path = write_loom(tmp_path / "a.loom", np.log1p(counts), layers=layers, chunks=(64, 64), compression="gzip")
    with open_file(path) as source:
        assert source.advice() == "--layer spliced"
        with pytest.raises(InputError, match="look log-transformed or normalised; pass --layer spliced"):
            read_source(source)
    with open_file(path, layer="spliced") as source:
        assert source.matrix_name == "layers/spliced" and source.advice() == ""
        assert (read_source(source) != sp.csr_matrix(counts * 2)).nnz == 0
    with pytest.raises(InputError, match="a.loom has no layer 'x': it has ambiguous, scaled, spliced; name one"):
        open_file(path, layer="x")
    with pytest.raises(InputError, match="a.loom has no raw, .* leave --use-raw out or pass --layer NAME"):
        open_file(path, use_raw=True)
    with open_file(write_loom(tmp_path / "b.loom", counts, layers={"spliced": counts})) as source:
        assert source.advice() == "--layer spliced"
    with open_file(write_loom(tmp_path / "c.loom", counts / 2, layers={"n": counts / 3}), layer="n") as source:
        assert source.advice() == ""


@pytest.fixture(scope="session")
def measured(real: anndata.AnnData) -> anndata.AnnData:
    data = real[:, :700].copy()
    data.layers["twice"] = data.X * 2
    data.obsm["X_pca"] = np.random.default_rng(0).normal(size=(400, 3))
    for table in (data.obs, data.var):  # loompy knows no texts of arrow
        table.index = pd.Index(list(table.index), dtype=object)
    data.var["gene_symbol"] = np.array(list(data.var["gene_symbol"]), dtype=object)
    return data


def test_what_anndata_writes(tmp_path: Path, measured, read_source) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("loompy")
    anndata.io.write_loom(tmp_path / "a.loom", measured, write_obsm_varm=True)
    with open_file(tmp_path / "a.loom") as source:
        assert (read_source(source) != sp.csr_matrix(measured.X)).nnz == 0
        assert source.obs.index().to_pylist() == list(measured.obs_names)
        assert source.obs.column("batch").to_pylist() == list(measured.obs["batch"])
        assert source.var.index().to_pylist() == list(measured.var_names)
        assert source.var.column("gene_symbol").to_pylist() == list(measured.var["gene_symbol"])
        assert np.allclose(source.obsm["X_pca"][:], measured.obsm["X_pca"])
    with open_file(tmp_path / "a.loom", layer="twice") as source:
        assert (read_source(source) != sp.csr_matrix(measured.X * 2)).nnz == 0


def test_what_loompy_writes(tmp_path: Path, measured, read_source) -> None:  # type: ignore[no-untyped-def]
    loompy = pytest.importorskip("loompy")
    columns = {"CellID": np.array(measured.obs_names), "Batch": np.array(measured.obs["batch"].astype(str))}
    rows = {"Gene": np.array(measured.var["gene_symbol"]), "Accession": np.array(measured.var_names)}
    loompy.create(str(tmp_path / "a.loom"), {"": measured.X.T.tocoo(), "n": measured.X.T.tocoo() * 3}, rows, columns)
    for layer, factor in ((None, 1), ("n", 3)):
        with open_file(tmp_path / "a.loom", layer=layer) as source:
            assert (read_source(source) != sp.csr_matrix(measured.X * factor)).nnz == 0
            assert source.obs.index().to_pylist() == list(measured.obs_names)
            assert source.var.index().to_pylist() == list(measured.var_names)


def test_cut_and_damaged_files(tmp_path: Path, read_source) -> None:  # type: ignore[no-untyped-def]
    path = write_loom(tmp_path / "a.loom", some_counts(), chunks=(30, 50), compression="gzip")
    whole = path.read_bytes()
    for kept in (0, 8, len(whole) // 2, len(whole) - 8):
        path.write_bytes(whole[:kept])
        with pytest.raises(InputError, match="a.loom"):
            open_file(path)
    path.write_bytes(whole)
    with h5py.File(path) as file:
        place = file["matrix"].id.get_chunk_info(2).byte_offset
    damaged = bytearray(whole)
    damaged[place + 40] ^= 255
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="a.loom is truncated or damaged"), open_file(path) as source:
        read_source(source)


def test_parts_that_do_not_fit(tmp_path: Path) -> None:
    for name, array, sentence in (
        (
            "col_attrs/Age",
            np.arange(3),
            "col_attrs/Age is int64 of the shape .3,., wanted texts or numbers for 150 rows",
        ),
        (
            "row_attrs/Gene",
            np.arange(3),
            "row_attrs/Gene is int64 of the shape .3,., wanted texts or numbers for 90 rows",
        ),
        ("matrix", np.zeros(5), "matrix is no matrix of numbers"),
        ("matrix", np.zeros((90, 0)), "a.loom"),
        ("layers/x", np.zeros((90, 149)), "layers/x is 149 x 90, but 150 cells and 90 genes are named"),
    ):
        path = write_loom(tmp_path / "a.loom", some_counts(), layers={"x": some_counts()})
        with h5py.File(path, "r+") as file:
            del file[name]
            file[name] = array
        with pytest.raises(InputError, match=sentence):
            open_file(path, layer="x" if name == "layers/x" else None)
    with h5py.File(tmp_path / "b.loom", "w") as file:
        file["matrix"] = np.zeros((3, 3))
    with pytest.raises(InputError, match="b.loom is HDF5 but no loom file"):
        open_file(tmp_path / "b.loom")
