"""An .h5ad file gives the counts that anndata reads, whatever its form; what may be wrong has a sentence."""

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
from celltron.cells.ingest.h5ad import open_h5ad
from celltron.cells.ingest.source import SourceOptions
from celltron.core import InputError

FORMS: dict[str, Any] = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": lambda matrix: matrix.toarray()}
WRITTEN: dict[str, dict[str, Any]] = {
    "flat": {},
    "gzip": {"compression": "gzip"},
    "lzf": {"compression": "lzf"},
}


def same(found: sp.csr_matrix, wanted: Any) -> bool:
    return found.shape == wanted.shape and (found != sp.csr_matrix(wanted)).nnz == 0


@pytest.mark.parametrize("written", WRITTEN)
def test_counts_are_anndatas(tmp_path: Path, in_all_forms, read_source, written: str) -> None:  # type: ignore[no-untyped-def]
    """400 measured cells, cell by cell."""
    path = tmp_path / "a.h5ad"
    in_all_forms.write_h5ad(path, **WRITTEN[written])
    read = anndata.read_h5ad(path)
    for options, wanted in (
        (SourceOptions(), read.X),
        (SourceOptions(layer="columns"), read.layers["columns"]),
        (SourceOptions(layer="dense"), read.layers["dense"]),
        (SourceOptions(use_raw=True), read.raw.X),
    ):
        with closing(open_h5ad(str(path), options)) as source:
            assert same(read_source(source), wanted)
            assert source.obs.index().to_pylist() == list(read.obs_names)
            assert source.var.index().to_pylist()[:1500] == list(read.var_names)
            assert source.obs.column("batch").to_pylist() == list(read.obs["batch"])
            assert list(source.obsm) == ["X_pca"] and list(source.obsm_notes) == ["sparse"]
            assert source.obsm["X_pca"].shape == (400, 7)
            assert np.array_equal(source.obsm["X_pca"][5:9], read.obsm["X_pca"][5:9])


@pytest.mark.parametrize("dtype", ["?", "u1", "<i2", ">i4", "<u4", "<i8", ">u8", "<f2", ">f4", "<f8"])
@pytest.mark.parametrize("form", FORMS)
def test_values_and_indices_of_any_type(tmp_path: Path, read_source, form: str, dtype: str) -> None:  # type: ignore[no-untyped-def]
    """Also big-endian, and with 64-bit indices."""
    dense = np.random.default_rng(0).integers(0, 2, (90, 20))
    matrix = FORMS[form](sp.csr_matrix(dense))
    frames = {
        "obs": pd.DataFrame(index=[f"c{i}" for i in range(90)]),
        "var": pd.DataFrame(index=list("abcdefghijklmnopqrst")),
    }
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        for name, frame in frames.items():
            anndata.io.write_elem(file, name, frame)
        anndata.io.write_elem(file, "X", matrix)
        name = "X" if form == "dense" else "X/data"
        values, attributes = file[name][:], dict(file[name].attrs)
        del file[name]
        file.create_dataset(name, data=values.astype(dtype), chunks=(7,) * values.ndim, compression="gzip")
        file[name].attrs.update(attributes)
        if form != "dense":
            for name in ("X/indices", "X/indptr"):
                values = file[name][:]
                del file[name]
                file[name] = values.astype(">i8")
    with closing(open_h5ad(str(tmp_path / "a.h5ad"), SourceOptions())) as source:
        assert same(read_source(source), dense)


