import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celltron.cells.obs_union import MISSING
from celltron.cells.split import SPLIT_STREAM, Split, split_cells
from celltron.core import InputError, KeyedPermutation, key_from
from celltron.core.manifest import seal_manifest


class Cells:
    """A reader of obs alone."""

    def __init__(self, obs: pd.DataFrame, fingerprint: str = "f" * 64) -> None:
        self.obs, self.fingerprint, self.name = obs, fingerprint, "a.store"

    def __len__(self) -> int:
        return len(self.obs)

    @property
    def obs_columns(self) -> list[str]:
        return list(self.obs)

    def obs_column(self, name: str) -> pd.Series:
        if name not in self.obs:
            raise InputError(f"a.store has no obs column {name!r}: it has {', '.join(self.obs)}; name one of these")
        return self.obs[name]


@pytest.fixture(scope="module")
def reader() -> Cells:
    random = np.random.default_rng(4)
    donors = random.choice(["Ana", "Bo", "Çelik", "Dee", "Eve"], p=[0.4, 0.3, 0.1, 0.1, 0.1], size=400).astype(object)
    donors[3] = None
    obs = {
        "source": pd.Categorical(["a.h5ad"] * 400),
        "donor": pd.Categorical(donors),
        "age": random.integers(20, 80, 400),
        "score": random.choice([1.5, np.nan, 2.0], 400),
        "is_doublet": random.random(400) < 0.1,
        "obsm/X_pca": [np.zeros(2)] * 400,
    }
    return Cells(pd.DataFrame(obs))


def sides_of(split: Split) -> tuple[list[int], list[int], list[int]]:
    return split.train.tolist(), split.validation.tolist(), split.test.tolist()


@settings(max_examples=60, deadline=None)
@given(fraction=st.floats(0.001, 0.999), test_fraction=st.sampled_from([0.0, 0.0004, 0.1]), seed=st.integers(0, 2**62))
def test_cells_fall_on_one_side_each(reader: Cells, fraction: float, test_fraction: float, seed: int) -> None:
    if fraction + test_fraction >= 1:
        return
    split = split_cells(reader, by="cell", validation_fraction=fraction, test_fraction=test_fraction, seed=seed)
    assert np.array_equal(np.sort(np.concatenate(sides_of(split))), np.arange(400))
    for cells in (split.train, split.validation, split.test):
        assert np.all(np.diff(cells) > 0) and cells.dtype == np.int64
    most = 398 if test_fraction else 399
    assert len(split.validation) == min(max(1, round(400 * fraction)), most)
    assert len(split.test) == (
        min(max(1, round(400 * test_fraction)), 399 - len(split.validation)) if test_fraction else 0
    )
    assert split.manifest["rule"]["column"] is None


@given(num_cells=st.integers(2, 3000), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 2**62))
@settings(max_examples=40, deadline=None)
def test_the_draw_of_cells_stays_what_it_was(num_cells: int, fraction: float, seed: int) -> None:
    """The losses of earlier runs depend on it; a test side takes from the training cells alone."""
    reader = Cells(pd.DataFrame(index=range(num_cells)))
    order = KeyedPermutation(num_cells, key_from(SPLIT_STREAM, seed))(np.arange(num_cells))
    num_validation = min(max(1, round(num_cells * fraction)), num_cells - 1)
    split = split_cells(reader, by="cell", validation_fraction=fraction, seed=seed)
    assert split.validation.tolist() == sorted(order[:num_validation])
    if fraction < 0.8 and num_cells > 10:
        with_test = split_cells(reader, by="cell", validation_fraction=fraction, test_fraction=0.1, seed=seed)
        assert with_test.validation.tolist() == split.validation.tolist()
        assert set(with_test.test) < set(split.train)


def test_a_split_of_old_by_its_digests() -> None:
    """Written down from celltron 0.1: cells, donors and seeds of that time give the cells of that time."""
    obs = pd.DataFrame({"donor": pd.Categorical([f"d{i * i % 11}" for i in range(1000)])})
    by_cell = split_cells(Cells(obs), by="cell", validation_fraction=0.1, seed=7)
    by_donor = split_cells(Cells(obs), by="donor", validation_fraction=0.3, seed=7)
    assert by_cell.manifest["validation"] == {
        "cells": 100,
        "sha256": "3b153c849304980eaf4b2bf127310d645c263650f1e8d23fa77a622e75e58650",
    }
    assert by_donor.manifest["validation"] == {
        "cells": 364,
        "sha256": "0647717250ea8b806eff0b0d341a3fea2b150369c3859c53bb61ac7c0d48df98",
    }


def test_the_seed_matters(reader: Cells) -> None:
    lists = [split_cells(reader, by="cell", validation_fraction=0.1, seed=seed).validation for seed in range(3)]
    assert len({tuple(cells) for cells in lists}) == 3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("fraction", "test_fraction"), [(0.01, 0.0), (0.2, 0.2), (0.5, 0.01), (0.98, 0.01)])
