"""Rank tokens: a cell as its genes in falling order of median-normalised expression.

Source: Theodoris et al. 2023, doi:10.1038/s41586-023-06139-9, Methods, "Rank value encoding".
C cells, N non-zero counts, G genes of the store, T tokens of all cells.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from celltron.cells.compiled import compiled
from celltron.cells.medians import TARGET_TOTAL, compute_medians
from celltron.cells.store import CellStore, Rows, fingerprint_of_genes
from celltron.core import InputError, MedianTable, Vocabulary

SMALL_RUN = 24
DIGIT, BYTE = np.uint64(8), np.uint64(255)
PLACE_BITS, PLACE = np.uint64(32), np.uint64(2**32 - 1)
COUNT_CELLS = 4096


@compiled
def _comes_before(score: np.uint64, token: np.int32, other_score: np.uint64, other_token: np.int32) -> bool:
    return bool(score > other_score or (score == other_score and token < other_token))


@compiled
def _sort_by_insertion(scores: npt.NDArray[np.uint64], tokens: npt.NDArray[np.int32], begin: int, end: int) -> None:
    for i in range(begin + 1, end):
        score, token = scores[i], tokens[i]
        j = i
        while j > begin and _comes_before(score, token, scores[j - 1], tokens[j - 1]):
            scores[j], tokens[j] = scores[j - 1], tokens[j - 1]
            j -= 1
        scores[j], tokens[j] = score, token


@compiled
def _sift_down(scores: npt.NDArray[np.uint64], tokens: npt.NDArray[np.int32], begin: int, root: int, size: int) -> None:
    score, token = scores[begin + root], tokens[begin + root]
    while 2 * root + 1 < size:
        child = 2 * root + 1
        at = begin + child
        if child + 1 < size and _comes_before(scores[at], tokens[at], scores[at + 1], tokens[at + 1]):
            child += 1
            at += 1
        if not _comes_before(score, token, scores[at], tokens[at]):
            break
        scores[begin + root], tokens[begin + root] = scores[at], tokens[at]
        root = child
    scores[begin + root], tokens[begin + root] = score, token


@compiled
def _sort_by_heap(scores: npt.NDArray[np.uint64], tokens: npt.NDArray[np.int32], begin: int, end: int) -> None:
    size = end - begin
    for root in range(size // 2 - 1, -1, -1):
        _sift_down(scores, tokens, begin, root, size)
    for last in range(size - 1, 0, -1):
        at = begin + last
        scores[begin], scores[at] = scores[at], scores[begin]
        tokens[begin], tokens[at] = tokens[at], tokens[begin]
        _sift_down(scores, tokens, begin, 0, last)


class _Room(NamedTuple):
    """Memory for the longest cell: (leading bits, place) pairs [2, num], where a digit's next pair goes [2, 256]."""

    work: npt.NDArray[np.uint64]
    ends: npt.NDArray[np.int64]
    sorted_scores: npt.NDArray[np.uint64]
    sorted_tokens: npt.NDArray[np.int32]


@compiled
def _pack(scores: npt.NDArray[np.uint64], num: int, limit: int, room: _Room) -> int:
    """Pair the 16 leading bits of each score's distance to the highest with its place, and count the bits' two digits.

    Pairs that are surely beyond the limit are left out. Returns the number of pairs, which are in ``work[0]``.
    """
    work, ends, _, _ = room
    highest, lowest = scores[0], scores[0]
    for i in range(1, num):
        highest, lowest = max(highest, scores[i]), min(lowest, scores[i])
    shift = np.uint64(0)
    while (highest - lowest) >> shift >= np.uint64(1 << 16):
        shift += np.uint64(1)
    ends[:] = 0
    for i in range(num):
        ends[1, (highest - scores[i]) >> shift >> DIGIT] += 1
    num_near, last_digit = ends[1, 0], np.uint64(0)
    while num_near < min(num, limit):
        last_digit += np.uint64(1)
        num_near += ends[1, last_digit]
    kept = 0
    for i in range(num):
        key = (highest - scores[i]) >> shift
        if key >> DIGIT <= last_digit:
            work[0, kept] = (key << PLACE_BITS) | np.uint64(i)
            ends[0, key & BYTE] += 1
            kept += 1
    return kept


