"""One set of measured cells, converted from every format, gives one and the same store, cell by cell."""

from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp

from celltron.cells import CellStore, convert


@pytest.fixture(scope="session")
def cells(real: anndata.AnnData) -> anndata.AnnData:
    return real[:150, :900].copy()


def write_tenx_folder(path: Path, cells: anndata.AnnData) -> None:
    path.mkdir()
    scipy.io.mmwrite(path / "matrix.mtx", sp.coo_matrix(cells.X.T.astype(np.int64)))
    (path / "barcodes.tsv").write_text("".join(f"{name}\n" for name in cells.obs_names))
    genes = zip(cells.var_names, cells.var["gene_symbol"], strict=True)
    (path / "features.tsv").write_text("".join(f"{gene}\t{name}\tGene Expression\n" for gene, name in genes))


def write_tenx_h5(path: Path, cells: anndata.AnnData) -> None:
    counts = sp.csr_matrix(cells.X)
    with h5py.File(path, "w") as file:
        for name in ("data", "indices", "indptr"):
            file[f"matrix/{name}"] = getattr(counts, name)
        file["matrix/shape"] = counts.shape[::-1]
        file["matrix/barcodes"] = np.array(list(cells.obs_names), dtype="S")
        file["matrix/features/id"] = np.array(list(cells.var_names), dtype="S")
        file["matrix/features/name"] = np.array(list(cells.var["gene_symbol"]), dtype="S")


def write_loom(path: Path, cells: anndata.AnnData) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("matrix", data=cells.X.T.toarray(), chunks=(64, 64), compression="gzip")
        file["col_attrs/CellID"] = list(cells.obs_names)
        file["row_attrs/Accession"] = list(cells.var_names)
        file["row_attrs/Gene"] = list(cells.var["gene_symbol"])


def write_soma(path: Path, cells: anndata.AnnData) -> None:
    pytest.importorskip("tiledbsoma")
    import tiledbsoma.io

    tiledbsoma.io.from_anndata(str(path), cells, measurement_name="RNA")


FORMATS = {
    "a.zarr": lambda path, cells: cells.write_zarr(path),
    "tenx": write_tenx_folder,
    "tenx.h5": write_tenx_h5,
    "a.loom": write_loom,
    "soma": write_soma,
}


@pytest.fixture(scope="session")
def wanted(tmp_path_factory: pytest.TempPathFactory, cells: anndata.AnnData) -> CellStore:
    folder = tmp_path_factory.mktemp("h5ad")
    cells.write_h5ad(folder / "a.h5ad")
    convert([folder / "a.h5ad"], folder / "store", shard_cells=64)
    return CellStore.open(folder / "store")


@pytest.mark.parametrize("name", FORMATS)
def test_one_store(tmp_path: Path, cells: anndata.AnnData, wanted: CellStore, name: str) -> None:
    FORMATS[name](tmp_path / name, cells)
    convert([tmp_path / name], tmp_path / "store", shard_cells=64)
    store = CellStore.open(tmp_path / "store")
    assert list(store.genes["gene_id"]) == list(wanted.genes["gene_id"])
    assert list(store.obs["cell_id"]) == list(cells.obs_names)
    assert np.array_equal(store.total_counts, wanted.total_counts)
    for cell in range(len(cells)):
        for found, there in zip(store[cell], wanted[cell], strict=True):
            assert found.dtype == there.dtype and np.array_equal(found, there)
