"""What may be wrong with a file, and the sentence for each."""

from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from celltron.cells import CellStore, convert
from celltron.cells.ingest_h5ad import open_h5ad
from celltron.core import InputError


@pytest.fixture
def small(counts: np.ndarray) -> np.ndarray:
    return counts[:40]


def refuse(path: Path, pattern: str, **options: object) -> None:
    """Conversion fails in one sentence that matches, and leaves nothing behind."""
    folder = path.parent / "made"
    folder.mkdir(exist_ok=True)
    with pytest.raises(InputError, match=pattern) as caught:
        convert([path], folder / "out.store", **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and path.name in str(caught.value)
    assert list(folder.iterdir()) == []


def test_no_file_a_folder_an_empty_file_text(tmp_path: Path) -> None:
    refuse(tmp_path / "none.h5ad", "no file at")
    (tmp_path / "folder.h5ad").mkdir()
    refuse(tmp_path / "folder.h5ad", "is a folder")
    (tmp_path / "empty.h5ad").touch()
    refuse(tmp_path / "empty.h5ad", "empty file of 0 bytes")
    (tmp_path / "text.h5ad").write_text("cell,gene\n1,2\n")
    refuse(tmp_path / "text.h5ad", "not an .h5ad file")


def test_hdf5_that_is_no_anndata(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "tenx.h5", "w") as file:
        file.create_group("matrix")
    refuse(tmp_path / "tenx.h5", "10x .h5 file: read it with scanpy.read_10x_h5")


@pytest.mark.parametrize("kept", [0.01, 0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_a_truncated_file(tmp_path: Path, write_h5ad, small, genes, form: str, kept: float) -> None:  # type: ignore[no-untyped-def]
    path = write_h5ad(tmp_path / "a.h5ad", small, genes, form=form)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    refuse(path, "a.h5ad is truncated or damaged .*(copy|download)|not an .h5ad file")


@pytest.mark.parametrize("seed", range(12))
def test_overwritten_bytes_never_crash(tmp_path: Path, write_h5ad, small, genes, seed: int) -> None:  # type: ignore[no-untyped-def]
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
        convert([path], tmp_path / "out.store")
    except InputError as error:
        assert "a.h5ad" in str(error)
        assert not (tmp_path / "out.store").exists()


def test_a_missing_layer_names_those_there_are(tmp_path: Path, write_h5ad, small, genes) -> None:  # type: ignore[no-untyped-def]
    path = write_h5ad(tmp_path / "a.h5ad", small, genes, layers={"counts": small, "spliced": small})
    refuse(path, "no layer 'count': it has counts, spliced", layer="count")
    refuse(path, "choose one of them", layer="counts", use_raw=True)
    refuse(write_h5ad(tmp_path / "b.h5ad", small, genes), "no layer 'count': it has none", layer="count")


def test_no_raw(tmp_path: Path, write_h5ad, small, genes) -> None:  # type: ignore[no-untyped-def]
    path = write_h5ad(tmp_path / "a.h5ad", small, genes, layers={"counts": small})
    refuse(path, "no raw: leave --use-raw out or pass --layer NAME .it has counts", use_raw=True)


def test_no_x(tmp_path: Path, small, genes) -> None:  # type: ignore[no-untyped-def]
    data = anndata.AnnData(None, obs=pd.DataFrame(index=list(map(str, range(40)))), var=pd.DataFrame(index=genes))
    data.layers["counts"] = sp.csr_matrix(small)
    data.write_h5ad(tmp_path / "a.h5ad")
    refuse(tmp_path / "a.h5ad", "has no X: pass --layer counts")


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
@pytest.mark.parametrize(
    ("value", "pattern"),
    [
        (-3.0, "X of .*a.h5ad holds -3 for cell 'cell39', gene '{gene}': counts cannot be negative"),
        (np.nan, "holds nan for cell 'cell39', gene '{gene}': counts must be finite"),
        (np.inf, "holds inf for cell 'cell39', gene '{gene}': counts must be finite"),
        (0.5, "holds 0.5 for cell 'cell39', gene '{gene}': wanted raw integer counts"),
    ],
)
def test_values_that_are_no_counts(tmp_path: Path, write_h5ad, small, genes, form, value, pattern) -> None:  # type: ignore[no-untyped-def]
    bad = small.astype(float)
    bad[39, 599] = value
    refuse(write_h5ad(tmp_path / "a.h5ad", bad, genes, form=form), pattern.format(gene=genes[599]))


def normalised(counts: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = counts / np.maximum(counts.sum(1, keepdims=True), 1) * 10_000
    return scaled


def test_log_normalised_data_is_recognised(tmp_path: Path, write_h5ad, small, genes) -> None:  # type: ignore[no-untyped-def]
    logged = np.log1p(normalised(small))
    path = write_h5ad(tmp_path / "a.h5ad", logged, genes)
    refuse(path, "look log-normalised .*get the raw counts, or pass --allow-floats")
    path = write_h5ad(tmp_path / "a.h5ad", logged, genes, layers={"scaled": logged - 1, "umi": small})
    refuse(path, "look log-normalised .*pass --layer umi, which holds integers")
    refuse(path, "cannot be negative .*pass --layer umi, which holds integers", layer="scaled")
    path = write_h5ad(tmp_path / "a.h5ad", small, genes, layers={"logged": logged})
    refuse(path, r"pass X \(leave --layer and --use-raw out\), which holds integers", layer="logged")
    refuse(write_h5ad(tmp_path / "a.h5ad", normalised(small), genes), "look normalised to one total a cell")
    refuse(write_h5ad(tmp_path / "a.h5ad", np.sqrt(small), genes), "look (log-transformed or )?normalised")


def test_raw_with_other_genes(tmp_path: Path, small, genes) -> None:  # type: ignore[no-untyped-def]
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
    convert([path], tmp_path / "raw.store", use_raw=True)
    store = CellStore.open(tmp_path / "raw.store")
    assert store.gene_ids == tuple(genes)
    assert store.manifest["sources"][0]["matrix"] == "raw/X"
    assert all(np.array_equal(store[i][1], small[i][small[i] > 0]) for i in range(40))


def test_duplicate_cell_ids(tmp_path: Path, write_h5ad, small, genes) -> None:  # type: ignore[no-untyped-def]
    obs = pd.DataFrame(index=[f"c{i}" for i in range(39)] + ["c4"])
    path = write_h5ad(tmp_path / "a.h5ad", small, genes, obs=obs)
    refuse(path, r"names cell 'c4' twice \(cells 4 and 39\): make obs_names unique")


def test_no_cells_or_no_genes(tmp_path: Path, write_h5ad, small, genes) -> None:  # type: ignore[no-untyped-def]
    refuse(write_h5ad(tmp_path / "a.h5ad", small[:0], genes), "holds 0 cells and 600 genes")
    refuse(write_h5ad(tmp_path / "b.h5ad", small[:, :0], []), "holds 40 cells and 0 genes")


def test_shapes_that_disagree(tmp_path: Path, write_h5ad, small, genes) -> None:  # type: ignore[no-untyped-def]
    path = write_h5ad(tmp_path / "a.h5ad", small, genes)
    with h5py.File(path, "r+") as file:
        file["X"].attrs["shape"] = (40, 601)
    refuse(path, "X is 40 x 601, but obs names 40 cells and var 600 genes")


def test_an_index_beyond_the_genes(tmp_path: Path, write_h5ad, small, genes) -> None:  # type: ignore[no-untyped-def]
    path = write_h5ad(tmp_path / "a.h5ad", small, genes)
    with h5py.File(path, "r+") as file:
        file["X/indices"][-1] = 600
    refuse(path, "is damaged: X names gene 600 of 600")


def test_the_file_is_closed_again(tmp_path: Path, write_h5ad, small, genes) -> None:  # type: ignore[no-untyped-def]
    path = write_h5ad(tmp_path / "a.h5ad", small, genes)
    with open_h5ad(path) as source:
        assert source.matrix.shape == (40, 600)
    assert not source.file