@compiled
def _rank(scores: npt.NDArray[np.uint64], tokens: npt.NDArray[np.int32], num: int, limit: int, room: _Room) -> None:
    """The ``limit`` first of ``num`` tokens by falling score and rising token, into ``sorted_tokens``.

    Scores are the bit patterns of positive float64 numbers, whose order as integers is their order as numbers. Two
    stable counting passes order them by their leading bits; what agrees in these is sorted after.
    """
    work, ends, sorted_scores, sorted_tokens = room
    kept = _pack(scores, num, limit, room)
    for k in range(2):
        begin = 0
        for b in range(256):
            size = ends[k, b]
            ends[k, b] = begin
            begin += size
    for i in range(kept):
        b = (work[0, i] >> PLACE_BITS) & BYTE
        work[1, ends[0, b]] = work[0, i]
        ends[0, b] += 1
    for i in range(kept):
        b = work[1, i] >> (PLACE_BITS + DIGIT)
        work[0, ends[1, b]] = work[1, i]
        ends[1, b] += 1
    begin = 0
    while begin < min(kept, limit):
        key = work[0, begin] >> PLACE_BITS
        end = begin
        while end < kept and work[0, end] >> PLACE_BITS == key:
            place = work[0, end] & PLACE
            sorted_scores[end], sorted_tokens[end] = scores[place], tokens[place]
            end += 1
        if end - begin > SMALL_RUN:  # many equal scores
            _sort_by_heap(sorted_scores, sorted_tokens, begin, end)
        elif end - begin > 1:
            _sort_by_insertion(sorted_scores, sorted_tokens, begin, end)
        begin = end


class _GeneTokens(NamedTuple):
    """For each gene of the store its token, -1 without one, and its median."""

    token: npt.NDArray[np.int32]
    median: npt.NDArray[np.float64]


class _Frame(NamedTuple):
    """Largest length, and the ids that stand around a cell, -1 without them."""

    max_length: int
    cls_id: int
    eos_id: int


@compiled
def _tokenize_kernel(
    rows: Rows,
    totals: npt.NDArray[np.float64],
    genes: _GeneTokens,
    frame: _Frame,
    out: npt.NDArray[np.int32],
    lengths: npt.NDArray[np.int32],
) -> bool:
    """Write the tokens of all cells and their lengths; False where a gene is none of the store's."""
    indptr, gene_index, counts = rows
    token_of_gene, median_of_gene = genes
    max_length, cls_id, eos_id = frame
    longest = 0
    for cell in range(lengths.shape[0]):
        longest = max(longest, indptr[cell + 1] - indptr[cell])
    values = np.empty(longest, dtype=np.float64)
    scores = values.view(np.uint64)
    tokens = np.empty(longest, dtype=np.int32)
    room = _Room(
        np.empty((2, longest), dtype=np.uint64),
        np.empty((2, 256), dtype=np.int64),
        np.empty(longest, dtype=np.uint64),
        np.empty(longest, dtype=np.int32),
    )
    most = max_length - 2 if cls_id >= 0 else max_length
    end = 0
    for cell in range(lengths.shape[0]):
        begin = end
        num = 0
        for place in range(indptr[cell], indptr[cell + 1]):
            gene = gene_index[place]
            if gene >= token_of_gene.shape[0]:
                return False
            token = token_of_gene[gene]
            if token >= 0:
                values[num] = np.float64(counts[place]) / totals[cell] * TARGET_TOTAL / median_of_gene[gene]
                tokens[num] = token
                num += 1
        if cls_id >= 0:
            out[end] = cls_id
            end += 1
        if num > 0:
            kept = min(num, most)
            _rank(scores, tokens, num, kept, room)
            out[end : end + kept] = room.sorted_tokens[:kept]
            end += kept
        if cls_id >= 0:
            out[end] = eos_id
            end += 1
        lengths[cell] = end - begin
    return True


