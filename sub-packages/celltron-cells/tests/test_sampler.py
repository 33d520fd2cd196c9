"""Every order: each cell once an epoch, the same stream however it is cut, and the right one."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celltron.cells import EpochOrder, LoaderState
from celltron.cells.block_order import BlockOrder
from celltron.cells.length_order import LengthOrder
from celltron.cells.sampler import Order, advance, rank_part
from celltron.cells.weighted_order import WeightedOrder
from celltron.core import InputError, KeyedPermutation, key_from

MakeOrder = Callable[[int, int, st.DrawFn], Order]


def lengths_of(cells: np.ndarray) -> np.ndarray:
    return cells * 7919 % 23


def draw_block_order(size: int, seed: int, draw: st.DrawFn) -> Order:
    return BlockOrder(size, seed, block_cells=draw(st.integers(1, 40)), window_blocks=draw(st.integers(1, 9)))


def draw_length_order(size: int, seed: int, draw: st.DrawFn) -> Order:
    inner = EpochOrder(size, seed) if draw(st.booleans()) else draw_block_order(size, seed, draw)
    cells_per_batch, window_batches = draw(st.integers(1, 30)), draw(st.integers(1, 6))
    return LengthOrder(inner, lengths_of, cells_per_batch=cells_per_batch, window_batches=window_batches)


def draw_weighted_order(size: int, seed: int, draw: st.DrawFn) -> Order:
    return WeightedOrder(1.0 + np.arange(size) % 3, seed, epoch_cells=draw(st.integers(1, 2 * size)))


ORDERS: list[MakeOrder] = [
    lambda size, seed, draw: EpochOrder(size, seed, shuffle=draw(st.booleans())),
    draw_block_order,
    draw_length_order,
]


@st.composite
def orders(draw: st.DrawFn, kinds: list[MakeOrder]) -> Order:
    kind = draw(st.sampled_from(kinds))
    return kind(draw(st.integers(1, 200)), draw(st.integers(-(2**62), 2**62)), draw)


@settings(max_examples=100, deadline=None)
@given(order=orders(ORDERS), epoch=st.integers(0, 5))
def test_an_epoch_is_a_permutation(order: Order, epoch: int) -> None:
    size = len(order)
    cells, epochs, after = order.take(LoaderState(order.seed, epoch), size)
    assert sorted(cells.tolist()) == list(range(size))
    assert epochs.tolist() == [epoch] * size
    assert after == LoaderState(order.seed, epoch + 1)


@settings(max_examples=80, deadline=None)
@given(order=orders([*ORDERS, draw_weighted_order]), epoch=st.integers(0, 3), data=st.data())
def test_the_stream_is_the_same_however_it_is_cut(order: Order, epoch: int, data: st.DataObject) -> None:
    """From any place in any steps, asked for in any succession, and from any state between them."""
    position = data.draw(st.integers(0, len(order) - 1))
    steps = data.draw(st.lists(st.integers(0, 2 * len(order)), min_size=1, max_size=4))
    start = LoaderState(order.seed, epoch, position)
    whole_cells, whole_epochs, whole_after = order.take(start, sum(steps))
    states = [start]
    for step in steps:
        states.append(order.take(states[-1], step)[2])
    assert states[-1] == whole_after
    begins = np.cumsum([0, *steps])
    for k in data.draw(st.permutations(range(len(steps)))):
        cells, epochs, after = order.take(states[k], steps[k])
        assert len(cells) == len(epochs) == steps[k] and after == states[k + 1]
        assert np.array_equal(cells, whole_cells[begins[k] : begins[k + 1]])
        assert np.array_equal(epochs, whole_epochs[begins[k] : begins[k + 1]])


@settings(max_examples=60, deadline=None)
@given(order=orders([*ORDERS, draw_weighted_order]), data=st.data())
def test_what_is_handed_out_may_be_changed(order: Order, data: st.DataObject) -> None:
    state = LoaderState(order.seed, 1, data.draw(st.integers(0, len(order) - 1)))
    cells, epochs, _ = order.take(state, 5)
    kept = cells.copy(), epochs.copy()
    cells[:] = epochs[:] = -9
    again = order.take(state, 5)
    assert np.array_equal(again[0], kept[0]) and np.array_equal(again[1], kept[1])


@settings(max_examples=60, deadline=None)
@given(order=orders([*ORDERS, draw_weighted_order]), epochs=st.integers(0, 3))
def test_the_last_epoch_ends(order: Order, epochs: int) -> None:
    size = len(order)
    cells, _, after = order.take(LoaderState(order.seed), 5 * size, epochs=epochs)
    assert len(cells) == epochs * size and after == LoaderState(order.seed, epochs)
    nothing, no_epochs, still = order.take(after, 20, epochs=epochs)
    assert nothing.dtype == no_epochs.dtype == np.int64
    assert len(nothing) == len(no_epochs) == 0 and still == after


@pytest.mark.parametrize("size", [1, 2, 1000, 1024, 1025, 5000])
def test_the_epoch_order_is_the_keyed_permutation(size: int) -> None:
    chosen = np.arange(size) * 3 + 1
    for seed, epoch in ((0, 0), (5, 3), (-4, 1)):
        wanted = KeyedPermutation(size, key_from(1, seed, epoch))(np.arange(size))
        assert np.array_equal(EpochOrder(size, seed).slice(epoch, 0, size), wanted)
        assert np.array_equal(EpochOrder(chosen, seed).slice(epoch, 0, size), chosen[wanted])


def test_the_epoch_order_is_fixed_for_ever() -> None:
    # A change of these numbers changes every run.
    assert EpochOrder(10, 1).slice(2, 0, 10).tolist() == [9, 6, 0, 2, 4, 8, 7, 1, 3, 5]
    assert EpochOrder(10**9, 1).slice(2, 10**6, 10**6 + 4).tolist() == [147851092, 44368509, 792331392, 230103230]


def test_slices_end_with_the_epoch() -> None:
    order = EpochOrder(1000, 3)
    whole = order.slice(2, 0, 1000)
    for start, stop in ((0, 1000), (5, 9), (994, 2000), (6, 7), (20, 20), (1000, 1005), (1003, 1005)):
        assert np.array_equal(order.slice(2, start, stop), whole[start:stop])


def test_seeds_and_epochs_differ_and_cells_may_be_chosen() -> None:
    orders = [EpochOrder(100, seed).slice(epoch, 0, 100).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    chosen = np.array([5, 50, 500])
    assert sorted(EpochOrder(chosen, 0).slice(3, 0, 3).tolist()) == [5, 50, 500]
    assert EpochOrder(chosen, 0, shuffle=False).slice(3, 1, 9).tolist() == [50, 500]


@given(
    epoch=st.integers(0, 5),
    position=st.integers(0, 49),
    size=st.integers(50, 60),
    steps=st.lists(st.integers(0, 200), max_size=5),
)
def test_states_advance_as_the_stream_does(epoch: int, position: int, size: int, steps: list[int]) -> None:
    state = LoaderState(3, epoch, position)
    for step in steps:
        state = advance(state, step, size)
    assert state == LoaderState(3, *divmod(epoch * size + position + sum(steps), size))
    ended = advance(state, 1000, size, epochs=4)
    assert ended == (LoaderState(3, 4, 0) if state.epoch < 4 else state)
    assert advance(LoaderState(3, 1, 2), size - 3, size, epochs=2) == LoaderState(3, 1, size - 1)


@given(num_cells=st.integers(0, 1000), world_size=st.integers(1, 9))
def test_ranks_share_a_batch(num_cells: int, world_size: int) -> None:
    cells = list(range(num_cells))
    parts = [cells[rank_part(num_cells, rank, world_size)] for rank in range(world_size)]
    assert sum(parts, []) == cells
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_no_cells() -> None:
    with pytest.raises(InputError, match="no cells"):
        EpochOrder(0, 0)
    with pytest.raises(InputError, match="no cells"):
        EpochOrder(np.array([], dtype=np.int64), 0)


@pytest.mark.parametrize("position", [-1, 10, 11])
def test_a_state_of_other_cells_is_refused(position: int) -> None:
    with pytest.raises(InputError, match=f"place {position} of an epoch of 10 cells"):
        EpochOrder(10, 0).take(LoaderState(0, 0, position), 3)
