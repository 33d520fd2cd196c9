"""Sources that hold what is no count, or name cells twice: one sentence each."""

from contextlib import closing
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest

from celltron.cells.ingest.h5ad import open_h5ad
from celltron.cells.ingest.source import SourceOptions
from celltron.core import InputError


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


PATTERNS = {
    -3.0: "X of .*a.h5ad holds -3 for cell 'cell39', gene '{gene}': counts cannot be negative",
    np.nan: "holds nan for cell 'cell39', gene '{gene}': counts must be finite",
    np.inf: "holds inf for cell 'cell39', gene '{gene}': counts must be finite",
    0.5: "holds 0.5 for cell 'cell39', gene '{gene}': wanted raw integer counts",
}


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
@pytest.mark.parametrize("value", PATTERNS)
def test_values_that_are_no_counts(tmp_path: Path, refuse, write_h5ad, small, genes, form, value) -> None:  # type: ignore[no-untyped-def]
    bad = small.astype(float)
    bad[39, 599] = value
    refuse(write_h5ad(tmp_path / "a.h5ad", bad, genes, form=form), PATTERNS[value].format(gene=genes[599]))


def normalised(counts: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = counts / np.maximum(counts.sum(1, keepdims=True), 1) * 10_000
    return scaled


def test_log_normalised_data_is_recognised(tmp_path: Path, refuse, write_h5ad, small, genes) -> None:  # type: ignore[no-untyped-def]
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


def test_duplicate_cell_ids(tmp_path: Path, refuse, write_h5ad, small, genes) -> None:  # type: ignore[no-untyped-def]
    obs = pd.DataFrame(index=[f"c{i}" for i in range(39)] + ["c4"])
    path = write_h5ad(tmp_path / "a.h5ad", small, genes, obs=obs)
    refuse(path, r"names cell 'c4' twice \(cells 4 and 39\): make obs_names unique")


def test_an_index_beyond_the_genes(tmp_path: Path, refuse, write_h5ad, small, genes) -> None:  # type: ignore[no-untyped-def]
    path = write_h5ad(tmp_path / "a.h5ad", small, genes)
    with h5py.File(path, "r+") as file:
        file["X/indices"][-1] = 600
    refuse(path, "is damaged: X names gene 600 of 600")
