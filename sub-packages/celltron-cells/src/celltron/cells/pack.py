"""Cells one after the other in a budget of tokens, so that a model computes on no padding.

C cells, T tokens of all cells, padding at the end included.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from celltron.cells.batch import NO_LABEL, Batch
from celltron.core import InputError


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """Cells without gaps: ``tokens_T`` and ``labels_T`` int64; ``lengths`` int64 [C], above 0, which sum to T.

    Padding, where there must be some, is one more cell at the end, without labels.
    """

    tokens_T: npt.NDArray[np.int64]  # noqa: N815
    labels_T: npt.NDArray[np.int64]  # noqa: N815
    lengths: npt.NDArray[np.int64]


def cut_into_packs(batch: Batch, budget: int, *, pad_id: int, multiple_of: int = 1) -> list[PackedBatch]:
    """A batch as one or more packs of at most ``budget`` tokens; see `plan_packs` and `pack_batch`.

    Each data-parallel rank packs its own cells: which those are does not depend on packs, nor does any cell's loss.
    """
    packs = plan_packs(batch.lengths, budget) or [np.zeros(0, dtype=np.int64)]
    return [pack_batch(batch.take(cells), pad_id=pad_id, multiple_of=multiple_of) for cells in packs]


def pack_batch(batch: Batch, *, pad_id: int, multiple_of: int = 1) -> PackedBatch:
    """Leave out cells without tokens, and pad at the end.

    Args:
        batch: C cells.
        pad_id: the vocabulary's id of padding.
        multiple_of: T is a multiple of it, and above 0.
    """
    num_tokens = len(batch.tokens)
    num_padding = -(-max(num_tokens, 1) // multiple_of) * multiple_of - num_tokens
    lengths = np.append(batch.lengths, num_padding).astype(np.int64)
    padding = np.ones(num_padding, dtype=np.int64)
    return PackedBatch(
        np.concatenate([batch.tokens.astype(np.int64), pad_id * padding]),
        np.concatenate([batch.labels.astype(np.int64), NO_LABEL * padding]),
        lengths[lengths > 0],
    )


def plan_packs(lengths: npt.NDArray[np.integer], budget: int) -> list[npt.NDArray[np.int64]]:
    """Deal cells to few packs of at most ``budget`` tokens by best-fit decreasing.

    The longest cell that is left goes to the fullest pack that has room for it (Johnson 1974, "Fast algorithms for bin
    packing"); ties go to the earlier cell and the earlier pack, so the plan is a function of the lengths.

    Args:
        lengths: int [C], tokens of each cell.
        budget: most tokens in a pack.

    Returns:
        The cells of each pack, rising, int64; cells without tokens are in none.
    """
    longest = int(lengths.max(initial=0))
    if longest > budget:
        raise InputError(
            f"a cell of {longest:,} tokens does not fit a pack of {budget:,} tokens: raise the one or lower max_length"
        )
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # what is free in a pack, and its number, rising
    for cell in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        length = int(lengths[cell])
        if length == 0:
            break
        place = bisect_left(rooms, (length, -1))
        if place == len(rooms):
            packs.append([])
            room, pack = budget, len(packs) - 1
        else:
            room, pack = rooms.pop(place)
        packs[pack].append(cell)
        insort(rooms, (room - length, pack))
    return [np.sort(np.array(cells, dtype=np.int64)) for cells in packs]
