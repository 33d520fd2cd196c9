import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celltron.cells import EpochOrder, LoaderState
from celltron.cells.block_order import BlockOrder
from celltron.cells.length_order import LengthOrder
from celltron.cells.sampler import Order
from celltron.cells.weighted_order import WeightedOrder
from celltron.core import InputError, KeyedPermutation, key_from

LENGTHS = np.random.default_rng(1).integers(1, 40, 2000)


def lengths_of(cells: np.ndarray) -> np.ndarray:
    return LENGTHS[cells]


def epoch_by_hand(inner: Order, epoch: int, cells_per_batch: int, window_batches: int) -> list[tuple[int, int]]:
    """(cell, epoch) in order."""
    cells, epochs, _ = inner.take(LoaderState(inner.seed, epoch), len(inner))
    waiting = list(zip(cells.tolist(), epochs.tolist(), strict=True))
    missing = (cells_per_batch - epoch * len(inner) % cells_per_batch) % cells_per_batch
    stream: list[tuple[int, int]] = []
    while waiting:
        num = missing if missing and not stream else window_batches * cells_per_batch
        first = len(stream)
        window, waiting = waiting[:num], waiting[num:]
        window.sort(key=lambda item: LENGTHS[item[0]])
        batches = [window[i : i + cells_per_batch] for i in range(0, len(window), cells_per_batch)]
        rest = batches.pop() if len(batches[-1]) < cells_per_batch else []
        key = key_from(7, inner.seed, epoch, first)
        for b in KeyedPermutation(len(batches), key)(np.arange(len(batches))):
            stream += dealt_by_hand(batches[b])
        stream += dealt_by_hand(rest)
    return stream


def dealt_by_hand(cells: list[tuple[int, int]]) -> list[tuple[int, int]]:
    digits = len(f"{max(len(cells) - 1, 0):b}")
    return [cells[i] for i in sorted(range(len(cells)), key=lambda i: f"{i:0{digits}b}"[::-1])]


@settings(max_examples=150, deadline=None)
@given(
    size=st.integers(1, 200),
    epoch=st.integers(0, 7),
    cells_per_batch=st.integers(1, 50),
    window_batches=st.integers(1, 8),
    weighted=st.booleans(),
    data=st.data(),
)
def test_the_order_is_the_one_made_by_hand(
    size: int, epoch: int, cells_per_batch: int, window_batches: int, weighted: bool, data: st.DataObject
) -> None:
    inner: Order = WeightedOrder(np.ones(size), 3) if weighted else EpochOrder(size, 3)
    order = LengthOrder(inner, lengths_of, cells_per_batch=cells_per_batch, window_batches=window_batches)
    wanted = epoch_by_hand(inner, epoch, cells_per_batch, window_batches)
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    cells, epochs, _ = order.take(LoaderState(3, epoch, start), stop - start)
    assert list(zip(cells.tolist(), epochs.tolist(), strict=True)) == wanted[start:stop]


def test_every_full_batch_of_a_stream_is_alike_across_epochs() -> None:
    """Epochs of 1,003 cells in batches of 20: the cuts move along with the batches."""
    order = LengthOrder(EpochOrder(1003, 2), lengths_of, cells_per_batch=20, window_batches=16)
    plain = EpochOrder(1003, 2)
    spreads, plain_spreads = [], []
    state = LoaderState(2)
    while state.epoch < 4:
        plain_cells = plain.take(state, 20)[0]
        cells, epochs, state = order.take(state, 20)
        if epochs[0] == epochs[-1]:
            spreads.append(np.ptp(LENGTHS[cells]))
            plain_spreads.append(np.ptp(LENGTHS[plain_cells]))
    assert len(spreads) >= 4 * 48
    assert np.mean(spreads) < 0.15 * np.mean(plain_spreads)


@pytest.mark.parametrize(("cells_per_batch", "most"), [(64, 1.0), (48, 2.0), (60, 3.0)])
def test_ranks_get_equal_loads(cells_per_batch: int, most: float) -> None:
    """Loads of ranks differ by no more than the longest cell and the shortest do, or a few times that."""
    order = LengthOrder(EpochOrder(1920, 5), lengths_of, cells_per_batch=cells_per_batch, window_batches=2)
    lengths_BC = LENGTHS[order.take(LoaderState(5), 1920)[0]].reshape(-1, cells_per_batch)
    spread_B = np.ptp(lengths_BC, axis=1)
    for world_size in (n for n in range(2, cells_per_batch) if cells_per_batch % n == 0):
        loads_BR = lengths_BC.reshape(len(lengths_BC), world_size, -1).sum(axis=2)
        assert (np.ptp(loads_BR, axis=1) <= most * spread_B).all(), world_size


def test_batches_do_not_come_by_rising_length() -> None:
    order = LengthOrder(EpochOrder(1000, 2), lengths_of, cells_per_batch=10, window_batches=50)
    cells = order.take(LoaderState(2), 1000)[0]
    means = LENGTHS[cells].reshape(2, 50, 10).mean(axis=2)
    assert all(abs(np.corrcoef(np.arange(50), window)[0, 1]) < 0.5 for window in means)


def test_windows_hold_the_cells_of_the_inner_order() -> None:
    inner = BlockOrder(1000, 4, block_cells=16, window_blocks=4)
    order = LengthOrder(inner, lengths_of, cells_per_batch=8, window_batches=8)
    for first in range(0, 1000, 64):
        state = LoaderState(4, 0, first)
        assert sorted(order.take(state, 64, epochs=1)[0]) == sorted(inner.take(state, 64, epochs=1)[0])


def test_lengths_are_asked_once_a_window() -> None:
    asked: list[int] = []

    def counted(cells: np.ndarray) -> np.ndarray:
        asked.append(len(cells))
        return LENGTHS[cells]

    order = LengthOrder(EpochOrder(100, 0), counted, cells_per_batch=5, window_batches=8)
    state = LoaderState(0)
    for _ in range(20):
        state = order.take(state, 5)[2]
    assert asked == [40, 40, 20]


@pytest.mark.parametrize(
    ("options", "pattern"),
    [({"cells_per_batch": 0}, "cells_per_batch is 0"), ({"window_batches": 0}, "window_batches is 0")],
)
def test_what_is_refused(options: dict[str, int], pattern: str) -> None:
    with pytest.raises(InputError, match=pattern):
        LengthOrder(EpochOrder(10, 0), lengths_of, **({"cells_per_batch": 2, "window_batches": 2} | options))


def test_lengths_of_the_wrong_number_are_refused() -> None:
    order = LengthOrder(EpochOrder(10, 0), lambda cells: LENGTHS[:3], cells_per_batch=2, window_batches=5)
    with pytest.raises(InputError, match=r"\(3,\) lengths for 10 cells"):
        order.take(LoaderState(0), 2)
