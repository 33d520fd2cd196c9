"""Counter-based random numbers and keyed permutations: pure functions of integers, the same on every machine.

Source: SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", section 4) with the
finaliser constants of Stafford's variant 13; the permutation is the generalised Feistel cipher with cycle walking of
Black and Rogaway 2002, "Ciphers with arbitrary finite domains", sections 3 and 5.

All arithmetic is modulo 2^64. None of this is cryptography.
"""

import math

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
_NUM_ROUNDS = 8
_MAX_TABLE_SIZE = 1024


def mix64(x: npt.ArrayLike) -> UInt64Array:
    """Scramble 64-bit words: the SplitMix64 finaliser, a bijection of the 64-bit integers.

    Args:
        x: uint64, any shape.

    Returns:
        uint64, the same shape.
    """
    z = np.asarray(x, dtype=np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MULTIPLIER_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MULTIPLIER_2)
    return np.asarray(z ^ (z >> np.uint64(31)), dtype=np.uint64)


def _mix_int(z: int) -> int:
    """`mix64` of one Python integer."""
    z = ((z ^ (z >> 30)) * _MULTIPLIER_1) & _MASK
    z = ((z ^ (z >> 27)) * _MULTIPLIER_2) & _MASK
    return z ^ (z >> 31)


def key_from(*words: int) -> int:
    """Fold words such as (seed, epoch, cell) into one 64-bit key; order and number of the words count.

    key_0 = number of words; key_{i+1} = mix64((key_i XOR word_i) + GAMMA), with GAMMA = 0x9E3779B97F4A7C15.
    Negative words are taken modulo 2^64.

    >>> key_from(1, 2) == key_from(2, 1)
    False
    """
    key = len(words)
    for word in words:
        key = _mix_int(((key ^ _as_word(word)) + _GAMMA) & _MASK)
    return key


def keys_from(*words: int | npt.NDArray[np.integer]) -> UInt64Array:
    """Fold words of which some are arrays: one key an entry, the one that `key_from` makes of its words.

    Args:
        words: integers or integer arrays that broadcast together; usually only the last one is an array.

    Returns:
        uint64 keys of the broadcast shape.
    """
    key = np.asarray(len(words), dtype=np.uint64)
    for word in words:
        mixed = key ^ _as_words(word)
        key = mix64(mixed + np.uint64(_GAMMA)) if mixed.ndim else np.asarray(_mix_scalar(mixed), dtype=np.uint64)
    return key


def _mix_scalar(word: UInt64Array) -> int:
    """One step of `keys_from` on a zero-dimensional word: numpy warns of overflow on scalars, not on arrays."""
    return _mix_int((int(word) + _GAMMA) & _MASK)


def _as_word(word: int) -> int:
    """Check that an integer fits 64 bits, signed or not, and take it modulo 2^64."""
    value = int(word)
    if not -(1 << 63) <= value <= _MASK:
        raise ValueError(f"a key word must fit 64 bits, got {value}")
    return value & _MASK


def _as_words(word: int | npt.NDArray[np.integer]) -> UInt64Array:
    """Take an integer or an integer array modulo 2^64."""
    if not isinstance(word, np.ndarray):
        return np.asarray(_as_word(word), dtype=np.uint64)
    if not np.issubdtype(word.dtype, np.integer):
        raise ValueError(f"key words must be integers, got an array of {word.dtype}")
    return word.astype(np.uint64)


def uniform_bits(keys: npt.ArrayLike, counters: npt.ArrayLike) -> UInt64Array:
    """Evaluate the SplitMix64 stream of each key at a place: mix64(key + (counter + 1) * GAMMA).

    Args:
        keys: uint64 [C] from `key_from` or `keys_from`.
        counters: non-negative places in the stream; broadcasts against `keys`.

    Returns:
        64 uniform bits each, of the broadcast shape. `bits >> 11` times 2^-53 is uniform in [0, 1).
    """
    keys_C = np.atleast_1d(np.asarray(keys, dtype=np.uint64))
    places = np.atleast_1d(np.asarray(counters).astype(np.uint64))
    bits = mix64(keys_C + (places + np.uint64(1)) * np.uint64(_GAMMA))
    return bits.reshape(np.broadcast_shapes(np.shape(keys), np.shape(counters)))


class KeyedPermutation:
    """A bijection of range(size) chosen by a 64-bit key and evaluated per index, in constant memory.

    An index x is split into (x // m, x mod m) with m = ceil(sqrt(size)); eight Feistel rounds
    (left, right) -> (right, (left + F_round(right)) mod m) permute range(m * m), and a result at or above `size` is
    sent through again until it falls inside, which happens to fewer than 2 / sqrt(size) of the indices. Up to a size of
    1,024, where eight rounds over so few values would favour some orders, the order of random bits is kept instead.
    """

    __slots__ = ("_base", "_round_keys", "_table", "key", "size")

    def __init__(self, size: int, key: int) -> None:
        if not 0 <= size < 1 << 62:
            raise ValueError(f"the size of a permutation must be in [0, 2^62), got {size}")
        self.size = size
        self.key = _as_word(key)
        self._table: Int64Array | None = None
        if size <= _MAX_TABLE_SIZE:
            self._table = np.argsort(uniform_bits(np.uint64(self.key), np.arange(size)), kind="stable")
        self._base = np.uint64(max(1, math.isqrt(max(size, 1) - 1) + 1))
        self._round_keys = [np.uint64(key_from(key, round_index)) for round_index in range(_NUM_ROUNDS)]

    def __len__(self) -> int:
        return self.size

    def __call__(self, indices: npt.ArrayLike) -> Int64Array:
        """Map indices in range(size) to their places in the permuted order.

        Args:
            indices: int64, any shape.

        Returns:
            int64, the same shape.
        """
        given = np.asarray(indices)
        if given.size and not np.issubdtype(given.dtype, np.integer):
            raise ValueError(f"indices must be integers, got {given.dtype}")
        wanted = given.astype(np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.size):
            raise IndexError(f"indices must be in [0, {self.size}), got {wanted.min()} to {wanted.max()}")
        if self._table is not None:
            return self._table[wanted]
        result = self._rounds(wanted.reshape(-1).astype(np.uint64))
        outside = np.flatnonzero(result >= np.uint64(self.size))
        while outside.size:
            result[outside] = self._rounds(result[outside])
            outside = outside[result[outside] >= np.uint64(self.size)]
        return result.astype(np.int64).reshape(wanted.shape)

    def _rounds(self, x: UInt64Array) -> UInt64Array:
        """Permute range(base * base) once."""
        left, right = x // self._base, x % self._base
        for round_key in self._round_keys:
            left, right = right, (left + mix64(right ^ round_key) % self._base) % self._base
        return left * self._base + right

    def __repr__(self) -> str:
        return f"KeyedPermutation(size={self.size}, key={self.key})"
