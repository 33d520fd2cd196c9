import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celltron.cells import CellStore, Split, split_cells
from celltron.cells.split import MISSING, _draw_groups
from celltron.core import InputError


@settings(max_examples=40, deadline=None)
@given(fraction=st.floats(0.001, 0.999), seed=st.integers(0, 2**62))
def test_cells_fall_on_one_side_each(store: CellStore, fraction: float, seed: int) -> None:
    split = split_cells(store, by="cell", validation_fraction=fraction, seed=seed)
    assert np.array_equal(np.sort(np.concatenate([split.train, split.validation])), np.arange(400))
    assert np.all(np.diff(split.train) > 0) and np.all(np.diff(split.validation) > 0)
    assert len(split.validation) == min(max(1, round(400 * fraction)), 399)
    assert split.train.dtype == split.validation.dtype == np.int64
    again = split_cells(store, by="cell", validation_fraction=fraction, seed=seed)
    assert np.array_equal(again.validation, split.validation) and again.manifest == split.manifest


def test_the_seed_matters(store: CellStore) -> None:
    lists = [split_cells(store, by="cell", validation_fraction=0.1, seed=seed).validation for seed in range(3)]
    assert len({tuple(cells) for cells in lists}) == 3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
def test_groups_stay_whole(store: CellStore, obs: pd.DataFrame, seed: int, fraction: float) -> None:
    split = split_cells(store, by="donor", validation_fraction=fraction, seed=seed)
    donors = obs["donor"].astype(object).where(obs["donor"].notna(), MISSING).to_numpy()
    assert not set(donors[split.train]) & set(donors[split.validation])
    assert len(split.train) and len(split.validation)
    groups = split.manifest["groups"]
    assert {name: group["cells"] for name, group in groups.items()} == dict(pd.Series(donors).value_counts())
    for name, group in groups.items():
        assert (group["side"] == "validation") == (name in set(donors[split.validation]))


def test_named_groups(store: CellStore, obs: pd.DataFrame) -> None:
    split = split_cells(store, by="donor", validation_fraction=0.5, seed=0, validation_groups=["Çelik"])
    assert np.array_equal(split.validation, np.flatnonzero(obs["donor"] == "Çelik"))


def test_numbers_and_truth_values_are_groups_too(store: CellStore, obs: pd.DataFrame) -> None:
    split = split_cells(store, by="is_doublet", validation_fraction=0.1, seed=0, validation_groups=["True"])
    assert np.array_equal(split.validation, np.flatnonzero(obs["is_doublet"]))
    split_cells(store, by="age", validation_fraction=0.1, seed=0)


@given(
    sizes=st.lists(st.integers(1, 1000), min_size=2, max_size=12),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 99),
)
def test_drawn_groups_come_near_the_fraction(sizes: list[int], fraction: float, seed: int) -> None:
    counts = {f"g{i}": size for i, size in enumerate(sizes)}
    chosen = _draw_groups(counts, fraction, seed, "donor")
    assert 0 < len(chosen) < len(counts)
    share = sum(counts[name] for name in chosen) / sum(sizes)
    assert abs(share - fraction) <= max(sizes) / sum(sizes)


@pytest.mark.parametrize("by", ["cell", "donor"])
def test_a_manifest_gives_the_split_again(store: CellStore, tmp_path: Path, by: str) -> None:
    split = split_cells(store, by=by, validation_fraction=0.2, seed=9)
    split.write(tmp_path / "split.json")
    read = Split.read(tmp_path / "split.json", CellStore.open(store.path))
    assert np.array_equal(read.train, split.train) and np.array_equal(read.validation, split.validation)
    assert read.manifest == split.manifest == json.loads((tmp_path / "split.json").read_text())


def test_another_store_is_refused(store: CellStore, fresh_store: Path, tmp_path: Path) -> None:
    split_cells(store, by="cell", validation_fraction=0.2, seed=9).write(tmp_path / "split.json")
    with pytest.raises(InputError, match="belongs to another store"):
        Split.read(tmp_path / "split.json", CellStore.open(fresh_store))


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda m: m.update(format="x"), "no celltron-split manifest"),
        (lambda m: m.update(version=2), "version 2, wanted 1"),
        (lambda m: m["validation"].update(sha256="0"), "its validation are not what its rule gives"),
        (lambda m: m["rule"].update(seed=10), "damaged"),
        (lambda m: m["rule"].update(validation_fraction=0.3), "damaged"),
        (lambda m: m["rule"].update(seed="9"), "incomplete"),
        (lambda m: m["rule"].update(validation_groups=[1]), "incomplete"),
        (lambda m: m["rule"].pop("by"), "incomplete"),
        (lambda m: m.update(rule=[]), "incomplete"),
        (lambda m: m.pop("store"), "incomplete"),
    ],
)
def test_a_changed_manifest_is_refused(
    store: CellStore, tmp_path: Path, change: Callable[[dict[str, Any]], None], pattern: str
) -> None:
    manifest = split_cells(store, by="cell", validation_fraction=0.2, seed=9).manifest
    manifest = json.loads(json.dumps(manifest))
    change(manifest)
    (tmp_path / "split.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=pattern):
        Split.read(tmp_path / "split.json", store)


def test_what_is_no_manifest(store: CellStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no split manifest at"):
        Split.read(tmp_path / "none.json", store)
    for text in ("{", "[]", "\x00", "[" * 50_000):
        (tmp_path / "split.json").write_text(text)
        with pytest.raises(InputError, match=r"split.json"):
            Split.read(tmp_path / "split.json", store)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"validation_fraction": 0.0}, "validation_fraction is 0.0"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"by": "patient"}, "no obs column 'patient': it has .*donor"),
        ({"by": "source"}, "the one group a.h5ad: a split by it needs at least 2"),
        ({"by": "donor", "validation_groups": ["Anna"]}, "no group 'Anna': did you mean 'Ana'"),
        ({"by": "donor", "validation_groups": ["zzz"]}, "no group 'zzz': it has .*Ana"),
        ({"by": "donor", "validation_groups": []}, "leaves no validation cells"),
        ({"by": "donor", "validation_groups": ["Ana", "Bo", "Çelik", MISSING]}, "leaves no train cells"),
        ({"validation_groups": ["Ana"]}, "set by to their obs column"),
    ],
)
def test_what_is_refused(store: CellStore, options: dict[str, Any], pattern: str) -> None:
    with pytest.raises(InputError, match=pattern):
        split_cells(store, **({"by": "cell", "validation_fraction": 0.1, "seed": 0} | options))
