"""Which cells, in which order: a stream of epochs, each of whose places can be asked for by itself.

C cells that are asked for.
"""

import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from celltron.cells.sampler_kernel import PlacePermutation
from celltron.core import InputError, key_from

ORDER_STREAM = 1
"""First word of the order's keys; masks have their own, so that the two never share random numbers."""

_TELLING_CELLS = 64

CellsAndEpochs = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Cell ids int64 [C] and, as int64 [C], the epoch in which each of them comes."""


@dataclass(frozen=True, slots=True)
class LoaderState:
    """Where a loader stands, and all it needs to go on: the next cell is place ``position`` of epoch ``epoch``."""

    seed: int
    epoch: int = 0
    position: int = 0


class Order(Protocol):
    """An endless stream of cells, of which a state says all: ranks, threads and batch size do not change it."""

    @property
    def seed(self) -> int:
        """Of the order, and of the masks drawn with it."""

    def __len__(self) -> int:
        """Places of an epoch."""

    def take(
        self, state: LoaderState, num_cells: int, *, epochs: int | None = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], LoaderState]:
        """The next cells of the stream epoch 0, epoch 1, …; fewer only at the end of the last of ``epochs``.

        Returns:
            Cell ids int64 [C]; int64 [C], in which epoch each comes, which keys its mask: a cell never comes twice
            with the same number; and the state after them.
        """


def advance(state: LoaderState, num_cells: int, epoch_cells: int, *, epochs: int | None = None) -> LoaderState:
    """The state some cells later, or at the end of the last of ``epochs``, in a stream of so many cells an epoch."""
    if not 0 <= state.position < epoch_cells:
        raise InputError(
            f"the state is at place {state.position} of an epoch of {epoch_cells} cells: use the cells and the split "
            "of the run that is to go on"
        )
    if epochs is not None and state.epoch >= epochs:
        return state
    more, position = divmod(state.position + num_cells, epoch_cells)
    if epochs is not None and state.epoch + more >= epochs:
        return LoaderState(state.seed, epochs)
    return LoaderState(state.seed, state.epoch + more, position)


def rank_part(num_cells: int, rank: int, world_size: int) -> slice:
    """Which cells of a global batch a rank takes: contiguous, and as many as others, or one more or less."""
    return slice(num_cells * rank // world_size, num_cells * (rank + 1) // world_size)


def digest_next_cells(order: Order, state: LoaderState) -> int:
    """CRC-32 of the ids of the 64 cells that follow a state, by which two orders are told apart.

    >>> shuffled, plain = EpochOrder(1000, 7), EpochOrder(1000, 7, shuffle=False)
    >>> digest_next_cells(shuffled, LoaderState(7)) == digest_next_cells(plain, LoaderState(7))
    False
    """
    cells, *_ = order.take(state, _TELLING_CELLS)
    return zlib.crc32(cells.astype("<i8").tobytes())


class PlacedOrder(ABC):
    """An `Order` made of the cells at given places of given epochs."""

    seed: int

    @abstractmethod
    def __len__(self) -> int:
        """Places of an epoch."""

    @abstractmethod
    def part(self, epoch: int, start: int, stop: int) -> CellsAndEpochs:
        """What stands at places ``start .. stop`` (inside the epoch), newly made."""

    def take(
        self, state: LoaderState, num_cells: int, *, epochs: int | None = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], LoaderState]:
        """See `Order.take`."""
        epoch, position, size = state.epoch, state.position, len(self)
        after = advance(state, num_cells, size, epochs=epochs)
        parts: list[CellsAndEpochs] = []
        while (epoch, position) < (after.epoch, after.position):
            stop = size if epoch < after.epoch else after.position
            parts.append(self.part(epoch, position, stop))
            epoch, position = (epoch + 1, 0) if stop == size else (epoch, stop)
        if len(parts) == 1:
            return *parts[0], after
        nothing = np.zeros(0, dtype=np.int64)
        cells = np.concatenate([nothing, *(cells for cells, _ in parts)])
        return cells, np.concatenate([nothing, *(epoch_of for _, epoch_of in parts)]), after


class EpochOrder(PlacedOrder):
    """Every cell once an epoch, permuted by key: a function of (seed, epoch, place), without an array of its own.

    Args:
        cells: a count (cells 0 .. count-1) or int64 cell ids.
        seed: which permutations.
        shuffle: False takes the cells as they are given in every epoch.
    """

    def __init__(self, cells: int | npt.NDArray[np.int64], seed: int, *, shuffle: bool = True) -> None:
        self._cells = None if isinstance(cells, int) else np.asarray(cells, dtype=np.int64)
        self._size = num_cells_of(cells)
        self.seed = seed
        self.shuffle = shuffle
        self._permutation: tuple[int, PlacePermutation] | None = None

    def __len__(self) -> int:
        return self._size

    def slice(self, epoch: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        """The cell ids at places ``start .. stop`` of an epoch, of which those beyond its end are left out."""
        stop = max(start, min(stop, self._size))
        places = self._permuted(epoch).run(start, stop) if self.shuffle else np.arange(start, stop, dtype=np.int64)
        return places if self._cells is None else self._cells[places]

    def part(self, epoch: int, start: int, stop: int) -> CellsAndEpochs:
        """See `PlacedOrder.part`."""
        cells = self.slice(epoch, start, stop)
        epoch_of = np.empty_like(cells)
        epoch_of.fill(epoch)
        return cells, epoch_of

    def _permuted(self, epoch: int) -> PlacePermutation:
        kept = self._permutation
        if kept is None or kept[0] != epoch:
            key = key_from(ORDER_STREAM, self.seed, epoch)
            self._permutation = kept = (epoch, PlacePermutation(self._size, key))
        return kept[1]


def num_cells_of(cells: int | npt.NDArray[np.int64]) -> int:
    """How many cells an order is to hold, given as a count or as ids: at least one."""
    num_cells = cells if isinstance(cells, int) else len(cells)
    if num_cells < 1:
        raise InputError("there are no cells to put in order: give at least one cell")
    return num_cells
