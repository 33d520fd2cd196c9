from pathlib import Path
from typing import Any

import numpy as np
import pytest

from celltron.cells.collection import CellCollection
from celltron.cells.sampling_weights import balanced_weights, store_weights
from celltron.core import InputError

SIZES = (6, 2, 4)
TYPES = ["T", "T", "B", "T", None, "T", "B", "NK", "T", "T", None, "T"]


class Cells:
    """A reader of obs alone."""

    def __init__(self, name: str, types: list[str | None]) -> None:
        self.name, self.types = name, types
        self.nnz, self.num_genes, self.manifest, self.gene_maps = 0, 1, {}, (None,)
        self.gene_ids, self.genes_fingerprint, self.fingerprint = ("g",), "g", name
        self.obs_columns = ["type", "all"]

    def __len__(self) -> int:
        return len(self.types)

    def obs_column(self, name: str) -> Any:
        import pandas as pd

        return pd.Series(self.types if name == "type" else [None] * len(self), dtype=object)


def collection(weights: Any) -> CellCollection:
    ends = np.cumsum(SIZES)
    members = [Cells(f"s{i}", TYPES[end - size : end]) for i, (size, end) in enumerate(zip(SIZES, ends, strict=True))]
    return CellCollection(members, weights=weights)  # type: ignore[arg-type]


def test_stores_are_drawn_as_their_weights_say() -> None:
    weights = store_weights(collection([1, 2, 1]))
    shares = [part.sum() / weights.sum() for part in np.split(weights, np.cumsum(SIZES)[:-1])]
    assert weights.shape == (12,) and weights.dtype == np.float64
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], rtol=1e-15)
    np.testing.assert_allclose(weights.mean(), 1, rtol=1e-15)
    assert len(set(weights)) == 3
    assert store_weights(collection(None)).tolist() == [1.0] * 12


def test_shares_hold_among_the_cells_that_are_drawn_from() -> None:
    cells = np.array([11, 0, 1, 2, 10])
    weights = store_weights(collection({"s0": 1, "s1": 5, "s2": 3}), cells)
    np.testing.assert_allclose(weights, np.array([3 / 8, 1 / 12, 1 / 12, 1 / 12, 3 / 8]) * 5, rtol=1e-15)
    assert store_weights(collection([1, 0, 0])).tolist() == [2.0] * 6 + [0.0] * 6
    with pytest.raises(InputError, match="have any of the 2 cells have weight 0"):
        store_weights(collection([1, 0, 0]), [6, 7])


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_classes_are_balanced(power: float) -> None:
    sizes = {kind: TYPES.count(kind) for kind in TYPES}
    expected = np.array([float(sizes[kind]) ** -power for kind in TYPES])
    weights = balanced_weights(collection(None), "type", power=power)
    np.testing.assert_allclose(weights, expected * 12 / expected.sum(), rtol=1e-14)
    kept = np.array([kind is not None for kind in TYPES])
    weights = balanced_weights(collection(None), "type", power=power, exclude_missing=True)
    np.testing.assert_allclose(weights, np.where(kept, expected, 0) * 12 / expected[kept].sum(), rtol=1e-14)


def test_class_sizes_are_of_the_cells_that_are_drawn_from() -> None:
    weights = balanced_weights(collection(None), "type", cells=[0, 1, 2, 7, 3])
    np.testing.assert_allclose(weights, np.array([1 / 3, 1 / 3, 1, 1, 1 / 3]) * 5 / 3, rtol=1e-15)
    assert balanced_weights(collection(None), "type", cells=[]).shape == (0,)


def test_stores_are_classes_too() -> None:
    weights = balanced_weights(collection(None), "store")
    np.testing.assert_allclose(weights, store_weights(collection([1, 1, 1])), rtol=1e-15)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"column": "kind"}, "no obs column 'kind'"),
        ({"power": -1.0}, "power is -1.0"),
        ({"power": float("nan")}, "power is nan"),
        ({"column": "all", "exclude_missing": True}, "has no value for any of the 12 cells"),
        ({"cells": [12]}, "no cell 12"),
    ],
)
def test_what_is_refused(options: dict[str, Any], pattern: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=pattern):
        balanced_weights(collection(None), **({"column": "type"} | options))
