"""Small data made on the spot: counts of invented cells over real gene ids, as .h5ad files and as a store."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from celltron.cells import CellStore, convert
from celltron.core import load_published_geneformer

WriteH5ad = Callable[..., Path]


@pytest.fixture(scope="session")
def genes() -> list[str]:
    """600 genes that both published dictionaries know, in an order that is not the vocabularies'."""
    small = set(load_published_geneformer("gc95M")[0].genes)
    known = [gene for gene in load_published_geneformer("gc30M")[0].genes if gene in small]
    return [known[i] for i in np.random.default_rng(5).permutation(len(known))[:600]]


@pytest.fixture(scope="session")
def counts() -> np.ndarray:
    """400 cells x 600 genes: depths from few to many counts, an empty cell (7), counts above 255."""
    random = np.random.default_rng(3)
    depth_C = random.lognormal(0.0, 0.8, size=400)
    rate_G = random.lognormal(-1.0, 1.6, size=600)
    dense = random.poisson(depth_C[:, None] * rate_G).astype(np.int64)
    dense[7] = 0
    dense[11, 5] = 70_000
    return dense


@pytest.fixture(scope="session")
def obs() -> pd.DataFrame:
    """Three donors of unequal size (one cell without), a number, a truth value, text beyond ASCII."""
    random = np.random.default_rng(4)
    donors = random.choice(["Ana", "Bo", "Çelik"], p=[0.5, 0.3, 0.2], size=400).astype(object)
    donors[3] = None
    return pd.DataFrame(
        {
            "donor": pd.Categorical(donors),
            "age": random.integers(20, 80, 400),
            "score": random.normal(size=400).astype(np.float32),
            "is_doublet": random.random(400) < 0.1,
            "note": [f"μ{i}" for i in range(400)],
            "total_counts": np.arange(400.0),
        },
        index=[f"cell{i}" for i in range(400)],
    )


@pytest.fixture(scope="session")
def write_h5ad() -> WriteH5ad:
    """Writes counts as an .h5ad file: ``form`` is csr, csc or dense."""

    def write(
        path: Path,
        counts: np.ndarray,
        names: list[str],
        *,
        obs: pd.DataFrame | None = None,
        var: pd.DataFrame | None = None,
        form: str = "csr",
        dtype: Any = np.float32,
        **more: Any,
    ) -> Path:
        forms = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}
        obs = pd.DataFrame(index=[f"cell{i}" for i in range(len(counts))]) if obs is None else obs
        var = pd.DataFrame(index=names) if var is None else var
        anndata.AnnData(forms[form](np.asarray(counts).astype(dtype)), obs=obs, var=var, **more).write_h5ad(path)
        return path

    return write


@pytest.fixture(scope="session")
def store(
    tmp_path_factory: pytest.TempPathFactory,
    write_h5ad: WriteH5ad,
    counts: np.ndarray,
    genes: list[str],
    obs: pd.DataFrame,
) -> CellStore:
    """The invented cells as a store of three shards."""
    folder = tmp_path_factory.mktemp("store")
    convert([write_h5ad(folder / "a.h5ad", counts, genes, obs=obs)], folder / "a.store", shard_cells=150)
    return CellStore.open(folder / "a.store")


@pytest.fixture
def fresh_store(tmp_path: Path, write_h5ad: WriteH5ad, counts: np.ndarray, genes: list[str]) -> Path:
    """A small store of two shards that a test may damage."""
    convert([write_h5ad(tmp_path / "f.h5ad", counts[:20], genes)], tmp_path / "f.store", shard_cells=12)
    return tmp_path / "f.store"
