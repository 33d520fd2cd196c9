"""Which cells, in which order: a stream of epochs, each a keyed permutation evaluated per place."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from celltron.core import InputError, KeyedPermutation, key_from

ORDER_STREAM = 1
"""First word of the order's keys; masks have their own, so that the two never share random numbers."""
BLOCK_PLACES = 4096


@dataclass(frozen=True, slots=True)
class LoaderState:
    """Where a loader stands, and all it needs to go on: the next cell is place ``position`` of epoch ``epoch``."""

    seed: int
    epoch: int = 0
    position: int = 0


class EpochOrder:
    """The order of the cells in each epoch: a function of (seed, epoch, place), without an array of its own.

    ``cells`` is a count (cells 0 .. count-1) or int64 cell ids.
    """

    def __init__(self, cells: int | npt.NDArray[np.int64], seed: int, *, shuffle: bool = True) -> None:
        self._cells = None if isinstance(cells, int) else np.asarray(cells, dtype=np.int64)
        self._size = cells if isinstance(cells, int) else len(cells)
        self.seed = seed
        self.shuffle = shuffle
        self._block_key = (-1, -1)
        self._block = np.zeros(0, dtype=np.int64)
        if self._size < 1:
            raise InputError("there are no cells to put in order: give at least one cell")

    def __len__(self) -> int:
        return self._size

    def slice(self, epoch: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        """The cell ids at places ``start .. stop`` of an epoch."""
        stop = min(stop, self._size)
        parts = [
            self._places(epoch, block)[max(start - block * BLOCK_PLACES, 0) : stop - block * BLOCK_PLACES]
            for block in range(start // BLOCK_PLACES, -(-stop // BLOCK_PLACES))
        ]
        places = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
        return places if self._cells is None else self._cells[places]

    def _places(self, epoch: int, block: int) -> npt.NDArray[np.int64]:
        """A run of the permutation; the last one is kept: a batch needs few places of it, and a call costs much."""
        if self._block_key != (epoch, block):
            first = block * BLOCK_PLACES
            places = np.arange(first, min(first + BLOCK_PLACES, self._size), dtype=np.int64)
            if self.shuffle:
                places = KeyedPermutation(self._size, key_from(ORDER_STREAM, self.seed, epoch))(places)
            self._block_key, self._block = (epoch, block), places
        return self._block

    def take(
        self, state: LoaderState, num_cells: int, *, epochs: int | None = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], LoaderState]:
        """The next ``num_cells`` of the stream epoch 0, epoch 1, …; fewer only at the end of the last of ``epochs``.

        Returns:
            Cell ids int64 [C], the epoch of each int64 [C], and the state after them.
        """
        epoch, position = state.epoch, state.position
        cells, epoch_of = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        missing = num_cells
        while missing and (epochs is None or epoch < epochs):
            part = self.slice(epoch, position, position + missing)
            cells.append(part)
            epoch_of.append(np.full(len(part), epoch, dtype=np.int64))
            missing -= len(part)
            position += len(part)
            if position == self._size:
                epoch, position = epoch + 1, 0
        return np.concatenate(cells), np.concatenate(epoch_of), LoaderState(state.seed, epoch, position)
