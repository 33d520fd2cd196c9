"""The compiled rank encoding: score every gene of a cell, and order the genes by falling score.

K located cells, n genes of a cell, G genes of a gene list.

The score is count / total x 10,000 / median, each operation rounded to float64. Its divisions would take longer than
all else, so genes are first ordered by count x (1 / median), which within a cell is the score but for a factor and
rounding: two stable counting passes order the 18 leading bits of the distance to the cell's highest product (the bit
patterns of positive floating-point numbers order as the numbers do). Neighbours whose leading bits differ by two or
more are in the right order whatever the rounding was; the few others are ordered by their exact scores.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from celltron.cells.compiled import compiled
from celltron.cells.medians import TARGET_TOTAL
from celltron.cells.memory import Addresses, array_at

SMALL_RUN = 24
MOST_PLACES = 1 << 14
"""A key is 18 leading bits and a place of 14 bits; cells with more genes are ordered in a slower way."""
NUM_DIGITS = 1 << 9
LAST_BITS = np.uint64(NUM_DIGITS * NUM_DIGITS - 1)
"""The leading bits of a gene without a token, which put it behind all others."""
HIGH_SHIFT, LOW_SHIFT = np.uint32(23), np.uint32(14)
LOW_DIGIT, PLACE, ONE = np.uint32(NUM_DIGITS - 1), np.uint32(MOST_PLACES - 1), np.uint32(1)


class GeneTokens(NamedTuple):
    """For each gene of a gene list: its token, -1 without one; its median; 1 / median, 0 without a token."""

    token: npt.NDArray[np.int32]
    median: npt.NDArray[np.float64]
    inverse: npt.NDArray[np.float64]


class Frame(NamedTuple):
    """Largest length, and the ids that stand before and after a cell, -1 without one."""

    max_length: int
    cls_id: int
    eos_id: int


class _Cell(NamedTuple):
    """The genes of one cell in the order of its row, and the total of its counts."""

    gene_index: npt.NDArray[Any]
    counts: npt.NDArray[Any]
    total: float


@compiled
def _names_beyond(gene_index: npt.NDArray[Any], num_genes: int) -> bool:
    """Whether a gene is none of the list."""
    largest = np.uint64(0)
    for i in range(gene_index.shape[0]):
        largest = max(largest, np.uint64(gene_index[i]))
    return bool(largest >= np.uint64(num_genes))


@compiled
def _multiply(
    gene_index: npt.NDArray[Any],
    counts: npt.NDArray[Any],
    genes: GeneTokens,
    products: npt.NDArray[np.float64],
    tokens: npt.NDArray[np.int32],
) -> int:
    """Fill ``products`` with count x (1 / median), 0 without a token, and ``tokens``; returns how many have one."""
    token_of, inverse_of = genes.token, genes.inverse
    num_known = 0
    for i in range(gene_index.shape[0]):
        gene = np.uint64(gene_index[i])
        products[i] = np.float64(counts[i]) * inverse_of[gene]
        tokens[i] = token_of[gene]
        num_known += token_of[gene] >= 0
    return num_known


@compiled
def _make_keys(bits: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint32]) -> None:
    """Pair the leading bits of each product's distance to the highest with its place."""
    one = np.uint64(1)
    highest, below_lowest = bits[0], bits[0] - one
    for i in range(bits.shape[0]):  # 0, which is no product, less 1 is the largest number of all
        highest, below_lowest = max(highest, bits[i]), min(below_lowest, bits[i] - one)
    shift = np.uint64(0)
    while (highest - below_lowest - one) >> shift >= LAST_BITS:
        shift += one
    for i in range(bits.shape[0]):
        keys[i] = (np.uint32(min((highest - bits[i]) >> shift, LAST_BITS)) << LOW_SHIFT) | np.uint32(i)


@compiled
def _count_digits(
    keys: npt.NDArray[np.uint32], low_ends: npt.NDArray[np.int32], high_ends: npt.NDArray[np.int32]
) -> None:
    """Where the keys of each low and of each high digit begin."""
    low_ends[:] = 0
    high_ends[:] = 0
    for i in range(keys.shape[0]):
        low_ends[(keys[i] >> LOW_SHIFT) & LOW_DIGIT] += np.int32(1)
        high_ends[keys[i] >> HIGH_SHIFT] += np.int32(1)
    low, high = np.int32(0), np.int32(0)
    for digit in range(NUM_DIGITS):
        num_low, num_high = low_ends[digit], high_ends[digit]
        low_ends[digit], high_ends[digit] = low, high
        low += num_low
        high += num_high


@compiled
def _order_keys(
    keys: npt.NDArray[np.uint32],
    other_keys: npt.NDArray[np.uint32],
    low_ends: npt.NDArray[np.int32],
    high_ends: npt.NDArray[np.int32],
) -> None:
    """Two stable counting passes, the lower digit first."""
    _count_digits(keys, low_ends, high_ends)
    for i in range(keys.shape[0]):
        key = keys[i]
        digit = (key >> LOW_SHIFT) & LOW_DIGIT
        end = low_ends[digit]
        other_keys[np.uint32(end)] = key
        low_ends[digit] = end + np.int32(1)
    for i in range(keys.shape[0]):
        key = other_keys[i]
        digit = key >> HIGH_SHIFT
        end = high_ends[digit]
        keys[np.uint32(end)] = key
        high_ends[digit] = end + np.int32(1)


@compiled
def _find_followers(keys: npt.NDArray[np.uint32], followers: npt.NDArray[np.uint32]) -> int:
    """Write down which keys agree, but for one, with the key before them in the leading bits; returns their number."""
    num = np.uint64(0)
    for i in range(1, keys.shape[0]):  # without a branch, which could not be predicted
        followers[num] = np.uint32(i)
        num += np.uint64((keys[i] >> LOW_SHIFT) - (keys[i - 1] >> LOW_SHIFT) <= ONE)
    return int(num)


