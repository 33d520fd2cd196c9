import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celltron.cells import LoaderState
from celltron.cells.block_order import BlockOrder
from celltron.core import InputError, KeyedPermutation, key_from


def epoch_by_hand(
    cells: list[int], bounds: list[int], window_blocks: int, *, seed: int, epoch: int
) -> tuple[list[int], list[list[int]]]:
    """The cells of an epoch in order, and the blocks of its windows."""
    held = {b: [c for c in sorted(cells) if bounds[b] <= c < bounds[b + 1]] for b in range(len(bounds) - 1)}
    blocks = [b for b, members in held.items() if members]
    order = [blocks[i] for i in KeyedPermutation(len(blocks), key_from(5, seed, epoch))(np.arange(len(blocks)))]
    windows = [order[i : i + window_blocks] for i in range(0, len(order), window_blocks)]
    stream: list[int] = []
    for w, window in enumerate(windows):
        inside = [c for b in window for c in held[b]]
        places = KeyedPermutation(len(inside), key_from(5, seed, epoch, w))(np.arange(len(inside)))
        stream += [inside[i] for i in places]
    return stream, windows


@st.composite
def block_orders(draw: st.DrawFn) -> tuple[BlockOrder, list[int], list[int]]:
    """An order over all cells or a part of them, in blocks of one size or of many, with its cells and bounds."""
    num_cells, seed = draw(st.integers(1, 200)), draw(st.integers(0, 9))
    window_blocks = draw(st.integers(1, 12))
    some = draw(st.none() | st.sets(st.integers(0, num_cells - 1), min_size=1).map(sorted).flatmap(st.permutations))
    cells = list(range(num_cells)) if some is None else list(some)
    given_cells = num_cells if some is None else np.array(some)
    if draw(st.booleans()):
        block_cells = draw(st.integers(1, 60))
        order = BlockOrder(given_cells, seed, block_cells=block_cells, window_blocks=window_blocks)
        return order, cells, [*range(0, max(cells) + 1, block_cells), max(cells) + 1]
    inner = draw(st.lists(st.integers(0, num_cells), max_size=20))
    bounds = [0, *sorted(inner), num_cells + draw(st.integers(0, 9))]
    return BlockOrder(given_cells, seed, window_blocks=window_blocks, bounds=bounds), cells, bounds


@settings(max_examples=150, deadline=None)
@given(case=block_orders(), epoch=st.integers(0, 4), data=st.data())
def test_the_order_is_the_one_made_by_hand(
    case: tuple[BlockOrder, list[int], list[int]], epoch: int, data: st.DataObject
) -> None:
    order, cells, bounds = case
    stream, windows = epoch_by_hand(cells, bounds, order.window_blocks, seed=order.seed, epoch=epoch)
    assert len(order) == len(stream) == len(cells)
    assert sorted(stream) == sorted(cells)
    assert order.num_windows == len(windows)
    start = data.draw(st.integers(0, len(stream) - 1))  # any place at once, without those before it
    stop = data.draw(st.integers(start + 1, len(stream)))
    assert order.take(LoaderState(order.seed, epoch, start), stop - start)[0].tolist() == stream[start:stop]
    window = data.draw(st.integers(0, len(windows) - 1))
    assert order.window_of(epoch, window).tolist() == windows[window]
    assert set(order.blocks_of(stream[start:stop])) == {
        b for b in range(len(bounds) - 1) for c in stream[start:stop] if bounds[b] <= c < bounds[b + 1]
    }


@settings(max_examples=60, deadline=None)
@given(case=block_orders(), epoch=st.integers(0, 2))
def test_a_place_lies_in_the_window_whose_blocks_hold_its_cell(
    case: tuple[BlockOrder, list[int], list[int]], epoch: int
) -> None:
    order, _, _ = case
    cells = order.take(LoaderState(order.seed, epoch), len(order))[0]
    for place, block in enumerate(order.blocks_of(cells)):
        assert block in order.window_of(epoch, order.window_at(epoch, place))
    assert order.window_at(epoch, len(order) - 1) == order.num_windows - 1


