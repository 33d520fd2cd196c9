"""AnnData as zarr gives the counts that anndata reads, in both formats; lost and pickled chunks are refused."""

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from numcodecs import Blosc
from zarr.codecs import BloscCodec

from celltron.cells.ingest import anndata_matrix
from celltron.cells.ingest.source import SourceOptions
from celltron.cells.ingest.zarr import open_zarr
from celltron.core import InputError

FORMS: dict[str, Any] = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": lambda matrix: matrix.toarray()}
NUMBERS = np.arange(60)


def write(path: Path, data: anndata.AnnData, zarr_format: int, **chunks: Any) -> Path:
    """The parts that matter, as anndata writes them; ``chunks`` (and ``shards``) are those of X."""
    root = zarr.open_group(path, mode="w", zarr_format=zarr_format)  # type: ignore[arg-type]
    for name in ("obs", "var"):
        anndata.io.write_elem(root, name, getattr(data, name))
    anndata.io.write_elem(root, "X", data.X, dataset_kwargs=chunks)
    zarr.consolidate_metadata(root.store)
    return path


@pytest.fixture
def small() -> anndata.AnnData:
    """60 cells x 40 genes."""
    counts = np.random.default_rng(0).poisson(0.5, (60, 40)).astype(np.float32)
    obs = pd.DataFrame(index=[f"cell {i}" for i in NUMBERS])
    return anndata.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(40)]))


def open_small(path: Path, **options: Any) -> Any:
    return closing(open_zarr(str(path), SourceOptions(**options)))


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_counts_are_anndatas(tmp_path: Path, in_all_forms, read_source, zarr_format: int) -> None:  # type: ignore[no-untyped-def]
    """400 measured cells, cell by cell."""
    path = tmp_path / "a.zarr"
    with anndata.settings.override(zarr_write_format=zarr_format):
        in_all_forms.write_zarr(path)
    assert (path / "zarr.json").exists() == (zarr_format == 3)
    read = anndata.read_zarr(path)
    wanted_of: list[tuple[dict[str, Any], Any]] = [({}, read.X), ({"use_raw": True}, read.raw.X)]
    wanted_of += [({"layer": name}, read.layers[name]) for name in ("columns", "dense")]
    for options, wanted in wanted_of:
        with open_small(path, **options) as source:
            assert (read_source(source) != sp.csr_matrix(wanted)).nnz == 0
            assert source.obs.index().to_pylist() == list(read.obs_names)
            assert source.obs.column("batch").to_pylist() == list(read.obs["batch"])
            assert np.array_equal(source.obsm["X_pca"][5:9], read.obsm["X_pca"][5:9])


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_small_chunks_and_no_consolidated_metadata(tmp_path: Path, small, read_source, form, zarr_format) -> None:  # type: ignore[no-untyped-def]
    small.X = FORMS[form](small.X)
    path = write(tmp_path / "a.zarr", small, zarr_format, chunks=(7, 9) if form == "dense" else (25,))
    if zarr_format == 2:
        (path / ".zmetadata").unlink()
    with open_small(path) as source:
        assert (read_source(source) != sp.csr_matrix(small.X)).nnz == 0


