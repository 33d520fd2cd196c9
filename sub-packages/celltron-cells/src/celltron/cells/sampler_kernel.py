"""The keyed permutation as machine code, for runs of places: the same numbers as `celltron.core.KeyedPermutation`.

All arithmetic is modulo 2^64.
"""

import numpy as np
import numpy.typing as npt

from celltron.cells.compiled import compiled
from celltron.core import KeyedPermutation, key_from

TABLE_SIZE = 1024
"""Up to this size the permutation is a table, which `celltron.core.KeyedPermutation` makes."""
NUM_ROUNDS = 8
RUN_PLACES = 1024
"""Places whose rounds are computed side by side: both halves stay in the nearest cache."""

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_ALL_BITS = np.uint64(0xFFFFFFFFFFFFFFFF)
_LOW_BITS = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


@compiled
def mix(word: np.uint64) -> np.uint64:
    """`celltron.core.mix64` of one word."""
    z = (word ^ (word >> np.uint64(30))) * _MULTIPLIER_1
    z = (z ^ (z >> np.uint64(27))) * _MULTIPLIER_2
    return z ^ (z >> np.uint64(31))


@compiled
def bits_at(key: np.uint64, counter: int) -> np.uint64:
    """`celltron.core.uniform_bits` of one counter."""
    return mix(key + (np.uint64(counter) + np.uint64(1)) * _GAMMA)


@compiled
def _modulo(word: np.uint64, divisor: np.uint64, inverse: np.uint64) -> np.uint64:
    """The rest of a division, without dividing, which would take five times as long (Barrett 1986).

    With ``inverse`` = floor((2^64 - 1) / divisor), floor(word * inverse / 2^64) is the quotient or one less.
    """
    high, low = word >> _HALF, word & _LOW_BITS
    inverse_high, inverse_low = inverse >> _HALF, inverse & _LOW_BITS
    cross_1, cross_2 = high * inverse_low, low * inverse_high
    carry = (low * inverse_low >> _HALF) + (cross_1 & _LOW_BITS) + (cross_2 & _LOW_BITS)
    quotient = high * inverse_high + (cross_1 >> _HALF) + (cross_2 >> _HALF) + (carry >> _HALF)
    rest = word - quotient * divisor
    return min(rest, rest - divisor)  # a difference below 0 is a number near 2^64


@compiled
def _round(left: np.uint64, right: np.uint64, key: np.uint64, base: np.uint64, inverse: np.uint64) -> np.uint64:
    """The right half after a round; the left half is the right one before it."""
    total = left + _modulo(mix(right ^ key), base, inverse)
    return min(total, total - base)


@compiled
def _permute(size: int, keys: npt.NDArray[np.uint64], start: int, out: npt.NDArray[np.int64]) -> None:
    """Write where the places from ``start`` on are sent, given the key of each round."""
    root = np.int64(np.sqrt(np.float64(size)))
    while root * root >= size:  # the square root is rounded: end on the smallest whose square holds the size
        root -= 1
    while root * root < size:
        root += 1
    base, limit = np.uint64(root), np.uint64(size)
    inverse = _ALL_BITS // base
    halves = np.empty((2, min(RUN_PLACES, out.shape[0])), dtype=np.uint64)
    lefts, rights = halves[0], halves[1]
    for first in range(0, out.shape[0], RUN_PLACES):
        num = min(RUN_PLACES, out.shape[0] - first)
        for i in range(num):
            place = np.uint64(start + first + i)
            lefts[i] = place // base
            rights[i] = place - lefts[i] * base
        for r in range(NUM_ROUNDS):
            key = keys[r]
            for i in range(num):
                left, right = lefts[i], rights[i]
                lefts[i], rights[i] = right, _round(left, right, key, base, inverse)
        for i in range(num):
            place = lefts[i] * base + rights[i]
            while place >= limit:
                left, right = place // base, place % base
                for r in range(NUM_ROUNDS):
                    left, right = right, _round(left, right, keys[r], base, inverse)
                place = left * base + right
            out[first + i] = np.int64(place)


class PlacePermutation:
    """`celltron.core.KeyedPermutation` of range(size), asked for runs of places."""

    __slots__ = ("_round_keys", "_size", "_table")

    def __init__(self, size: int, key: int) -> None:
        self._size = size
        self._round_keys = np.array([key_from(key, r) for r in range(NUM_ROUNDS)], dtype=np.uint64)
        self._table = KeyedPermutation(size, key)(np.arange(size)) if size <= TABLE_SIZE else None

    def run(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Where places ``start .. stop`` (inside the range) are sent, int64, newly made."""
        if self._table is not None:
            return self._table[start:stop].copy()
        places = np.empty(stop - start, dtype=np.int64)
        _permute(self._size, self._round_keys, start, places)
        return places
