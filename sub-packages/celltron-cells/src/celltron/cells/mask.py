"""BERT masking by a counter-based generator: a place's fate depends on (seed, epoch, cell, place) and on nothing else.

T tokens of all cells, C cells.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from celltron.cells.batch import NO_LABEL
from celltron.cells.compiled import compiled
from celltron.cells.memory import address_of, array_at, like
from celltron.cells.sampler_kernel import bits_at
from celltron.cells.token_rows import TokenRows
from celltron.core import InputError, Vocabulary, keys_from

MASK_STREAM = 2
"""First word of the masks' keys; see `celltron.cells.sampler.ORDER_STREAM`."""
FATE_DRAWS = 1 << 32
"""Words of 64 bits from here on decide what a selected place shows: the upper half its fate, the lower half the random
gene. The words before select, each for two places, the lower half for the first."""
HALF_RANGE = 2.0**32


@dataclass(frozen=True, slots=True, kw_only=True)
class Masking:
    """How places are masked (Devlin et al. 2019, section 3.1): 15 % selected, 80/10/10."""

    probability: float = 0.15
    """Share of the gene tokens that are selected and must be predicted."""
    mask_share: float = 0.8
    """Share of the selected places that show the mask token."""
    random_share: float = 0.1
    """Share of the selected places that show a random gene; the rest shows the gene itself."""

    def __post_init__(self) -> None:
        for name in ("probability", "mask_share", "random_share"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise InputError(f"masking.{name} is {value}: wanted a share from 0 to 1")
        if self.mask_share + self.random_share > 1.0 + 1e-12:
            raise InputError(
                f"masking.mask_share + masking.random_share is {self.mask_share + self.random_share:g}: wanted at "
                "most 1, lower one of them"
            )

    @classmethod
    def historical(cls) -> "Masking":
        """80/2/18, as the Megatron Geneformer checkpoints were trained."""
        return cls(random_share=0.02)


class _Ids(NamedTuple):
    first_gene: int
    num_genes: int
    mask: int


class _Below(NamedTuple):
    """Of 2^32 draws how many select, of those how many show the mask token, how many that or a random gene."""

    selected: int
    mask: int
    random: int


@compiled
def _copy(source: npt.NDArray[Any], seen: npt.NDArray[np.int32], labels: npt.NDArray[np.int32]) -> None:
    """Copy a cell, no place labelled."""
    for i in range(source.shape[0]):
        seen[i] = source[i]
        labels[i] = NO_LABEL


@compiled
def _select(
    source: npt.NDArray[Any],
    key: np.uint64,
    num_below: int,
    first_gene: int,
    words: npt.NDArray[np.uint64],
    is_chosen: npt.NDArray[np.uint8],
) -> None:
    """Draw which gene tokens of a cell are selected: those whose 32 bits are below ``num_below``."""
    for i in range((source.shape[0] + 1) // 2):
        words[i] = bits_at(key, i)
    draws = words.view(np.uint32)
    largest = np.uint32(max(num_below, 1) - 1)
    for i in range(source.shape[0]):
        is_chosen[i] = np.uint8((draws[i] <= largest) & (source[i] >= first_gene))
    if num_below == 0:
        is_chosen[:] = 0


@compiled
def _list_chosen(is_chosen: npt.NDArray[np.uint8], places: npt.NDArray[np.uint32]) -> int:
    """Write down the places that are selected; returns their number."""
    num = np.uint64(0)
    for i in range(is_chosen.shape[0]):  # without a branch, which could not be predicted
        places[num] = np.uint32(i)
        num += np.uint64(is_chosen[i])
    return int(num)


@compiled
def _hide(
    places: npt.NDArray[np.uint32],
    seen: npt.NDArray[np.int32],
    labels: npt.NDArray[np.int32],
    key: np.uint64,
    ids: _Ids,
    below: _Below,
) -> None:
    """Label the selected places of a cell, and show there the mask token, a random gene, or the gene itself."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    for place in places:
        labels[place] = seen[place]
        bits = bits_at(key, FATE_DRAWS + int(np.int64(place)))
        fate = np.int64(bits >> half)
        if fate < below.mask:
            seen[place] = ids.mask
        elif fate < below.random:
            seen[place] = ids.first_gene + np.int64((bits & low) * np.uint64(ids.num_genes) >> half)


@compiled
def _mask_kernel(
    rows: tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32]],
    token_like: npt.NDArray[Any],
    keys: npt.NDArray[np.uint64],
    ids: _Ids,
    below: _Below,
    out: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]],
) -> None:
    addresses, lengths = rows
    all_seen, all_labels = out
    longest = lengths.max() if lengths.shape[0] else 0
    words = np.empty((longest + 1) // 2, dtype=np.uint64)
    is_chosen, places = np.empty(longest, dtype=np.uint8), np.empty(longest, dtype=np.uint32)
    end = np.int64(0)
    for cell in range(lengths.shape[0]):
        length = np.int64(lengths[cell])
        begin, end = end, end + length
        source = array_at(addresses[cell], int(length), token_like)
        seen, labels = all_seen[begin:end], all_labels[begin:end]
        _copy(source, seen, labels)
        _select(source, keys[cell], below.selected, ids.first_gene, words, is_chosen[:length])
        num_chosen = _list_chosen(is_chosen[:length], places)
        _hide(places[:num_chosen], seen, labels, keys[cell], ids, below)


def mask_rows(
    rows: TokenRows,
    cells: npt.NDArray[np.int64],
    vocabulary: Vocabulary,
    masking: Masking,
    *,
    seed: int,
    epoch: int | npt.NDArray[np.int64],
    out: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]] | None = None,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """`apply_masking` to tokens where they lie; fills ``out``, two arrays [T], if it is given."""
    keys = np.atleast_1d(keys_from(MASK_STREAM, seed, epoch, np.asarray(cells, dtype=np.int64)))
    seen, labels = out or (np.empty(rows.num_tokens, dtype=np.int32), np.empty(rows.num_tokens, dtype=np.int32))
    first, last = vocabulary.first_gene_id, len(vocabulary)
    ids = _Ids(first, last - first, vocabulary.mask_id)
    shares = (masking.probability, masking.mask_share, min(1.0, masking.mask_share + masking.random_share))
    below = _Below(*(round(share * HALF_RANGE) for share in shares))
    _mask_kernel((rows.addresses, rows.lengths), like(rows.dtype), keys, ids, below, (seen, labels))
    return seen, labels


def apply_masking(
    tokens: npt.NDArray[np.int32],
    lengths: npt.NDArray[np.int32],
    cells: npt.NDArray[np.int64],
    vocabulary: Vocabulary,
    masking: Masking,
    *,
    seed: int,
    epoch: int | npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Select places and hide their genes; special tokens are never selected and never put in by chance.

    Args:
        tokens: int32 [T], cells one after the other; not changed.
        lengths: int32 [C].
        cells: int64 [C] cell ids, which key the draws.
        vocabulary: where genes begin and what the mask token is.
        masking: the shares.
        seed: first part of the key.
        epoch: of all cells, or int64 [C].

    Returns:
        What the model sees, int32 [T], and the labels, int32 [T]: the gene where a place is selected, `NO_LABEL`
        elsewhere.
    """
    tokens, lengths = np.ascontiguousarray(tokens, dtype=np.int32), np.ascontiguousarray(lengths, dtype=np.int32)
    ends = np.cumsum(lengths, dtype=np.int64)
    assert (ends[-1] if len(ends) else 0) == len(tokens), f"lengths sum to {np.sum(lengths)}, tokens are {len(tokens)}"
    addresses = (address_of(tokens) + 4 * (ends - lengths)).astype(np.uint64)
    rows = TokenRows(addresses, lengths, "int32", (tokens,))
    return mask_rows(rows, cells, vocabulary, masking, seed=seed, epoch=epoch)