class RankTokenizer:
    """Turns cells of one store's genes into token ids.

    A gene's score is count / total_counts x 10,000 / median, in float64 and in this order, where ``total_counts`` is
    over all genes of the cell's source. Tokens come by falling score, at a tie by rising token id, and are cut to
    ``max_length``, CLS and EOS included. Genes without a token or without a median are left out. A cell none of whose
    genes is left has length 0, or 2 with CLS and EOS.

    Args:
        vocabulary: token ids.
        medians: non-zero medians of count / total x 10,000.
        genes: the store's gene ids in order.
        max_length: largest number of tokens of a cell.
        add_cls_eos: put CLS first and EOS last; None does so when the vocabulary has them.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        medians: MedianTable,
        genes: Sequence[str],
        *,
        max_length: int = 2048,
        add_cls_eos: bool | None = None,
    ) -> None:
        cls_id, eos_id = vocabulary.cls_id, vocabulary.eos_id
        has_both = cls_id is not None and eos_id is not None
        self.add_cls_eos = has_both if add_cls_eos is None else add_cls_eos
        if self.add_cls_eos and not has_both:
            raise InputError(
                "add_cls_eos was asked of a vocabulary without <cls> and <eos>: leave it out or take a vocabulary "
                "that has them"
            )
        if max_length < (3 if self.add_cls_eos else 1):
            raise InputError(f"max_length is {max_length}: wanted {3 if self.add_cls_eos else 1} or more tokens a cell")
        self.vocabulary = vocabulary
        self.medians = medians
        self.max_length = max_length
        self._frame = _Frame(max_length, -1, -1)
        if self.add_cls_eos and cls_id is not None and eos_id is not None:
            self._frame = _Frame(max_length, cls_id, eos_id)
        self._genes_fingerprint = fingerprint_of_genes(tuple(genes))
        tokens = vocabulary.ids_of(list(genes))
        median_of_token = medians.for_vocabulary(vocabulary)
        median_of_gene = np.where(tokens >= 0, median_of_token[tokens], np.nan)
        has_both_values = np.isfinite(median_of_gene) & (tokens >= vocabulary.first_gene_id)
        self._genes = _GeneTokens(
            token=np.where(has_both_values, tokens, -1).astype(np.int32),
            median=np.where(has_both_values, median_of_gene, 1.0),
        )
        self.num_known_genes = int(has_both_values.sum())
        if self.num_known_genes == 0:
            some, wanted = ", ".join(list(genes)[:3]), ", ".join(vocabulary.genes[:3])
            raise InputError(
                f"none of the store's {len(genes)} genes (such as {some}) has a token and a median in the vocabulary "
                f"(such as {wanted}): take one of its species"
            )

    @classmethod
    def from_store(
        cls,
        store: CellStore,
        *,
        max_length: int = 2048,
        vocabulary: Vocabulary | None = None,
        medians: MedianTable | None = None,
    ) -> "RankTokenizer":
        """A tokeniser for a store; without vocabulary or medians, of the store's own genes and medians."""
        if vocabulary is None:
            vocabulary = Vocabulary.from_genes(store.gene_ids)
        if medians is None:
            medians = compute_medians(store)
        return cls(vocabulary, medians, store.gene_ids, max_length=max_length)

    def tokenize(self, store: CellStore, cells: npt.ArrayLike) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Token ids int32 [T] of the cells one after the other, and the length of each, int32 [C]."""
        if store.genes_fingerprint != self._genes_fingerprint:
            raise InputError(
                f"{store.path} has other genes than this tokeniser was made for: make one with RankTokenizer.from_store"
            )
        cells = store.check_cells(cells)
        rows = store.rows(cells)
        room = np.minimum(np.diff(rows.indptr) + 2, self.max_length)
        tokens = np.empty(int(room.sum()), dtype=np.int32)
        lengths = np.empty(len(cells), dtype=np.int32)
        totals = store.total_counts[cells]
        good = _tokenize_kernel(rows, totals, self._genes, self._frame, tokens, lengths)
        if not good:
            raise InputError(
                f"{store.path} is damaged: a cell names a gene beyond the store's {store.num_genes}; run celltron "
                "verify"
            )
        return tokens[: int(lengths.sum(dtype=np.int64))], lengths

    def to_dict(self) -> dict[str, Any]:
        """Every setting that decides the tokens; vocabulary, medians and genes by fingerprint."""
        return {
            "kind": "rank",
            "version": 1,
            "max_length": self.max_length,
            "add_cls_eos": self.add_cls_eos,
            "target_total": TARGET_TOTAL,
            "vocabulary": self.vocabulary.fingerprint(),
            "medians": self.medians.fingerprint(),
            "genes": self._genes_fingerprint,
        }

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of `to_dict`."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def count_tokens(
    store: CellStore,
    tokenizer: RankTokenizer,
    cells: npt.ArrayLike | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.int64]:
    """How often each token id occurs in the tokenised cells: int64 [V]; the unigram baseline's counts."""
    chosen = np.arange(len(store)) if cells is None else store.check_cells(cells)
    totals = np.zeros(len(tokenizer.vocabulary), dtype=np.int64)
    for start in range(0, len(chosen), COUNT_CELLS):
        part = chosen[start : start + COUNT_CELLS]
        tokens, _ = tokenizer.tokenize(store, part)
        totals += np.bincount(tokens, minlength=len(totals))
        if progress is not None:
            progress(start + len(part), len(chosen))
    return totals