def test_windows_of_epochs_ahead_do_not_disturb_the_one_at_hand() -> None:
    order = BlockOrder(5000, 1, block_cells=7, window_blocks=20)
    first = order.take(LoaderState(1, 0, 0), 400)[0]
    ahead = order.window_of(1, 0)
    assert np.array_equal(order.take(LoaderState(1, 0, 0), 400)[0], first)
    begin = order.take(LoaderState(1, 1, 0), 100)[0]
    assert set(order.blocks_of(begin)) <= set(ahead)


def test_one_window_and_single_cells_are_full_shuffles() -> None:
    for options in ({"block_cells": 50, "window_blocks": 1000}, {"block_cells": 1, "window_blocks": 3}):
        cells = BlockOrder(5000, 2, **options).take(LoaderState(2), 5000)[0]
        assert sorted(cells.tolist()) == list(range(5000))
        assert abs(np.corrcoef(cells[:-1], cells[1:])[0, 1]) < 0.05


def test_unshuffled_blocks_stay_together() -> None:
    order = BlockOrder(1000, 0, block_cells=10, window_blocks=1)
    cells = order.take(LoaderState(0), 1000)[0].reshape(100, 10)
    assert np.all(cells // 10 == cells[:, :1] // 10)
    assert not np.array_equal(cells, np.sort(cells, axis=1))
    assert not np.array_equal(cells[:, 0] // 10, np.arange(100))


def test_the_order_is_fixed_for_ever() -> None:
    # A change of these numbers changes every run.
    order = BlockOrder(10, 1, block_cells=3, window_blocks=2)
    assert order.take(LoaderState(1, 2), 10)[0].tolist() == [4, 3, 7, 8, 6, 5, 9, 0, 1, 2]


def test_twelve_million_cells_are_reached_at_any_place() -> None:
    """The last block is short, wherever it comes to stand."""
    num_cells = 12_000_001
    order = BlockOrder(num_cells, 3, block_cells=64, window_blocks=100)
    seen = [order.take(LoaderState(3, 9, place), 5)[0] for place in (0, 6_390, 6_400, 7_777_777, num_cells - 5)]
    assert len(np.unique(np.concatenate(seen))) == 25
    assert sum(len(order.window_of(9, w)) for w in (0, order.num_windows - 1)) == 100 + 187_501 % 100


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"cells": 0}, "no cells"),
        ({"block_cells": 0}, "block_cells is 0"),
        ({"window_blocks": 0}, "window_blocks is 0"),
        ({"bounds": [0, 10]}, "give one of them"),
        ({"block_cells": None}, "give one of them"),
        ({"block_cells": None, "bounds": [0, 9]}, "blocks hold cells 0 to 8"),
        ({"block_cells": None, "bounds": [1, 10]}, "blocks hold cells 1 to 9"),
        ({"block_cells": None, "bounds": [0, 7, 3, 10]}, "bounds must rise"),
        ({"block_cells": None, "bounds": np.array([0, 7, 3, 10], dtype=np.uint32)}, "bounds must rise"),
        ({"block_cells": None, "bounds": [10]}, "whole numbers"),
        ({"block_cells": None, "bounds": [0.0, 10.0]}, "whole numbers"),
        ({"cells": np.array([3, -1])}, "cells lie outside"),
    ],
)
def test_what_is_refused(options: dict[str, object], pattern: str) -> None:
    with pytest.raises(InputError, match=pattern):
        BlockOrder(**({"cells": 10, "seed": 0, "block_cells": 2, "window_blocks": 2} | options))  # type: ignore[arg-type]


def test_a_window_beyond_the_epoch_is_refused() -> None:
    order = BlockOrder(10, 0, block_cells=2, window_blocks=2)
    for window in (-1, 3):
        with pytest.raises(InputError, match=f"no window {window}: an epoch has 3"):
            order.window_of(0, window)
