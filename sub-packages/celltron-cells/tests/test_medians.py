"""Medians against numpy's on dense counts, to the last bit, whatever was sampled, held in memory or written to disk."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celltron.cells import CellStore, compute_medians, median_runs, medians
from celltron.cells.collection import CellCollection
from celltron.cells.median_runs import ValueRuns
from celltron.core import InputError

from .small_store import write_small_store

GENES = [f"ENSG{i:011d}" for i in range(40)]


def reference(counts_CG: np.ndarray, totals: np.ndarray) -> dict[str, float]:
    """Each gene that was seen and numpy's median of its values."""
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled_CG = counts_CG.astype(np.float64) / totals[:, None] * 10_000.0
    columns = zip(GENES, counts_CG.T, scaled_CG.T, strict=True)
    return {gene: float(np.median(scaled[counts > 0])) for gene, counts, scaled in columns if (counts > 0).any()}


def make_counts(seed: int, num_cells: int = 300) -> np.ndarray:
    """Genes from ever-present to never seen, counts with many ties, some empty cells."""
    random = np.random.default_rng(seed)
    counts_CG = random.poisson(random.lognormal(-1.5, 2.0, size=40), size=(num_cells, 40))
    counts_CG[random.random(num_cells) < 0.05] = 0
    counts_CG[:, 7] = 0
    counts_CG[:, 8] = random.integers(1, 3, num_cells)
    return counts_CG


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., CellStore]:
    def make(counts_CG: np.ndarray, **more: Any) -> CellStore:
        return CellStore.open(write_small_store(tmp_path / "a.store", counts_CG, GENES, shard_cells=64, **more))

    return make


@pytest.fixture
def tiny_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few hundred values fit in memory, so that a small store is sampled and spilled as a large one would be."""
    monkeypatch.setattr(medians, "SAMPLE_VALUES", 600)
    monkeypatch.setattr(medians, "CELLS_AT_ONCE", 100)
    monkeypatch.setattr(medians, "VALUES_AT_ONCE", 512)
    monkeypatch.setattr(medians, "PROBE_CELLS", 16)
    monkeypatch.setattr(median_runs, "RUN_VALUES", 256)
    monkeypatch.setattr(median_runs, "VALUES_IN_MEMORY", 512)


def as_dict(table: Any) -> dict[str, float]:
    return dict(zip(table.genes, table.values.tolist(), strict=True))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_they_are_numpys_to_the_last_bit(make_store: Callable[..., CellStore], seed: int, version: int) -> None:
    counts_CG = make_counts(seed)
    totals = counts_CG.sum(1) + np.random.default_rng(seed).integers(0, 50, len(counts_CG))  # genes that were left out
    found = compute_medians(make_store(counts_CG, totals=totals, version=version))
    assert as_dict(found) == reference(counts_CG, totals)
    assert list(found.genes) == [gene for gene in GENES if gene in found.genes] and GENES[7] not in found.genes


@pytest.mark.parametrize(("seed", "workers"), [(0, 1), (1, 2), (2, 5)])
@pytest.mark.usefixtures("tiny_memory")
def test_sampled_and_spilled_they_are_the_same(
    make_store: Callable[..., CellStore], tmp_path: Path, seed: int, workers: int
) -> None:
    counts_CG = make_counts(seed, 1000)
    (tmp_path / "scratch").mkdir()
    found = compute_medians(make_store(counts_CG), workers=workers, scratch=tmp_path / "scratch")
    assert as_dict(found) == reference(counts_CG, counts_CG.sum(1))
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("run_values", [1, 10**6])
@pytest.mark.parametrize("in_memory", [1, 3000, 10**7])
def test_whatever_fits_in_memory(
    make_store: Callable[..., CellStore], monkeypatch: pytest.MonkeyPatch, run_values: int, in_memory: int
) -> None:
    monkeypatch.setattr(median_runs, "RUN_VALUES", run_values)
    monkeypatch.setattr(median_runs, "VALUES_IN_MEMORY", in_memory)
    counts_CG = make_counts(11, 100)
    assert as_dict(compute_medians(make_store(counts_CG), workers=2)) == reference(counts_CG, counts_CG.sum(1))


@pytest.mark.usefixtures("tiny_memory")
def test_missed_brackets_are_passed_over_again(
    make_store: Callable[..., CellStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(medians, "DEVIATIONS", 0.0)
    counts_CG, seen = make_counts(5, 1000), []
    found = compute_medians(make_store(counts_CG), progress=lambda done, total: seen.append((done, total)))
    assert as_dict(found) == reference(counts_CG, counts_CG.sum(1))
    assert seen[-1][0] == seen[-1][1] > 2 * len(counts_CG) and seen == sorted(seen)


@pytest.mark.usefixtures("tiny_memory")
def test_brackets_keep_little(make_store: Callable[..., CellStore], monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of 500 values keeps about 5 / sqrt(500) = 22 % of a gene that every cell has, and misses nothing."""
    monkeypatch.setattr(medians, "SAMPLE_VALUES", 2000)
    counts_CG = np.zeros((4000, 40), dtype=np.int64)
    counts_CG[:, 3] = np.random.default_rng(0).integers(1, 10**6, 4000)
    store = make_store(counts_CG, totals=np.full(4000, 10**7))
    kept: list[int] = []
    real = ValueRuns.counts
    monkeypatch.setattr(ValueRuns, "counts", lambda runs: kept.append(int(real(runs)[3])) or real(runs))
    assert as_dict(compute_medians(store)) == reference(counts_CG, np.full(4000, 10**7))
    assert max(kept[:1]) == 500 and 0.15 < kept[-1] / 4000 < 0.3


