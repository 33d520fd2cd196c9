import numpy as np
import pandas as pd
import pytest

from celltron.cells import EpochOrder, LoaderState
from celltron.cells.block_order import BlockOrder
from celltron.cells.sampler_entropy import ShuffleEntropy, shuffle_entropy
from celltron.cells.weighted_order import WeightedOrder
from celltron.core import InputError

LABELS = np.repeat(["a", "b", "c", "d"], [500, 300, 150, 50])


def entropy_of(labels: np.ndarray) -> float:
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(shares * np.log2(shares)).sum())


def test_a_perfect_shuffle_has_the_mean_of_random_batches() -> None:
    random = np.random.default_rng(0)
    drawn = [entropy_of(random.choice(LABELS, 20, replace=False)) for _ in range(4000)]
    found = shuffle_entropy(EpochOrder(1000, 0), LABELS, cells_per_batch=20)
    assert found.perfect_bits == pytest.approx(np.mean(drawn), abs=5 * np.std(drawn) / np.sqrt(4000))
    assert found.bits == pytest.approx(found.perfect_bits, abs=5 * np.std(drawn) / np.sqrt(found.num_batches))
    assert found.num_batches == 50


def test_the_bits_are_the_mean_over_batches() -> None:
    order = BlockOrder(1000, 3, block_cells=10, window_blocks=5)
    cells = order.take(LoaderState(3, 2), 1000)[0]
    wanted = np.mean([entropy_of(LABELS[cells[first : first + 64]]) for first in range(0, 960, 64)])
    found = shuffle_entropy(order, LABELS, cells_per_batch=64, epoch=2)
    assert found.bits == pytest.approx(wanted, abs=1e-12)
    assert (found.cells_per_batch, found.num_batches) == (64, 15)


def test_wider_windows_mix_better() -> None:
    ratios = []
    for window_blocks in (1, 4, 16, 100):
        order = BlockOrder(1000, 3, block_cells=10, window_blocks=window_blocks)
        ratios.append(shuffle_entropy(order, order.blocks_of(np.arange(1000)), cells_per_batch=50).ratio)
    assert ratios == sorted(ratios)
    assert ratios[0] < 0.45 and ratios[-1] > 0.99


def test_unshuffled_cells_have_no_entropy() -> None:
    order = EpochOrder(1000, 0, shuffle=False)
    found = shuffle_entropy(order, np.arange(1000) // 50, cells_per_batch=50)
    assert found.bits == 0.0 and found.ratio == 0.0


def test_a_batch_of_all_cells_and_a_single_label() -> None:
    whole = shuffle_entropy(EpochOrder(1000, 0), LABELS, cells_per_batch=1000)
    assert whole.bits == pytest.approx(entropy_of(LABELS), abs=1e-12)
    assert whole.perfect_bits == pytest.approx(entropy_of(LABELS), abs=1e-9)
    assert shuffle_entropy(EpochOrder(10, 0), ["x"] * 10, cells_per_batch=5).ratio == 1.0


def test_cells_that_are_known_are_not_gone_through() -> None:
    cells = np.arange(0, 1000, 3)
    order = EpochOrder(cells, 0)
    found = shuffle_entropy(order, LABELS, cells_per_batch=10)
    assert shuffle_entropy(order, LABELS, cells_per_batch=10, cells=cells) == found


def test_the_perfect_shuffle_is_of_the_cells_that_come() -> None:
    weights = np.where(LABELS == "a", 0.0, 1.0)
    found = shuffle_entropy(WeightedOrder(weights, 0, epoch_cells=5000), LABELS, cells_per_batch=100)
    assert found.perfect_bits == pytest.approx(entropy_of(LABELS[LABELS != "a"]), abs=0.05)


def test_labels_of_any_kind() -> None:
    wanted = shuffle_entropy(EpochOrder(1000, 0), LABELS, cells_per_batch=20)
    missing = [None if label == "d" else label for label in LABELS]
    numbers = np.where(LABELS == "d", np.nan, np.unique(LABELS, return_inverse=True)[1])
    indexed = pd.Series(pd.Categorical(missing), index=np.arange(1000)[::-1])
    for labels in (missing, numbers, indexed):
        assert shuffle_entropy(EpochOrder(1000, 0), labels, cells_per_batch=20) == wanted


def test_the_line_to_print() -> None:
    found = ShuffleEntropy(bits=4.5, perfect_bits=6.0, cells_per_batch=64, num_batches=256)
    assert str(found) == (
        "shuffle: 4.500 bits a batch of 64 cells, of 6.000 in a perfect shuffle (75.0 %, over 256 batches)"
    )


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"cells_per_batch": 0}, "cells_per_batch is 0"),
        ({"cells_per_batch": 1001}, "wanted 1 to 1000"),
        ({"num_batches": 0}, "num_batches is 0"),
        ({"labels": LABELS[:999]}, "999 labels, but the order holds cell 999"),
    ],
)
def test_what_is_refused(options: dict[str, object], pattern: str) -> None:
    with pytest.raises(InputError, match=pattern):
        shuffle_entropy(EpochOrder(1000, 0), **({"labels": LABELS, "cells_per_batch": 50} | options))  # type: ignore[arg-type]
