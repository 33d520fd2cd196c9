import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celltron.core.permutation import KeyedPermutation, key_from, keys_from, mix64, uniform_bits

words_64 = st.integers(0, 2**64 - 1)


def test_the_stream_is_the_published_splitmix64() -> None:
    # First outputs of the reference generator for the seed 1234567.
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert uniform_bits(np.uint64(1234567), np.arange(5)).tolist() == expected


def test_mix64_values_and_shape() -> None:
    words = np.array([[0, 1], [2, 2**64 - 1]], dtype=np.uint64)
    mixed = mix64(words)
    assert mixed.shape == (2, 2) and mixed.dtype == np.uint64
    assert mixed[0, 0] == 0
    assert mixed[0, 1] == 0x5692161D100B05E5
    assert len(np.unique(mix64(np.arange(100_000)))) == 100_000


@given(st.lists(st.integers(-(2**63), 2**64 - 1), max_size=3), st.lists(st.integers(0, 2**63 - 1), min_size=1))
@settings(deadline=None)
def test_keys_from_is_key_from_for_each_entry(words: list[int], last: list[int]) -> None:
    keys = keys_from(*words, np.array(last, dtype=np.int64))
    assert keys.dtype == np.uint64
    assert keys.tolist() == [key_from(*words, entry) for entry in last]


def test_keys_from_takes_an_array_in_any_place() -> None:
    epochs, cells = np.array([0, 0, 1]), np.array([5, 6, 5])
    expected = [key_from(3, int(epoch), int(cell)) for epoch, cell in zip(epochs, cells, strict=True)]
    assert keys_from(3, epochs, cells).tolist() == expected
    assert keys_from(3, 4).shape == () and int(keys_from(3, 4)) == key_from(3, 4)


def test_keys_are_fixed_for_ever() -> None:
    # A change of these numbers changes every order and mask of every run.
    assert key_from() == 0
    assert [key_from(0), key_from(1, 2, 3), key_from(-1)] == [
        10451216379200822465,
        74078413316773926,
        17519071339639777313,
    ]
    assert KeyedPermutation(10, 1)(np.arange(10)).tolist() == [8, 4, 3, 7, 0, 1, 5, 9, 6, 2]
    assert KeyedPermutation(10**9, 1)([0, 1, 10**9 - 1]).tolist() == [665926857, 522657867, 357676412]


def test_order_and_number_of_words_count() -> None:
    assert len({key_from(), key_from(0), key_from(0, 0), key_from(1), key_from(0, 1), key_from(1, 0)}) == 6


@pytest.mark.parametrize("word", [2**64, -(2**63) - 1])
def test_words_beyond_64_bits_are_refused(word: int) -> None:
    with pytest.raises(ValueError, match="64 bits"):
        key_from(word)
    with pytest.raises(ValueError, match="integers"):
        keys_from(1, np.array([0.5]))


def test_uniform_bits_broadcast_and_do_not_depend_on_their_neighbours() -> None:
    keys = keys_from(7, np.arange(50))
    bits = uniform_bits(keys[:, None], np.arange(40)[None, :])
    assert bits.shape == (50, 40)
    assert bits[13, 17] == uniform_bits(keys[13], 17)
    assert uniform_bits(keys[13], 17).shape == ()


def test_uniform_bits_are_uniform() -> None:
    bits = uniform_bits(keys_from(1, np.arange(1000))[:, None], np.arange(200)[None, :]).reshape(-1)
    shares = [float(np.mean((bits >> np.uint64(bit)) & np.uint64(1))) for bit in range(64)]
    # The standard deviation of each share is 0.5 / sqrt(200,000) = 0.0011.
    assert max(abs(share - 0.5) for share in shares) < 0.0056
    counts = np.bincount((bits >> np.uint64(58)).astype(np.int64), minlength=64)
    expected = len(bits) / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * math.sqrt(2 * 63)


@given(st.integers(0, 3000), words_64)
@settings(deadline=None, max_examples=60)
def test_a_permutation_is_a_bijection(size: int, key: int) -> None:
    order = KeyedPermutation(size, key)(np.arange(size))
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(size))


@given(st.integers(1025, 2**62 - 1), words_64, st.data())
@settings(deadline=None, max_examples=60)
def test_a_large_permutation_stays_inside_and_answers_each_index_alone(
    size: int, key: int, data: st.DataObject
) -> None:
    permutation = KeyedPermutation(size, key)
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True))
    order = permutation(indices)
    assert order.min() >= 0 and order.max() < size
    assert len(set(order.tolist())) == len(indices)
    assert [int(permutation(index)) for index in indices] == order.tolist()


def test_a_million_are_a_bijection_far_from_the_identity() -> None:
    order = KeyedPermutation(1_000_003, 9)(np.arange(1_000_003))
    assert np.array_equal(np.sort(order), np.arange(1_000_003))
    assert (order == np.arange(len(order))).sum() < 12
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.005


@pytest.mark.parametrize("size", [3, 5])
def test_every_small_order_is_equally_likely(size: int) -> None:
    num_keys = 3000
    seen = Counter(tuple(KeyedPermutation(size, key_from(7, key))(np.arange(size)).tolist()) for key in range(num_keys))
    orders = list(permutations(range(size)))
    expected = num_keys / len(orders)
    chi_square = sum((seen[order] - expected) ** 2 / expected for order in orders)
    assert chi_square < len(orders) - 1 + 5 * math.sqrt(2 * len(orders))


def test_the_first_index_goes_everywhere_under_different_keys() -> None:
    size = 2000
    places = [int(KeyedPermutation(size, key)(0)) * 40 // size for key in range(2000)]
    counts = np.bincount(places, minlength=40)
    assert ((counts - 50) ** 2 / 50).sum() < 39 + 5 * math.sqrt(2 * 39)


def test_sizes_zero_and_one() -> None:
    assert KeyedPermutation(0, 5)(np.arange(0)).tolist() == []
    assert KeyedPermutation(1, 5)([0]).tolist() == [0]
    assert KeyedPermutation(7, 5)(np.zeros((2, 0), dtype=np.int64)).shape == (2, 0)


def test_indices_outside_are_refused() -> None:
    for indices in ([-1], [10], [3, 10]):
        with pytest.raises(IndexError, match=r"\[0, 10\)"):
            KeyedPermutation(10, 1)(indices)
    with pytest.raises(ValueError, match="integers"):
        KeyedPermutation(10, 1)([0.5])
    with pytest.raises(ValueError, match="size"):
        KeyedPermutation(-1, 1)
    assert len(KeyedPermutation(10, 1)) == 10
    assert repr(KeyedPermutation(10, 1)) == "KeyedPermutation(size=10, key=1)"