def test_order_and_place_of_the_cells_do_not_matter(make_store: Callable[..., CellStore]) -> None:
    counts_CG = make_counts(2)
    store = make_store(counts_CG)
    cells = np.random.default_rng(0).permutation(300)[:51]
    assert as_dict(compute_medians(store, cells=cells)) == reference(counts_CG[cells], counts_CG[cells].sum(1))
    assert compute_medians(store, cells=np.sort(cells)) == compute_medians(store, cells=cells)
    twice = compute_medians(store, cells=[0, 0, 0, 1])
    assert as_dict(twice) == reference(counts_CG[[0, 0, 0, 1]], counts_CG[[0, 0, 0, 1]].sum(1))


@pytest.mark.usefixtures("tiny_memory")
def test_chosen_cells_sampled(make_store: Callable[..., CellStore]) -> None:
    counts_CG = make_counts(3, 1000)
    cells = np.random.default_rng(0).permutation(1000)[:700]
    found = compute_medians(make_store(counts_CG), cells=cells)
    assert as_dict(found) == reference(counts_CG[cells], counts_CG[cells].sum(1))


@pytest.mark.parametrize("sample_values", [600, 10**7])
def test_of_a_collection_they_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample_values: int) -> None:
    monkeypatch.setattr(medians, "SAMPLE_VALUES", sample_values)
    counts_CG = make_counts(9, 1000)
    own = np.arange(39, 9, -1)  # the second store has 30 of the genes, the other way round, and one that is a mouse's
    first = write_small_store(tmp_path / "a.store", counts_CG[:600], GENES, shard_cells=500)
    mouse = np.arange(1, 401)[:, None]
    other = np.concatenate([counts_CG[600:, own], mouse], axis=1)
    second = write_small_store(tmp_path / "b.store", other, [GENES[i] for i in own] + ["ENSMUSG00000000001"])
    collection = CellCollection.open([first, second])
    found = as_dict(compute_medians(collection, workers=2))
    both, totals = counts_CG.copy(), np.concatenate([counts_CG[:600].sum(1), other.sum(1)])
    both[600:, :10] = 0
    mouse_values = mouse[:, 0] / other.sum(1) * 10_000
    assert found == reference(both, totals) | {"ENSMUSG00000000001": float(np.median(mouse_values))}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_values_by_rank(data: st.DataObject) -> None:
    """Ranks of values in memory, on disk, and streamed, against sorted values."""
    values = data.draw(st.lists(st.tuples(st.integers(0, 2), st.floats(1e-300, 1e300)), min_size=1, max_size=60))
    genes, numbers = np.array([g for g, _ in values], np.uint32), np.array([v for _, v in values])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(median_runs, "RUN_VALUES", data.draw(st.sampled_from([1, 7, 1000])))
        patch.setattr(median_runs, "VALUES_IN_MEMORY", data.draw(st.sampled_from([1, 20, 1000])))
        with ValueRuns(3) as runs:
            for start in range(0, len(values), 5):
                runs.add(genes[start : start + 5], numbers[start : start + 5])
            counts = runs.counts()
            assert counts.tolist() == np.bincount(genes, minlength=3).tolist()
            high = np.array([data.draw(st.integers(0, max(0, int(n) - 1))) for n in counts])
            low = np.where(counts > 0, high // 2, -1)
            selected = runs.select(low, high, workers=2)
    for gene in range(3):
        own = np.sort(numbers[genes == gene])
        expected = [own[low[gene]], own[high[gene]]] if len(own) else [np.nan, np.nan]
        assert np.array_equal(selected[gene], expected, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "dtype", "value"),
    [
        ("totals", "<f8", 0.0),
        ("totals", "<f8", np.nan),
        ("totals", "<f8", np.inf),
        ("totals", "<f8", -3.0),
        ("counts", "u1", 0),
        ("indices", "<u2", 40),
    ],
)
def test_a_damaged_store_is_a_sentence(tmp_path: Path, name: str, dtype: str, value: float) -> None:
    path = write_small_store(tmp_path / "a.store", np.full((12, 40), 2), GENES)
    array = np.fromfile(path / f"shards/00001/{name}.bin", dtype)
    array[1] = value
    array.tofile(path / f"shards/00001/{name}.bin")
    cell = 9 if name == "totals" else 8
    with pytest.raises(InputError, match=rf"a.store is damaged: cell {cell} has .* run celltron verify"):
        compute_medians(CellStore.open(path), workers=2)


