"""A batch of cells, flat, and the same batch padded to a rectangle.

T tokens of all cells, C cells, B = C rows, S places in a row.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from celltron.core import InputError

NO_LABEL = -100
"""The label of a place that the loss leaves out (the value that torch's cross entropy ignores)."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Cells one after the other.

    ``tokens`` and ``labels`` int32 [T]; ``lengths`` int32 [C]; ``cells`` and the ``epochs`` they come in int64 [C].
    """

    tokens: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    cells: npt.NDArray[np.int64]
    epochs: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.cells)

    def sorted_by_length(self) -> "Batch":
        """The same cells, the shortest first, so that parts of a split pad little; equal lengths keep their order."""
        return self.take(np.argsort(self.lengths, kind="stable"))

    def take(self, rows: npt.NDArray[np.int64]) -> "Batch":
        """The cells at some places of this batch, in the order of ``rows``."""
        starts = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
        lengths = self.lengths[rows]
        begins = np.cumsum(lengths, dtype=np.int64) - lengths
        flat = np.arange(int(lengths.sum())) + np.repeat(starts[rows] - begins, lengths)
        return Batch(self.tokens[flat], self.labels[flat], lengths, self.cells[rows], self.epochs[rows])

    def split(self, num_cells: int) -> "list[Batch]":
        """Micro-batches of ``num_cells`` cells in order, the last one shorter if it must be."""
        if num_cells < 1:
            raise InputError(f"a micro-batch of {num_cells} cells was asked: wanted 1 or more")
        return self.split_at([*range(0, len(self), num_cells), len(self)])

    def split_at(self, bounds: npt.ArrayLike) -> "list[Batch]":
        """The cells between each two of the rising ``bounds``, as views of this batch."""
        rows = np.asarray(bounds, dtype=np.int64).tolist()
        ends = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])[rows].tolist()
        return [
            Batch(
                self.tokens[ends[i] : ends[i + 1]],
                self.labels[ends[i] : ends[i + 1]],
                self.lengths[rows[i] : rows[i + 1]],
                self.cells[rows[i] : rows[i + 1]],
                self.epochs[rows[i] : rows[i + 1]],
            )
            for i in range(len(rows) - 1)
        ]


@dataclass(frozen=True, slots=True, eq=False)
class PaddedBatch:
    """A rectangle: ``tokens_BS`` and ``labels_BS`` int64, ``is_padding_BS`` bool (True where no token is)."""

    tokens_BS: npt.NDArray[np.int64]  # noqa: N815
    labels_BS: npt.NDArray[np.int64]  # noqa: N815
    is_padding_BS: npt.NDArray[np.bool_]  # noqa: N815


def pad_batch(batch: Batch, *, pad_id: int, length: int | None = None, multiple_of: int = 1) -> PaddedBatch:
    """Pad every cell on the right.

    Args:
        batch: C cells.
        pad_id: the vocabulary's id of padding.
        length: S; None takes the longest cell, at least 1, rounded up to ``multiple_of``.
        multiple_of: see ``length``.
    """
    longest = int(batch.lengths.max(initial=0))
    if length is None:
        length = -(-max(longest, 1) // multiple_of) * multiple_of
    elif longest > length:
        raise InputError(
            f"a cell of {longest} tokens does not fit a padded length of {length}: raise it or lower max_length"
        )
    is_token_BS = np.arange(length) < batch.lengths[:, None]
    tokens_BS = np.full(is_token_BS.shape, pad_id, dtype=np.int64)
    labels_BS = np.full(is_token_BS.shape, NO_LABEL, dtype=np.int64)
    tokens_BS[is_token_BS] = batch.tokens
    labels_BS[is_token_BS] = batch.labels
    return PaddedBatch(tokens_BS, labels_BS, ~is_token_BS)
