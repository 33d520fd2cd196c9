"""What `celltron info` says of a store, against numpy and pandas."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from celltron.cells import CellStore, describe
from celltron.cells.describe import count_lengths, describe_store
from celltron.core import InputError

from .small_store import seal, write_small_store

GENES = [f"ENSG{i:011d}" for i in range(30)]


@pytest.fixture(name="counts_CG")
def make_counts() -> np.ndarray:
    counts_CG = np.random.default_rng(0).poisson(0.7, (101, 30))
    counts_CG[5] = 0
    counts_CG[9, 3] = 400
    counts_CG[77, 3] = 70_000
    return counts_CG


@pytest.fixture
def store(tmp_path: Path, counts_CG: np.ndarray) -> CellStore:
    obs = pd.DataFrame(
        {
            "donor": pd.Categorical(
                np.where(np.arange(101) < 50, "Ana", "Çelik"), categories=["never", "Çelik", "Ana"]
            ),
            "age": np.arange(101) % 40 + 20,
            "score": np.where(np.arange(101) == 3, np.nan, np.linspace(-1, 1, 101)).astype(np.float32),
            "is_doublet": np.arange(101) == 100,
            "note": ["same", None, "\x1b[31mred\n"] * 33 + ["x" * 500, None],
        },
        index=[f"cell{i}" for i in range(101)],
    )
    return CellStore.open(write_small_store(tmp_path / "a.store", counts_CG, GENES, obs=obs, shard_cells=40))


def line(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(start)).strip()


def test_sizes(store: CellStore, counts_CG: np.ndarray) -> None:
    text, nnz = describe_store(store), (counts_CG > 0).sum()
    size = sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file() and path.suffix != ".json")
    assert f"101 cells x 30 genes (human), {nnz:,} non-zero counts" in text
    assert f"{size / 1e6:,.1f} MB ({size / nnz:.2f} bytes a non-zero count)" in text
    assert line(text, "3 shards") == ("3 shards; gene indices uint16; counts uint16 in 1, uint32 in 1, uint8 in 1")
    assert line(text, "source") == "source: a.h5ad, 101 cells from X, genes by the index of var"
    assert line(text, "genes without") == "genes without an Ensembl id: 2 (25.00% of the counts)"
    assert store.info() == text


def test_lengths_are_numpys(store: CellStore, counts_CG: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (counts_CG > 0).sum(1)
    assert np.array_equal(count_lengths(store), np.bincount(lengths, minlength=31))
    monkeypatch.setattr(describe, "LONG_CELL", 14)
    least, five, median, ninety_five, most = np.quantile(lengths, [0, 0.05, 0.5, 0.95, 1], method="inverted_cdf")
    assert line(describe_store(store), "genes a cell") == (
        f"genes a cell: least {least}, 5% {five}, median {median}, mean {lengths.mean():.1f}, 95% {ninety_five}, most "
        f"{most}; {(lengths > 14).mean():.1%} of the cells have more than 14"
    )


def test_columns(store: CellStore, counts_CG: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    text = describe_store(store)
    totals = counts_CG.sum(1)
    assert line(text, "obs:") == "obs: 8 columns"
    assert line(text, "cell_id") == "cell_id: text, 101 values: cell0, cell1, cell2, cell3, cell4, …"
    assert line(text, "source: category") == "source: category, 1 value: a.h5ad"
    assert line(text, "total_counts") == f"total_counts: float64, {totals.min():,} to {totals.max():,}"
    assert line(text, "donor") == "donor: category, 2 values: Ana, Çelik"
    assert line(text, "age") == "age: int64, 20 to 59"
    assert line(text, "score") == "score: float32, -1 to 1, 1 missing"
    assert line(text, "is_doublet") == "is_doublet: bool, 2 values: False, True"
    assert line(text, "note") == rf"note: text, 3 values: same, \x1b[31mred\n, {'x' * 59}…, 34 missing"
    monkeypatch.setattr(describe, "MOST_VALUES", 100)
    assert line(describe_store(store), "cell_id") == "cell_id: text, more than 100 values"


@pytest.mark.parametrize("num_cells", [0, 1])
def test_of_hardly_anything(tmp_path: Path, num_cells: int) -> None:
    path = write_small_store(tmp_path / "b.store", np.zeros((num_cells, 30), dtype=np.int64), GENES)
    text = describe_store(CellStore.open(path))
    assert f"{num_cells} cells x 30 genes (human), 0 non-zero counts" in text
    wanted = "there are no cells" if num_cells == 0 else "least 0, 5% 0, median 0, mean 0.0, 95% 0, most 0; 0.0% of the"
    assert line(text, "genes a cell").startswith(f"genes a cell: {wanted}")


def test_many_sources(store: CellStore) -> None:
    store.manifest["sources"] = [
        {"name": f"\x07{i}", "matrix": "X", "gene_column": "id", "cells": 1} for i in range(30)
    ]
    text = describe_store(store)
    assert "source: 10 more, 10 cells" in text and r"source: \x070, 1 cells" in text and "\x07" not in text


def test_nothing_reaches_the_terminal(store: CellStore) -> None:
    store.manifest["species"] = "\x9b31mhuman"
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", describe_store(CellStore(store.path, store.manifest))) is None


def test_version_1(tmp_path: Path, counts_CG: np.ndarray) -> None:
    text = describe_store(CellStore.open(write_small_store(tmp_path / "b.store", counts_CG, GENES, version=1)))
    assert "celltron-cellstore version 1" in text and "counts uint32" in text


def test_damage_is_a_sentence(store: CellStore) -> None:
    (store.path / "shards/00001/obs.parquet").write_bytes(b"no parquet")
    seal(store.path)
    with pytest.raises(InputError, match="00001/obs.parquet is damaged"):
        describe_store(CellStore.open(store.path))


def test_garbage_in_indptr_is_a_sentence(store: CellStore) -> None:
    np.full(41, 7, "<u8")[::-1].tofile(store.path / "shards/00000/indptr.bin")
    np.arange(41)[::-1].astype("<u8").tofile(store.path / "shards/00001/indptr.bin")
    with pytest.raises(InputError, match="00001/indptr.bin is damaged: its rows do not follow each other"):
        describe_store(CellStore.open(store.path))