@pytest.mark.parametrize("form", ["csr", "dense"])
def test_shards(tmp_path: Path, small, read_source, form: str, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(anndata_matrix, "BLOCK_VALUES", 100)
    small.X = FORMS[form](small.X)
    sizes = {"chunks": (5, 8), "shards": (20, 16)} if form == "dense" else {"chunks": (25,), "shards": (100,)}
    path = write(tmp_path / "a.zarr", small, 3, **sizes)
    with open_small(path) as source:
        assert (read_source(source) != sp.csr_matrix(small.X)).nnz == 0


def test_tall_chunks_of_a_dense_matrix_are_dealt_out(tmp_path: Path, small, read_source, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(anndata_matrix, "BLOCK_VALUES", 40)
    small.X = small.X.toarray()
    path = write(tmp_path / "a.zarr", small, 3, chunks=(60, 3))
    with open_small(path) as source:
        assert (read_source(source) != sp.csr_matrix(small.X)).nnz == 0


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_columns_of_obs(tmp_path: Path, small, zarr_format: int) -> None:  # type: ignore[no-untyped-def]
    small.obs = pd.DataFrame(
        {
            "kind": pd.Categorical(np.where(NUMBERS % 7 == 0, None, np.where(NUMBERS % 2, "β", "a"))),
            "age": NUMBERS.astype(np.int16),
            "score": NUMBERS / 4,
            "flag": NUMBERS % 3 == 0,
            "maybe": pd.array([None if i % 5 == 0 else i for i in NUMBERS], dtype="Int64"),
            "perhaps": pd.array([None if i % 5 == 0 else i % 2 == 0 for i in NUMBERS], dtype="boolean"),
            "word": [f"Δ{i}" for i in NUMBERS],
        },
        index=small.obs_names,
    )
    path = write(tmp_path / "a.zarr", small, zarr_format)
    with open_small(path) as source:
        assert source.obs.columns == list(small.obs.columns) and source.obs.notes == {}
        for name in small.obs.columns:
            wanted = [None if pd.isna(value) else value for value in small.obs[name].tolist()]
            assert source.obs.column(name).to_pylist() == wanted, name
            assert source.obs.column(name, 11, 17).to_pylist() == wanted[11:17], name
        assert source.obs.index(3, 5).to_pylist() == ["cell 3", "cell 4"]


def test_a_zip_file(tmp_path: Path, small, read_source) -> None:  # type: ignore[no-untyped-def]
    path = write(tmp_path / "a.zarr", small, 2)
    shutil.make_archive(str(tmp_path / "a.zarr"), "zip", path)
    with open_small(tmp_path / "a.zarr.zip") as source:
        assert (read_source(source) != small.X).nnz == 0
        assert source.identity()["bytes"] == (tmp_path / "a.zarr.zip").stat().st_size


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("array", ["X/data", "X/indices", "X/indptr", "obs/_index"])
def test_a_lost_chunk_is_refused(tmp_path: Path, small, read_source, array: str, zarr_format: int) -> None:  # type: ignore[no-untyped-def]
    """Plain zarr reads it as zeros."""
    path = write(tmp_path / "a.zarr", small, zarr_format, chunks=(25,))
    chunk = path / array / ("0" if zarr_format == 2 else "c/0")
    chunk.unlink()
    with pytest.raises(InputError, match=f"a.zarr lacks its chunk {array}/.*copy or download it again"):
        with open_small(path) as source:
            read_source(source)


def test_empty_matrices_have_no_chunks(tmp_path: Path, small, read_source) -> None:  # type: ignore[no-untyped-def]
    small.X = sp.csr_matrix((60, 40), dtype=np.float32)
    with open_small(write(tmp_path / "a.zarr", small, 3)) as source:
        assert read_source(source).nnz == 0


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_damaged_chunks_and_metadata(tmp_path: Path, small, read_source, zarr_format: int) -> None:  # type: ignore[no-untyped-def]
    path = write(tmp_path / "a.zarr", small, zarr_format, chunks=(25,))
    chunk = path / "X" / "data" / ("1" if zarr_format == 2 else "c/1")
    whole = chunk.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1], b"", bytes(len(whole))):
        chunk.write_bytes(damaged)
        with pytest.raises(InputError, match="a.zarr is truncated or damaged"):
            with open_small(path) as source:
                read_source(source)
    chunk.write_bytes(whole)
    document = path / (".zmetadata" if zarr_format == 2 else "zarr.json")
    document.write_bytes(document.read_bytes()[:100])
    with pytest.raises(InputError, match="a.zarr is damaged: its .* is no JSON"):
        open_small(path)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_cut_chunks_of_blosc_and_of_shards(tmp_path: Path, small, read_source, zarr_format: int) -> None:  # type: ignore[no-untyped-def]
    """Blosc alone unpacks what there is, and garbage after it."""
    packed = {"compressor": Blosc()} if zarr_format == 2 else {"compressors": BloscCodec(), "shards": (100,)}
    path = write(tmp_path / "a.zarr", small, zarr_format, chunks=(25,), **packed)
    with open_small(path) as source:
        assert (read_source(source) != small.X).nnz == 0
    for name in ("data", "indices"):
        chunk = path / "X" / name / ("3" if zarr_format == 2 else "c/1")
        whole = chunk.read_bytes()
        for kept in (len(whole) - 1, 20):
            chunk.write_bytes(whole[:kept])
            with pytest.raises(InputError, match="a.zarr is truncated or damaged"):
                with open_small(path) as source:
                    read_source(source)
        chunk.write_bytes(whole)


@pytest.mark.parametrize("consolidated", [True, False])
def test_pickled_chunks_are_refused_unread(tmp_path: Path, small, consolidated: bool) -> None:  # type: ignore[no-untyped-def]
    path = write(tmp_path / "a.zarr", small, 2)
    name = path / (".zmetadata" if consolidated else "X/data/.zarray")
    if not consolidated:
        (path / ".zmetadata").unlink()
    document = json.loads(name.read_text())
    (document["metadata"]["X/data/.zarray"] if consolidated else document)["filters"] = [{"id": "pickle"}]
    name.write_text(json.dumps(document))
    with pytest.raises(InputError, match="holds pickled chunks .* could run code"):
        open_small(path)


def test_what_is_no_anndata(tmp_path: Path, small) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match="no file at .*none.zarr"):
        open_small(tmp_path / "none.zarr")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(InputError, match="empty.zarr holds no zarr group"):
        open_small(tmp_path / "empty.zarr")
    zarr.open_group(tmp_path / "other.zarr", mode="w").create_group("obs")
    with pytest.raises(InputError, match="other.zarr is zarr but not of anndata"):
        open_small(tmp_path / "other.zarr")
    (tmp_path / "text.zarr.zip").write_text("no zip")
    with pytest.raises(InputError, match="text.zarr.zip is truncated or damaged"):
        open_small(tmp_path / "text.zarr.zip")
    with pytest.raises(InputError, match="no layer 'umi': it has none"):
        open_small(write(tmp_path / "a.zarr", small, 3), layer="umi")


def test_identity_changes_with_any_file(tmp_path: Path, small) -> None:  # type: ignore[no-untyped-def]
    path = write(tmp_path / "a.zarr", small, 3)

    def identity() -> dict[str, Any]:
        with open_small(path) as source:
            return source.identity()

    first = identity()
    assert identity() == first
    (path / "X" / "data" / "c" / "0").touch()
    assert identity() != first
