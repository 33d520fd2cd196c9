"""BERT masking by a counter-based generator: a place's fate depends on (seed, epoch, cell, place) and on nothing else.

T tokens of all cells, C cells.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from celltron.cells.batch import NO_LABEL
from celltron.cells.compiled import compiled
from celltron.core import InputError, Vocabulary, keys_from

MASK_STREAM = 2
"""First word of the masks' keys; see `celltron.cells.sampler.ORDER_STREAM`."""
DRAWS_PER_PLACE = 3

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


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


class _Shares(NamedTuple):
    probability: float
    mask_share: float
    random_share: float


@compiled
def _bits(key: np.uint64, counter: int) -> np.uint64:
    """`celltron.core.uniform_bits` of one counter."""
    z = key + (np.uint64(counter) + np.uint64(1)) * _GAMMA
    z = (z ^ (z >> np.uint64(30))) * _MULTIPLIER_1
    z = (z ^ (z >> np.uint64(27))) * _MULTIPLIER_2
    return z ^ (z >> np.uint64(31))


@compiled
def _mask_kernel(
    tokens: npt.NDArray[np.int32],
    labels: npt.NDArray[np.int32],
    lengths: npt.NDArray[np.int32],
    keys: npt.NDArray[np.uint64],
    ids: _Ids,
    shares: _Shares,
) -> None:
    first_gene_id, num_genes, mask_id = ids
    probability, mask_share, random_share = shares
    unit = 2.0**-53
    # (bits >> 11) x 2^-53 < probability, in whole numbers: this draw is taken for every token.
    selected_below = np.uint64(np.ceil(probability / unit))
    chosen = np.empty(lengths.max() if lengths.shape[0] else 0, dtype=np.int64)
    begin = 0
    for cell in range(lengths.shape[0]):
        key, length = keys[cell], lengths[cell]
        num_chosen = np.int64(0)
        for place in range(length):  # without a branch, which could not be predicted
            chosen[num_chosen] = place
            is_chosen = _bits(key, place * DRAWS_PER_PLACE) >> np.uint64(11) < selected_below
            num_chosen += np.int64(is_chosen & (tokens[begin + place] >= first_gene_id))
        for k in range(num_chosen):
            place = chosen[k]
            at = begin + place
            labels[at] = tokens[at]
            fate = np.float64(_bits(key, place * DRAWS_PER_PLACE + 1) >> np.uint64(11)) * unit
            if fate < mask_share:
                tokens[at] = mask_id
            elif fate < mask_share + random_share:
                draw = np.float64(_bits(key, place * DRAWS_PER_PLACE + 2) >> np.uint64(11)) * unit
                tokens[at] = first_gene_id + np.int32(draw * num_genes)
        begin += length


def apply_masking(  # noqa: PLR0913
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
    assert int(np.sum(lengths, dtype=np.int64)) == len(tokens), (
        f"lengths sum to {np.sum(lengths)}, tokens are {len(tokens)}"
    )
    keys = np.atleast_1d(keys_from(MASK_STREAM, seed, epoch, np.asarray(cells, dtype=np.int64)))
    seen = tokens.copy()
    labels = np.full(len(tokens), NO_LABEL, dtype=np.int32)
    first, last = vocabulary.first_gene_id, len(vocabulary)
    ids = _Ids(first, last - first, vocabulary.mask_id)
    shares = _Shares(masking.probability, masking.mask_share, masking.random_share)
    _mask_kernel(seen, labels, lengths, keys, ids, shares)
    return seen, labels