def test_tall_chunks_of_a_dense_matrix_are_dealt_out(tmp_path: Path, read_source, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Chunks over all rows and few columns, as h5py chooses for long files: each is unpacked twice in all."""
    monkeypatch.setattr(anndata_matrix, "BLOCK_VALUES", 60)
    dense = np.random.default_rng(0).poisson(0.5, (300, 30)).astype(np.float32)
    anndata.AnnData(dense).write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        del file["X"]
        file.create_dataset("X", data=dense, chunks=(130, 4), compression="gzip")
        file["X"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    with closing(open_h5ad(str(tmp_path / "a.h5ad"), SourceOptions())) as source:
        assert same(read_source(source), dense)


def test_a_block_stays_small_in_a_long_file(tmp_path: Path) -> None:
    """3 million stored values: no block holds more than half a million, whatever rows are asked for."""
    random = np.random.default_rng(0)
    counts = sp.random(30_000, 1_000, density=0.1, format="csr", random_state=random, dtype=np.float32)
    counts.data[:] = 1
    for form in ("csr", "csc"):
        anndata.AnnData(counts.asformat(form)).write_h5ad(tmp_path / "a.h5ad", compression="gzip")
        with closing(open_h5ad(str(tmp_path / "a.h5ad"), SourceOptions())) as source:
            source.prepare(tmp_path / "scratch" / form)
            sizes = [block.columns.nbytes + block.values.nbytes for block in source.blocks(0, 30_000)]
            assert sum(sizes) == 8 * counts.nnz and max(sizes) <= 8 * 2**19 and len(sizes) == 6


def test_identity_changes_with_the_file(tmp_path: Path, write_h5ad, small, genes) -> None:  # type: ignore[no-untyped-def]
    path = write_h5ad(tmp_path / "a.h5ad", small, genes)

    def identity() -> dict[str, Any]:
        with closing(open_h5ad(str(path), SourceOptions())) as source:
            return source.identity()

    first = identity()
    assert identity() == first
    write_h5ad(path, small, genes)
    assert identity() != first


@pytest.fixture
def small(counts: np.ndarray) -> np.ndarray:
    return counts[:40]


@pytest.fixture
def refuse(read_source):  # type: ignore[no-untyped-def]
    """Reading fails in one sentence that matches and names the file."""

    def check(path: Path, pattern: str, **options: Any) -> None:
        with pytest.raises(InputError, match=pattern) as caught:
            with closing(open_h5ad(str(path), SourceOptions(**options))) as source:
                read_source(source)
        assert "\n" not in str(caught.value) and path.name in str(caught.value)

    return check


def test_no_file_a_folder_an_empty_file_text(tmp_path: Path, refuse) -> None:  # type: ignore[no-untyped-def]
    refuse(tmp_path / "none.h5ad", "no file at")
    (tmp_path / "folder.h5ad").mkdir()
    refuse(tmp_path / "folder.h5ad", "is a folder")
    (tmp_path / "empty.h5ad").touch()
    refuse(tmp_path / "empty.h5ad", "empty file of 0 bytes")
    (tmp_path / "text.h5ad").write_text("cell,gene\n1,2\n")
    refuse(tmp_path / "text.h5ad", "not an .h5ad file")


def test_hdf5_that_is_no_anndata(tmp_path: Path, refuse) -> None:  # type: ignore[no-untyped-def]
    with h5py.File(tmp_path / "tenx.h5", "w") as file:
        file.create_group("matrix")
    refuse(tmp_path / "tenx.h5", "HDF5 but not an .h5ad file .it has no obs and var.")


@pytest.mark.parametrize("kept", [0.01, 0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_a_truncated_file(tmp_path: Path, refuse, write_h5ad, small, genes, form: str, kept: float) -> None:  # type: ignore[no-untyped-def]
    path = write_h5ad(tmp_path / "a.h5ad", small, genes, form=form)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    refuse(path, "a.h5ad is truncated or damaged .*(copy|download)|not an .h5ad file")


@pytest.mark.parametrize("seed", range(12))
def test_overwritten_bytes_never_crash(tmp_path: Path, read_source, write_h5ad, small, genes, seed: int) -> None:  # type: ignore[no-untyped-def]
    """Garbage in the middle of a compressed file: a sentence, or a file that reads as something valid."""
    path = tmp_path / "a.h5ad"
    write_h5ad(path, small, genes)
    anndata.read_h5ad(path).write_h5ad(path, compression="gzip")
    data = bytearray(path.read_bytes())
    random = np.random.default_rng(seed)
    at = int(random.integers(8, len(data) - 4000))
    data[at : at + 3000] = random.bytes(3000)
    path.write_bytes(bytes(data))
    try:
        with closing(open_h5ad(str(path), SourceOptions())) as source:
            read_source(source)
    except InputError as error:
        assert "a.h5ad" in str(error)


def test_a_missing_layer_names_those_there_are(tmp_path: Path, refuse, write_h5ad, small, genes) -> None:  # type: ignore[no-untyped-def]
    path = write_h5ad(tmp_path / "a.h5ad", small, genes, layers={"counts": small, "spliced": small})
    refuse(path, "no layer 'count': it has counts, spliced", layer="count")
    refuse(path, "choose one of them", layer="counts", use_raw=True)
    refuse(write_h5ad(tmp_path / "b.h5ad", small, genes), "no layer 'count': it has none", layer="count")


def test_no_raw(tmp_path: Path, refuse, write_h5ad, small, genes) -> None:  # type: ignore[no-untyped-def]
    path = write_h5ad(tmp_path / "a.h5ad", small, genes, layers={"counts": small})
    refuse(path, "no raw: leave --use-raw out or pass --layer NAME .it has counts", use_raw=True)


def test_no_x(tmp_path: Path, refuse, small, genes) -> None:  # type: ignore[no-untyped-def]
    data = anndata.AnnData(None, obs=pd.DataFrame(index=list(map(str, range(40)))), var=pd.DataFrame(index=genes))
    data.layers["counts"] = sp.csr_matrix(small)
    data.write_h5ad(tmp_path / "a.h5ad")
    refuse(tmp_path / "a.h5ad", "has no X: pass --layer counts")


def normalised(counts: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = counts / np.maximum(counts.sum(1, keepdims=True), 1) * 10_000
    return scaled


def test_raw_with_other_genes(tmp_path: Path, refuse, read_source, small, genes) -> None:  # type: ignore[no-untyped-def]
    """X holds 50 log-normalised genes, raw all 600 as counts: raw is advised, and read with its own genes."""
    whole = anndata.AnnData(
        sp.csr_matrix(small.astype(np.float32)),
        obs=pd.DataFrame(index=[f"c{i}" for i in range(40)]),
        var=pd.DataFrame(index=genes),
    )
    data = anndata.AnnData(np.log1p(normalised(small))[:, :50], obs=whole.obs, var=pd.DataFrame(index=genes[:50]))
    data.raw = whole
    path = tmp_path / "a.h5ad"
    data.write_h5ad(path)
    refuse(path, "pass --use-raw, which holds integers")
    with closing(open_h5ad(str(path), SourceOptions(use_raw=True))) as source:
        assert same(read_source(source), small)
        assert source.matrix_name == "raw/X" and source.var.index().to_pylist() == genes


def test_no_cells_or_no_genes(tmp_path: Path, refuse, write_h5ad, small, genes) -> None:  # type: ignore[no-untyped-def]
    refuse(write_h5ad(tmp_path / "a.h5ad", small[:0], genes), "holds 0 cells and 600 genes")
    refuse(write_h5ad(tmp_path / "b.h5ad", small[:, :0], []), "holds 40 cells and 0 genes")


def test_shapes_that_disagree(tmp_path: Path, refuse, write_h5ad, small, genes) -> None:  # type: ignore[no-untyped-def]
    path = write_h5ad(tmp_path / "a.h5ad", small, genes)
    with h5py.File(path, "r+") as file:
        file["X"].attrs["shape"] = (40, 601)
    refuse(path, "X is 40 x 601, but obs names 40 cells and var 600 genes")


def test_the_file_is_closed_again(tmp_path: Path, write_h5ad, small, genes) -> None:  # type: ignore[no-untyped-def]
    path = write_h5ad(tmp_path / "a.h5ad", small, genes, form="csc")
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    with closing(open_h5ad(str(path), SourceOptions())) as source:
        source.prepare(tmp_path / "scratch")
        list(source.blocks(0, 40))
    with pytest.raises(InputError):
        open_h5ad(str(path), SourceOptions(layer="none"))
    if before:
        assert len(list(Path("/proc/self/fd").iterdir())) == before
