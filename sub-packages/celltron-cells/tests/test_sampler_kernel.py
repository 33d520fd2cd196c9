import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from celltron.cells.sampler_kernel import NUM_ROUNDS, RUN_PLACES, TABLE_SIZE, PlacePermutation, bits_at, mix
from celltron.core import KeyedPermutation, mix64, uniform_bits

words_64 = st.integers(0, 2**64 - 1)
SIZES = [0, 1, 2, 3, TABLE_SIZE - 1, TABLE_SIZE, TABLE_SIZE + 1, 1088, 1089, 1090, 4096, 65_536, 10**6 + 3]
LARGE_SIZES = [2**32 - 1, 2**32, 3_037_000_499, (2**31 - 1) ** 2, (2**31 - 1) ** 2 + 1, 2**62 - 1]


@pytest.mark.parametrize("size", SIZES + LARGE_SIZES)
@pytest.mark.parametrize("key", [0, 1, 2**63, 2**64 - 1])
def test_the_numbers_are_those_of_core(size: int, key: int) -> None:
    wanted = KeyedPermutation(size, key)
    permutation = PlacePermutation(size, key)
    num = min(size, RUN_PLACES + 77)
    for start in {0, (size - num) // 2, size - num}:
        places = permutation.run(start, start + num)
        assert places.dtype == np.int64
        assert np.array_equal(places, wanted(np.arange(start, start + num)))


@settings(max_examples=150, deadline=None)
@given(size=st.integers(0, 5000) | st.integers(0, 2**62 - 1), key=words_64, data=st.data())
def test_any_run_of_any_permutation(size: int, key: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, min(size, start + 50)))
    places = PlacePermutation(size, key).run(start, stop)
    assert np.array_equal(places, KeyedPermutation(size, key)(np.arange(start, stop, dtype=np.int64)))


def test_runs_are_copies() -> None:
    for size in (10, 5000):
        permutation = PlacePermutation(size, 3)
        permutation.run(0, 10)[:] = -1
        assert permutation.run(0, 10).min() >= 0


@settings(max_examples=100, deadline=None)
@given(word=words_64, counter=st.integers(0, 2**62))
@example(word=0, counter=0)
@example(word=2**64 - 1, counter=2**62)
def test_words_are_mixed_as_in_core(word: int, counter: int) -> None:
    assert mix(np.uint64(word)) == mix64(np.uint64(word))
    assert bits_at(np.uint64(word), counter) == uniform_bits(np.uint64(word), counter)


def test_as_many_rounds_as_in_core() -> None:
    assert len(KeyedPermutation(5000, 1)._round_keys) == NUM_ROUNDS
