"""What other stores of cells get wrong, each shown to be right here."""

import os
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from celltron.cells import CellIndexError, CellStore, append, convert
from celltron.core import InputError


def dense_of(store: CellStore) -> np.ndarray:
    indptr, gene_index, counts = store.rows(np.arange(len(store)))
    dense = np.zeros((len(store), store.num_genes))
    dense[np.repeat(np.arange(len(store)), np.diff(indptr)), gene_index] = counts
    return dense


def some_counts(num_cells: int, num_genes: int, largest: int, seed: int = 0) -> np.ndarray:
    dense = np.random.default_rng(seed).poisson(1.0, (num_cells, num_genes))
    dense[0, 0] = largest
    return dense


def test_a_square_column_ordered_matrix_is_not_transposed(write_h5ad, genes: list[str], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    counts = some_counts(30, 30, 9)
    for form in (sp.csc_matrix, sp.csc_array, sp.csr_array):
        adata = anndata.AnnData(X=form(counts.astype(np.float32)))
        adata.var_names, adata.obs_names = genes[:30], [f"c{i}" for i in range(30)]
        adata.write_h5ad(tmp_path / "a.h5ad")
        convert([tmp_path / "a.h5ad"], tmp_path / "a.store", replace=True)
        assert np.array_equal(dense_of(CellStore.open(tmp_path / "a.store")), counts)


def test_a_wider_type_after_opening_again(write_h5ad, genes: list[str], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Counts beyond 255, beyond 65,535 and fractions join a store of single bytes, which is opened anew each time."""
    parts = [some_counts(20, 40, largest, seed) for seed, largest in enumerate((200, 300, 70_000))]
    for i, part in enumerate(parts):
        write_h5ad(tmp_path / f"{i}.h5ad", part, genes[:40])
    convert([tmp_path / "0.h5ad"], tmp_path / "a.store")
    assert CellStore.open(tmp_path / "a.store").dtypes["counts"] == "uint8"
    for i in (1, 2):
        append(tmp_path / "a.store", [tmp_path / f"{i}.h5ad"])
    store = CellStore.open(tmp_path / "a.store")
    store.verify()
    assert np.array_equal(dense_of(store), np.concatenate(parts))
    assert [shard["counts"] for shard in store.manifest["shards"]] == ["uint8", "uint16", "uint32"]
    fractions = some_counts(5, 40, 3, 9) / 2
    write_h5ad(tmp_path / "3.h5ad", fractions, genes[:40])
    with pytest.raises(InputError, match="wanted raw integer counts"):
        append(tmp_path / "a.store", [tmp_path / "3.h5ad"])
    append(tmp_path / "a.store", [tmp_path / "3.h5ad"], allow_floats=True)
    assert np.array_equal(dense_of(CellStore.open(tmp_path / "a.store")), np.concatenate([*parts, fractions]))


def test_a_dense_matrix_and_a_retry_after_a_failure(write_h5ad, genes: list[str], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    counts = some_counts(12, 40, 9)
    adata = anndata.AnnData(X=np.where(counts > 0, -1.0, 0.0))
    adata.var_names, adata.obs_names = genes[:40], [f"c{i}" for i in range(12)]
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(InputError, match="cannot be negative"):
        convert([tmp_path / "a.h5ad"], tmp_path / "a.store")
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5ad"]
    adata.X = counts.astype(np.float64)
    adata.write_h5ad(tmp_path / "a.h5ad")
    convert([tmp_path / "a.h5ad"], tmp_path / "a.store")
    assert np.array_equal(dense_of(CellStore.open(tmp_path / "a.store")), counts)


def test_files_of_one_name_in_two_folders(write_h5ad, genes: list[str], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    parts = [some_counts(8, 40, 9, seed) for seed in range(2)]
    for folder, part in zip("xy", parts, strict=True):
        (tmp_path / folder).mkdir()
        write_h5ad(tmp_path / folder / "a.h5ad", part, genes[:40])
    convert([tmp_path / "x" / "a.h5ad", tmp_path / "y" / "a.h5ad"], tmp_path / "a.store")
    store = CellStore.open(tmp_path / "a.store")
    assert np.array_equal(dense_of(store), np.concatenate(parts))
    assert store.obs["source"].nunique() == 2


@pytest.mark.parametrize("cell", [-1, -400, 400, 2**40])
def test_a_cell_outside_is_an_error_and_no_empty_row(store: CellStore, cell: int) -> None:
    with pytest.raises(CellIndexError):
        store[cell]


def test_reading_writes_nothing(store: CellStore, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in [store.path, *store.path.rglob("*")]}
    again = CellStore.open(store.path)
    again.verify()
    again.info()
    _ = again.obs, again.genes, again.rows(np.arange(400)), again.fingerprint
    assert {path: path.stat().st_mtime_ns for path in [store.path, *store.path.rglob("*")]} == before


def test_arrays_of_obsm_are_kept_when_asked_for(genes: list[str], tmp_path: Path) -> None:
    counts, places = some_counts(25, 40, 9), np.random.default_rng(1).normal(size=(25, 2))
    adata = anndata.AnnData(X=sp.csr_matrix(counts.astype(np.float32)), obsm={"spatial": places})
    adata.var_names, adata.obs_names = genes[:40], [f"c{i}" for i in range(25)]
    adata.write_h5ad(tmp_path / "a.h5ad")
    convert([tmp_path / "a.h5ad"], tmp_path / "a.store", obsm=["spatial"], shard_cells=10)
    kept = np.stack(CellStore.open(tmp_path / "a.store").obs_column("obsm/spatial").to_list())
    assert np.array_equal(kept, places)
    with pytest.raises(InputError, match="spatial"):
        convert([tmp_path / "a.h5ad"], tmp_path / "b.store", obsm=["X_pca"])


def test_no_torch_is_needed() -> None:
    program = "import sys, celltron.cells; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, env=dict(os.environ))