def test_fractions_as_counts(make_store: Callable[..., CellStore]) -> None:
    counts_CG = (make_counts(1) * np.float32(0.37)).astype(np.float32)
    totals = counts_CG.sum(1, dtype=np.float64)
    assert as_dict(compute_medians(make_store(counts_CG, totals=totals))) == reference(counts_CG, totals)


@pytest.mark.usefixtures("tiny_memory")
def test_a_full_disk_is_a_sentence(
    make_store: Callable[..., CellStore], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_space(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = make_store(make_counts(3, 1000))
    monkeypatch.setattr(median_runs.os, "write", no_space)
    with pytest.raises(InputError, match=f"{tmp_path} is full: 0.0 GB .* TMPDIR"):
        compute_medians(store, scratch=tmp_path)
    monkeypatch.undo()


def test_no_such_scratch_folder(make_store: Callable[..., CellStore], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder .*nowhere for scratch"):
        compute_medians(make_store(make_counts(3, 1000)), scratch=tmp_path / "nowhere")


def test_progress_ends_full(make_store: Callable[..., CellStore], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(medians, "CELLS_AT_ONCE", 64)
    seen: list[tuple[int, int]] = []
    compute_medians(make_store(make_counts(0)), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 300) for done in (64, 128, 192, 256, 300)]


@pytest.mark.parametrize("cells", [[], [7], None])
def test_cells_without_counts_have_no_medians(make_store: Callable[..., CellStore], cells: list[int] | None) -> None:
    counts_CG = np.zeros((9, 40), dtype=np.int64)
    if cells is not None:
        counts_CG[1] = 1
    num = 9 if cells is None else len(cells)
    with pytest.raises(InputError, match=f"no gene has a count in the {num} cells asked of .*a.store"):
        compute_medians(make_store(counts_CG), cells=cells)


def test_workers_must_be_some(make_store: Callable[..., CellStore]) -> None:
    with pytest.raises(InputError, match="workers is 0"):
        compute_medians(make_store(make_counts(0)), workers=0)
