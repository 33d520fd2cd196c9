import gc

import numpy as np

from celltron.cells.array_pool import SMALLEST, ArrayPool


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_comes_back_with_the_last_view() -> None:
    pool = ArrayPool(2)
    first = pool.empty(SMALLEST)
    first[:] = 7
    there, view = address(first), first[5:9].reshape(2, 2)
    del first
    gc.collect()
    other = pool.empty(SMALLEST)
    other[:] = 8
    assert address(other) != there and view.tolist() == [[7, 7], [7, 7]]
    del view
    again = pool.empty(SMALLEST)
    assert address(again) == there and again.shape == (SMALLEST,) and again.dtype == np.int32


def test_a_larger_array_and_a_small_one_get_memory_of_their_own() -> None:
    pool = ArrayPool(2)
    pool.empty(SMALLEST)
    larger = pool.empty(4 * SMALLEST)
    larger[:] = 1
    assert len(larger) == 4 * SMALLEST and larger.flags.writeable
    assert pool.empty(10).base is None and len(pool.empty(0)) == 0


def test_no_more_than_so_many_pieces_are_kept() -> None:
    pool = ArrayPool(2)
    arrays = [pool.empty(SMALLEST) for _ in range(5)]
    places = {address(array) for array in arrays}
    del arrays
    fresh = [pool.empty(SMALLEST) for _ in range(2)]
    assert {address(array) for array in fresh} < places
    assert len(pool._idle) == 0