@compiled
def _exact_score(place: np.uint32, cell: _Cell, median_of: npt.NDArray[np.float64]) -> float:
    gene = np.uint64(cell.gene_index[place])
    return float(np.float64(cell.counts[place]) / cell.total * TARGET_TOTAL / median_of[gene])


@compiled
def _order_long_run(
    places: npt.NDArray[np.uint32], scores: npt.NDArray[np.float64], tokens: npt.NDArray[np.int32]
) -> npt.NDArray[np.int64]:
    """The order by falling score and rising token of the genes at ``places`` of their row."""
    order = np.argsort(tokens[places], kind="mergesort")
    return order[np.argsort(-scores[places][order], kind="mergesort")]


@compiled
def _order_near_keys(
    keys: npt.NDArray[np.uint32],
    followers: npt.NDArray[np.uint32],
    cell: _Cell,
    median_of: npt.NDArray[np.float64],
    scores: npt.NDArray[np.float64],
    tokens: npt.NDArray[np.int32],
    limit: int,
) -> None:
    """Order runs of near keys exactly; runs that begin at ``limit`` or later are of no use.

    A key is inserted where it belongs in the run before it; a long run (many equal scores) is ordered as a whole.
    ``scores``, by place, is filled for the keys in question.
    """
    begin = end = np.int64(0)
    num_followers = _find_followers(keys, followers)
    for k in range(num_followers):
        i = np.int64(followers[k])
        if i != end:
            begin = i - 1
            if begin >= limit:
                return
            scores[keys[begin] & PLACE] = _exact_score(keys[begin] & PLACE, cell, median_of)
        end = i + 1
        key = keys[i]
        place = key & PLACE
        score, token = _exact_score(place, cell, median_of), tokens[place]
        scores[place] = score
        if end - begin > SMALL_RUN:
            if k + 1 == num_followers or np.int64(followers[k + 1]) != end:
                run = keys[begin:end].copy()
                keys[begin:end] = run[_order_long_run(run & PLACE, scores, tokens)]
            continue
        while i > begin:
            other = keys[i - 1] & PLACE
            if score < scores[other] or (score == scores[other] and token > tokens[other]):
                break
            keys[i] = keys[i - 1]
            i -= 1
        keys[i] = key


@compiled
def _rank_long_cell(
    cell: _Cell, median_of: npt.NDArray[np.float64], tokens: npt.NDArray[np.int32], out: npt.NDArray[np.int32]
) -> None:
    """The first tokens of a cell with more genes than a key has places, by exact scores alone."""
    known = np.flatnonzero(tokens >= 0).astype(np.uint32)
    scores = np.empty(tokens.shape[0], dtype=np.float64)
    for place in known:
        scores[place] = _exact_score(place, cell, median_of)
    order = _order_long_run(known, scores, tokens)
    for i in range(out.shape[0]):
        out[i] = tokens[known[order[i]]]


@compiled
def rank_cells(
    rows: Addresses,
    index_like: npt.NDArray[Any],
    count_like: npt.NDArray[Any],
    genes: GeneTokens,
    frame: Frame,
    begins: npt.NDArray[np.int64],
    out: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]],
) -> int:
    """Write the tokens of located cells from their slots' ``begins`` on, and their lengths, into ``out``.

    Returns:
        -1 when all is well; the first slot with a gene beyond the list; -2 - slot for one with counts and no total.
    """
    all_tokens, lengths = out
    longest = 0
    for k in range(rows.sizes.shape[0]):
        longest = max(longest, rows.sizes[k])
    all_products = np.empty(longest, dtype=np.float64)
    all_bits = all_products.view(np.uint64)
    gene_tokens = np.empty(longest, dtype=np.int32)
    all_keys, all_other_keys = np.empty(longest, dtype=np.uint32), np.empty(longest, dtype=np.uint32)
    low_ends, high_ends = np.empty(NUM_DIGITS, dtype=np.int32), np.empty(NUM_DIGITS, dtype=np.int32)
    most = frame.max_length - (frame.cls_id >= 0) - (frame.eos_id >= 0)
    for k in range(rows.slots.shape[0]):
        slot, size = rows.slots[k], rows.sizes[k]
        begin = end = begins[slot]
        if frame.cls_id >= 0:
            all_tokens[end] = frame.cls_id
            end += 1
        if size > 0:
            if not rows.totals[k] > 0.0:
                return int(-2 - slot)
            gene_index = array_at(rows.indices[k], size, index_like)
            counts = array_at(rows.counts[k], size, count_like)
            if _names_beyond(gene_index, genes.token.shape[0]):
                return int(slot)
            cell = _Cell(gene_index, counts, rows.totals[k])
            products, tokens = all_products[:size], gene_tokens[:size]
            num_known = _multiply(gene_index, counts, genes, products, tokens)
            kept = min(num_known, most)
            if size > MOST_PLACES:
                _rank_long_cell(cell, genes.median, tokens, all_tokens[end : end + kept])
            elif kept > 0:
                keys, other_keys = all_keys[:size], all_other_keys[:size]
                _make_keys(all_bits[:size], keys)
                _order_keys(keys, other_keys, low_ends, high_ends)
                _order_near_keys(keys[:num_known], other_keys, cell, genes.median, products, tokens, kept)
                for i in range(kept):
                    all_tokens[end + i] = tokens[keys[i] & PLACE]
            end += kept
        if frame.eos_id >= 0:
            all_tokens[end] = frame.eos_id
            end += 1
        lengths[slot] = end - begin
    return -1
