import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celltron.cells import LoaderState
from celltron.cells.weighted_order import WeightedOrder
from celltron.core import InputError, key_from, uniform_bits


def chance_of_cells(order: WeightedOrder, num_cells: int) -> np.ndarray:
    """The probability of each cell, added up from the columns of the table."""
    table = order._classes
    num_classes = len(table.thresholds)
    own = table.thresholds.astype(np.float64) / 2.0**53
    chance_of_class = np.zeros(num_classes)
    np.add.at(chance_of_class, np.arange(num_classes), own / num_classes)
    np.add.at(chance_of_class, table.others, (1.0 - own) / num_classes)
    chances = np.zeros(num_cells)
    for c in range(num_classes):
        members = table.cells[table.begins[c] : table.begins[c + 1]]
        chances[members.astype(np.int64)] = chance_of_class[c] / len(members)
    return chances


@settings(max_examples=150, deadline=None)
@given(
    weights=st.lists(
        st.sampled_from([0.0, 1.0, 2.0, 0.3]) | st.floats(0.0, 1e300) | st.floats(0.0, 10.0), min_size=1, max_size=60
    ).filter(any)
)
def test_chances_are_those_of_the_weights(weights: list[float]) -> None:
    wanted = np.array(weights) / max(weights)
    chances = chance_of_cells(WeightedOrder(weights, 0), len(weights))
    np.testing.assert_allclose(chances, wanted / wanted.sum(), rtol=1e-12, atol=2e-15)
    assert np.all(chances[np.array(weights) == 0.0] == 0.0)


def test_draws_follow_the_weights() -> None:
    weights = np.array([0.0, 1.0, 2.0, 3.0, 0.0, 1.5, 1.0])
    num_draws = 200_000
    cells = WeightedOrder(weights, 5).take(LoaderState(5), num_draws)[0]
    counts = np.bincount(cells, minlength=7)
    expected = num_draws * weights / weights.sum()
    assert np.all(counts[weights == 0] == 0)
    some = weights > 0
    assert ((counts - expected)[some] ** 2 / expected[some]).sum() < 4 + 5 * np.sqrt(8)
    assert abs(np.corrcoef(cells[:-1], cells[1:])[0, 1]) < 0.01  # draws do not depend on each other


def test_cells_of_one_weight_are_uniform_and_each_draw_is_read_off_the_table() -> None:
    order = WeightedOrder(np.full(10, 0.25), 8, cells=np.arange(10) + 100)
    key = key_from(6, 8, 3)
    bits = uniform_bits(np.uint64(key), np.arange(10) * 3 + 2) >> np.uint64(11)
    wanted = 100 + (bits.astype(np.float64) * 2.0**-53 * 10).astype(np.int64)
    assert order.take(LoaderState(8, 3), 10)[0].tolist() == wanted.tolist()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(-5, 5), epoch=st.integers(0, 4), place=st.integers(0, 36), size=st.integers(1, 20))
def test_a_draw_does_not_depend_on_those_before_it(seed: int, epoch: int, place: int, size: int) -> None:
    weights = 1.0 / (1 + np.arange(12))
    order = WeightedOrder(weights, seed, epoch_cells=37)
    stream, draws, _ = order.take(LoaderState(seed), 6 * 37)
    cells, some_draws, _ = WeightedOrder(weights, seed, epoch_cells=37).take(LoaderState(seed, epoch, place), size)
    first = epoch * 37 + place
    assert cells.tolist() == stream[first : first + size].tolist()
    assert draws.tolist() == list(range(6 * 37))
    assert some_draws.tolist() == list(range(first, first + size))


def test_seeds_and_epochs_differ() -> None:
    streams = {
        tuple(WeightedOrder(np.ones(50), seed).take(LoaderState(seed, epoch), 50)[0])
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(streams) == 4


def test_classes_come_equally_often() -> None:
    weights = np.repeat([1 / 900, 1 / 90, 1 / 10], [900, 90, 10])
    cells = WeightedOrder(weights, 0, epoch_cells=30_000).take(LoaderState(0), 30_000)[0]
    shares = [np.mean(cells < 900), np.mean((cells >= 900) & (cells < 990)), np.mean(cells >= 990)]
    np.testing.assert_allclose(shares, 1 / 3, atol=0.012)
    assert len(np.unique(cells[cells >= 990])) == 10


def test_cells_of_few_weights_cost_four_bytes() -> None:
    order = WeightedOrder(np.tile([1.0, 2.0], 50_000), 0)
    assert sum(array.nbytes for array in order._classes) < 4 * 100_000 + 100
    large = WeightedOrder([1.0, 1.0], 0, cells=np.array([2**33, 2**33 + 1]))
    assert set(large.take(LoaderState(0), 40)[0].tolist()) == {2**33, 2**33 + 1}


def test_the_order_is_fixed_for_ever() -> None:
    # A change of these numbers changes every run.
    order = WeightedOrder([1.0, 2.0, 3.0, 2.0], 1, epoch_cells=10)
    assert order.take(LoaderState(1, 2), 10)[0].tolist() == [1, 2, 3, 2, 2, 2, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("weights", "options", "pattern"),
    [
        ([1.0, -1.0], {}, "weight 1 is -1.0"),
        ([np.nan, 1.0], {}, "weight 0 is nan"),
        ([1.0, np.inf], {}, "weight 1 is inf"),
        ([0.0, 0.0], {}, "no weight above 0"),
        ([], {}, "no weight above 0"),
        ([[1.0]], {}, "2 dimensions"),
        ([1.0], {"cells": np.array([1, 2])}, "1 weights for 2 cells"),
        ([1.0], {"cells": np.array([-1])}, "no cell -1"),
        ([1.0], {"epoch_cells": 0}, "epoch_cells is 0"),
    ],
)
def test_what_is_refused(weights: object, options: dict[str, object], pattern: str) -> None:
    with pytest.raises(InputError, match=pattern):
        WeightedOrder(weights, 0, **options)  # type: ignore[arg-type]