def test_groups_stay_whole(reader: Cells, seed: int, fraction: float, test_fraction: float) -> None:
    split = split_cells(reader, by="donor", validation_fraction=fraction, test_fraction=test_fraction, seed=seed)
    donors = reader.obs["donor"].astype(object).where(reader.obs["donor"].notna(), MISSING).to_numpy()
    sides = {
        "train": set(donors[split.train]),
        "validation": set(donors[split.validation]),
        "test": set(donors[split.test]),
    }
    assert sum(map(len, sides.values())) == len(set().union(*sides.values())) == 6
    assert len(split.train) and len(split.validation) and bool(len(split.test)) == bool(test_fraction)
    groups = split.manifest["groups"]
    assert {name: group["cells"] for name, group in groups.items()} == dict(pd.Series(donors).value_counts())
    for name, group in groups.items():
        assert name in sides[group["side"]]
    for side, cells in zip(("train", "validation", "test"), sides_of(split), strict=True):
        digest = hashlib.sha256(np.array(cells, dtype="<i8").tobytes()).hexdigest()
        assert split.manifest[side] == {"cells": len(cells), "sha256": digest}


@given(
    sizes=st.lists(st.integers(1, 50), min_size=3, max_size=9),
    fraction=st.floats(0.01, 0.49),
    test_fraction=st.floats(0.01, 0.49),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_drawn_groups_come_near_the_fraction(
    sizes: list[int], fraction: float, test_fraction: float, seed: int
) -> None:
    """Against the sentence of the docstring, carried out group by group."""
    names = [f"g{i}" for i in range(len(sizes))]
    reader = Cells(pd.DataFrame({"g": np.repeat(names, sizes)}))
    order = [
        sorted(names)[i] for i in KeyedPermutation(len(names), key_from(SPLIT_STREAM, seed))(np.arange(len(names)))
    ]
    size_of, total = dict(zip(names, sizes, strict=True)), sum(sizes)

    def nearest(order: list[str], fraction: float, keep: int) -> list[str]:
        shares = [sum(size_of[name] for name in order[:k]) / total for k in range(1, len(order) - keep + 1)]
        return order[: 1 + min(range(len(shares)), key=lambda k: abs(shares[k] - fraction))]

    def chosen(split: Split, side: str) -> set[str]:
        return {name for name, group in split.manifest["groups"].items() if group["side"] == side}

    two = split_cells(reader, by="g", validation_fraction=fraction, seed=seed)
    assert chosen(two, "validation") == set(nearest(order, fraction, 1)) and not chosen(two, "test")
    three = split_cells(reader, by="g", validation_fraction=fraction, test_fraction=test_fraction, seed=seed)
    validation = nearest(order, fraction, 2)
    assert chosen(three, "validation") == set(validation)
    assert chosen(three, "test") == set(nearest(order[len(validation) :], test_fraction, 1))


def test_named_groups(reader: Cells) -> None:
    donors = reader.obs["donor"]
    split = split_cells(
        reader, by="donor", validation_fraction=0.5, seed=0, validation_groups=["Çelik"], test_groups=["Bo", MISSING]
    )
    assert np.array_equal(split.validation, np.flatnonzero(donors == "Çelik"))
    assert np.array_equal(split.test, np.flatnonzero((donors == "Bo") | donors.isna()))
    none = split_cells(reader, by="donor", validation_fraction=0.5, seed=0, validation_groups=["Çelik"])
    assert len(none.test) == 0 and np.array_equal(none.validation, split.validation)


def test_one_side_named_the_other_drawn(reader: Cells) -> None:
    named = split_cells(reader, by="donor", validation_fraction=0.2, seed=1, test_groups=["Ana"])
    assert np.array_equal(named.test, np.flatnonzero(reader.obs["donor"] == "Ana")) and len(named.validation)
    drawn = split_cells(
        reader, by="donor", validation_fraction=9.0, test_fraction=0.2, seed=1, validation_groups=["Ana"]
    )
    assert np.array_equal(drawn.validation, named.test) and np.array_equal(drawn.test, named.validation)


def test_numbers_and_truth_values_are_groups_too(reader: Cells) -> None:
    split = split_cells(reader, by="is_doublet", validation_fraction=0.1, seed=0, validation_groups=["True"])
    assert np.array_equal(split.validation, np.flatnonzero(reader.obs["is_doublet"]))
    groups = split_cells(reader, by="score", validation_fraction=0.1, seed=0).manifest["groups"]
    assert list(groups) == [MISSING, "1.5", "2.0"]
    groups = split_cells(reader, by="age", validation_fraction=0.1, seed=0).manifest["groups"]
    assert "21" in groups and "21.0" not in groups


@pytest.mark.parametrize(
    ("columns", "by", "taken"),
    [
        (["source", "dataset", "dataset_id"], "dataset", "dataset_id"),
        (["source", "dataset"], "dataset", "dataset"),
        (["source"], "dataset", "source"),
        (["patient", "donor", "donor_id"], "donor", "donor_id"),
        (["patient", "donor"], "donor", "donor"),
        (["patient"], "donor", "patient"),
        (["patient", "donor"], "patient", "patient"),
        (["store"], "store", "store"),
    ],
)
def test_the_column_taken_is_in_the_manifest(columns: list[str], by: str, taken: str) -> None:
    obs = pd.DataFrame({name: ["x", "y"] if name == taken else ["x", "x"] for name in columns})
    split = split_cells(Cells(obs), by=by, validation_fraction=0.5, seed=0)
    assert split.manifest["rule"]["by"] == by and split.manifest["rule"]["column"] == taken


@pytest.mark.parametrize(
    "options",
    [
        {"by": "cell"},
        {"by": "cell", "test_fraction": 0.3},
        {"by": "donor", "test_fraction": 0.3},
        {"by": "donor", "test_groups": ["Bo"], "validation_groups": ["Ana", "Eve"]},
    ],
)
def test_a_manifest_gives_the_split_again(reader: Cells, tmp_path: Path, options: dict[str, Any]) -> None:
    split = split_cells(reader, validation_fraction=0.2, seed=9, **options)
    split.write(tmp_path / "split.json")
    read = Split.read(tmp_path / "split.json", Cells(reader.obs))
    assert sides_of(read) == sides_of(split)
    assert read.manifest == split.manifest == json.loads((tmp_path / "split.json").read_text())


def as_version_1(manifest: dict[str, Any]) -> dict[str, Any]:
    """What celltron 0.1 wrote for the same split."""
    old = json.loads(json.dumps(manifest))
    old |= {"version": 1, "store": old.pop("reader")}
    for key in ("column", "test_fraction", "test_groups"):
        del old["rule"][key]
    del old["test"], old["manifest_sha256"]
    return old


@pytest.mark.parametrize("by", ["cell", "donor", "is_doublet"])
def test_version_1_is_read(reader: Cells, tmp_path: Path, by: str) -> None:
    split = split_cells(reader, by=by, validation_fraction=0.2, seed=9)
    (tmp_path / "split.json").write_text(json.dumps(as_version_1(split.manifest)))
    assert sides_of(Split.read(tmp_path / "split.json", reader)) == sides_of(split)
    old = as_version_1(split.manifest)
    old["rule"]["seed"] = 10
    (tmp_path / "split.json").write_text(json.dumps(old))
    with pytest.raises(InputError, match="damaged"):
        Split.read(tmp_path / "split.json", reader)


def test_version_1_took_columns_by_their_own_name(tmp_path: Path) -> None:
    """Beside dataset_id, a column called dataset was what ``dataset`` meant."""
    obs = pd.DataFrame({"dataset": list("xxyyzz"), "dataset_id": list("pqpqpq")})
    meant = split_cells(Cells(obs.drop(columns="dataset_id")), by="dataset", validation_fraction=0.3, seed=1)
    (tmp_path / "split.json").write_text(json.dumps(as_version_1(meant.manifest)))
    assert sides_of(Split.read(tmp_path / "split.json", Cells(obs))) == sides_of(meant)


def test_other_cells_are_refused(reader: Cells, tmp_path: Path) -> None:
    split_cells(reader, by="donor", validation_fraction=0.2, seed=9).write(tmp_path / "split.json")
    with pytest.raises(InputError, match="belongs to another store than a.store"):
        Split.read(tmp_path / "split.json", Cells(reader.obs, fingerprint="0" * 64))
    with pytest.raises(InputError, match="its groups are not what its rule gives"):
        Split.read(tmp_path / "split.json", Cells(reader.obs.iloc[::-1].iloc[:300].reset_index()))


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda m: m.update(format="x"), "no celltron-split manifest"),
        (lambda m: m.update(version=3), "version 3, wanted 1 or 2"),
        (lambda m: m.update(version=True), "version True, wanted 1 or 2"),
        (lambda m: m["validation"].update(sha256="0"), "its validation are not what its rule gives"),
        (lambda m: m["test"].update(cells=0), "its test are not what its rule gives"),
        (lambda m: m["rule"].update(seed=10), "damaged"),
        (lambda m: m["rule"].update(validation_fraction=0.3), "damaged"),
        (lambda m: m["rule"].update(test_fraction=0.0), "damaged"),
        (lambda m: m["rule"].update(column="age"), "damaged"),
        (lambda m: m["rule"].update(column=1), "incomplete"),
        (lambda m: m["rule"].update(seed="9"), "incomplete"),
        (lambda m: m["rule"].update(validation_groups=[1]), "incomplete"),
        (lambda m: m["rule"].update(test_groups="Ana"), "incomplete"),
        (lambda m: m["rule"].update(more=1), "incomplete"),
        (lambda m: m["rule"].pop("by"), "incomplete"),
        (lambda m: m.update(rule=[]), "incomplete"),
        (lambda m: m.pop("reader"), "incomplete"),
        (lambda m: m.pop("test"), "incomplete"),
    ],
)
def test_a_changed_manifest_is_refused(
    reader: Cells, tmp_path: Path, change: Callable[[dict[str, Any]], None], pattern: str
) -> None:
    manifest = split_cells(reader, by="cell", validation_fraction=0.2, test_fraction=0.1, seed=9).manifest
    manifest = json.loads(json.dumps(manifest))
    change(manifest)
    (tmp_path / "split.json").write_text(json.dumps(seal_manifest(manifest)))
    with pytest.raises(InputError, match=pattern):
        Split.read(tmp_path / "split.json", reader)


