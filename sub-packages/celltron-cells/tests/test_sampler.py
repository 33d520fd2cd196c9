import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celltron.cells import EpochOrder, LoaderState, sampler
from celltron.core import InputError


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 300), seed=st.integers(-(2**62), 2**62), epoch=st.integers(0, 5))
def test_an_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    order = EpochOrder(size, seed)
    assert sorted(order.slice(epoch, 0, size).tolist()) == list(range(size))
    half = size // 2
    parts = np.concatenate([order.slice(epoch, 0, half), order.slice(epoch, half, size)])
    assert np.array_equal(parts, order.slice(epoch, 0, size))


def test_places_do_not_depend_on_blocks(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    whole = EpochOrder(1000, 3).slice(2, 0, 1000)
    monkeypatch.setattr(sampler, "BLOCK_PLACES", 7)
    order = EpochOrder(1000, 3)
    for start, stop in ((0, 1000), (5, 9), (994, 2000), (6, 7), (7, 14), (20, 20)):
        assert np.array_equal(order.slice(2, start, stop), whole[start:stop])


def test_seeds_and_epochs_differ_and_cells_may_be_chosen() -> None:
    orders = [EpochOrder(100, seed).slice(epoch, 0, 100).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    chosen = np.array([5, 50, 500])
    assert sorted(EpochOrder(chosen, 0).slice(3, 0, 3).tolist()) == [5, 50, 500]
    assert EpochOrder(chosen, 0, shuffle=False).slice(3, 1, 9).tolist() == [50, 500]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 40), steps=st.lists(st.integers(1, 100), max_size=8), seed=st.integers(0, 9))
def test_the_stream_is_epoch_after_epoch(size: int, steps: list[int], seed: int) -> None:
    order = EpochOrder(size, seed)
    state = LoaderState(seed)
    cells: list[int] = []
    epochs: list[int] = []
    for step in steps:
        part, epoch_of, state = order.take(state, step)
        assert len(part) == step and 0 <= state.position < size
        cells += part.tolist()
        epochs += epoch_of.tolist()
    total = sum(steps)
    assert epochs == [i // size for i in range(total)]
    assert (state.epoch, state.position) == divmod(total, size)
    for epoch in range(total // size):
        assert sorted(cells[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_the_last_epoch_ends() -> None:
    order = EpochOrder(10, 0)
    cells, epochs, state = order.take(LoaderState(0, 1, 7), 20, epochs=2)
    assert len(cells) == 3 and set(epochs) == {1} and state == LoaderState(0, 2, 0)
    cells, _, after = order.take(state, 20, epochs=2)
    assert len(cells) == 0 and after == state


def test_no_cells() -> None:
    with pytest.raises(InputError, match="no cells"):
        EpochOrder(0, 0)
    with pytest.raises(InputError, match="no cells"):
        EpochOrder(np.array([], dtype=np.int64), 0)
