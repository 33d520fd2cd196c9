from pathlib import Path

import numpy as np
import pytest

from celltron.cells import CellStore, compute_medians, convert, medians
from celltron.core import InputError


def reference(counts: np.ndarray) -> np.ndarray:
    scaled = counts / np.maximum(counts.sum(1, keepdims=True), 1) * 10_000
    return np.array([np.median(column[column > 0]) if (column > 0).any() else np.nan for column in scaled.T])


@pytest.mark.parametrize("values_in_memory", [1, 5_000, 2**25])
def test_medians_are_numpys_to_the_last_bit(  # type: ignore[no-untyped-def]
    store: CellStore, counts: np.ndarray, genes: list[str], monkeypatch, values_in_memory: int
) -> None:
    monkeypatch.setattr(medians, "VALUES_IN_MEMORY", values_in_memory)
    table = compute_medians(store)
    expected = dict(zip(genes, reference(counts), strict=True))
    seen = [gene for gene in genes if not np.isnan(expected[gene])]
    assert list(table.genes) == seen and len(seen) < len(genes)  # a gene never seen is left out
    assert table.values.tolist() == [expected[gene] for gene in seen]


def test_of_some_cells_in_any_order(store: CellStore, counts: np.ndarray, genes: list[str]) -> None:
    cells = np.random.default_rng(0).permutation(400)[:51]
    table = compute_medians(store, cells=cells)
    expected = dict(zip(genes, reference(counts[np.sort(cells)]), strict=True))
    assert table.values.tolist() == [expected[gene] for gene in table.genes]
    assert table == compute_medians(store, cells=np.sort(cells))


def test_the_total_is_of_all_genes(tmp_path: Path, write_h5ad) -> None:  # type: ignore[no-untyped-def]
    """A gene without an Ensembl id is not in the store, but in the cell's total."""
    path = write_h5ad(tmp_path / "a.h5ad", np.array([[1, 3], [2, 2]]), ["CD3E", "no gene"])
    convert([path], tmp_path / "a.store")
    assert compute_medians(CellStore.open(tmp_path / "a.store")).values.tolist() == [(2500 + 5000) / 2]


def test_progress_ends_full(store: CellStore, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(medians, "CELLS_AT_ONCE", 64)
    seen: list[tuple[int, int]] = []
    compute_medians(store, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]


def test_cells_without_counts_have_no_medians(store: CellStore) -> None:
    with pytest.raises(InputError, match="no gene has a count in the 1 cells"):
        compute_medians(store, cells=[7])