def test_a_flipped_bit_in_a_manifest_is_found(reader: Cells, tmp_path: Path) -> None:
    """Even in what changes no cell, such as the last digit of a share."""
    split_cells(reader, by="donor", validation_fraction=0.125, seed=9).write(tmp_path / "split.json")
    data = (tmp_path / "split.json").read_bytes()
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        with contextlib.suppress(ValueError):
            if json.loads(damaged) == json.loads(data):
                continue  # white space for white space
        (tmp_path / "split.json").write_bytes(damaged)
        with pytest.raises(InputError, match=r"split.json"):
            Split.read(tmp_path / "split.json", reader)


def test_what_is_no_manifest(reader: Cells, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no split manifest at"):
        Split.read(tmp_path / "none.json", reader)
    for text in ("{", "[]", "\x00", "[" * 50_000):
        (tmp_path / "split.json").write_text(text)
        with pytest.raises(InputError, match=r"split.json"):
            Split.read(tmp_path / "split.json", reader)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"validation_fraction": 0.0}, "validation_fraction is 0.0"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"validation_fraction": float("nan")}, "validation_fraction is nan"),
        ({"test_fraction": -0.1}, "test_fraction is -0.1"),
        ({"test_fraction": 1.0}, "test_fraction is 1.0"),
        ({"test_fraction": 0.9}, "leave nothing to train on"),
        ({"by": "patient"}, "no obs column 'patient': it has .*donor"),
        ({"by": "store"}, "no obs column 'store'"),
        ({"by": "source"}, "the one group a.h5ad: a split by it needs at least 2"),
        ({"by": "is_doublet", "test_fraction": 0.1}, "has 2 groups: a split by it needs at least 3"),
        ({"by": "is_doublet", "test_groups": ["True"]}, "has 2 groups: a split by it needs at least 3"),
        ({"by": "obsm/X_pca"}, "obs column 'obsm/X_pca' of a.store holds arrays"),
        ({"by": "donor", "validation_groups": ["Anna"]}, "no group 'Anna': did you mean 'Ana'"),
        ({"by": "donor", "test_groups": ["zzz"]}, "no group 'zzz': it has .*Ana"),
        ({"by": "donor", "validation_groups": []}, "leaves no validation cells"),
        ({"by": "donor", "test_groups": []}, "leaves no test cells"),
        ({"by": "is_doublet", "validation_groups": ["True", "False"]}, "leaves no train cells"),
        ({"by": "donor", "validation_groups": ["Ana", "Bo"], "test_groups": ["Bo"]}, "'Bo' is in both"),
        ({"validation_groups": ["Ana"]}, "validation groups Ana were given with by=cell: set by to their obs column"),
        ({"test_groups": ["Ana"]}, "test groups Ana were given with by=cell"),
    ],
)
def test_what_is_refused(reader: Cells, options: dict[str, Any], pattern: str) -> None:
    with pytest.raises(InputError, match=pattern):
        split_cells(reader, **({"by": "cell", "validation_fraction": 0.1, "seed": 0} | options))


def test_too_few_cells_or_columns() -> None:
    for num_cells, test_fraction in ((1, 0.0), (2, 0.1)):
        with pytest.raises(InputError, match=f"has {num_cells} cells: a split needs at least {num_cells + 1}"):
            obs = pd.DataFrame(index=range(num_cells))
            split_cells(Cells(obs), by="cell", validation_fraction=0.5, test_fraction=test_fraction, seed=0)
    with pytest.raises(InputError, match="no column that says the donor, such as donor_id, .*: it has age; set by"):
        split_cells(Cells(pd.DataFrame({"age": [1, 2]})), by="donor", validation_fraction=0.5, seed=0)
