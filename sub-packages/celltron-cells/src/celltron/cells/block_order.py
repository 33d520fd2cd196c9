"""Shuffling for slow disks and object stores: whole blocks of neighbouring cells, then the cells of a few of them.

C cells, B blocks that hold any of them.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from celltron.cells.sampler import CellsAndEpochs, PlacedOrder, num_cells_of
from celltron.cells.sampler_kernel import PlacePermutation
from celltron.core import InputError, key_from

BLOCK_STREAM = 5
"""First word of the keys of blocks and of windows; see `celltron.cells.sampler.ORDER_STREAM`."""


class _Epoch(NamedTuple):
    """An epoch's blocks in order, and the place at which each window begins and the last one ends, int64 [W+1]."""

    epoch: int
    blocks: PlacePermutation
    window_starts: npt.NDArray[np.int64]


class BlockOrder(PlacedOrder):
    """Every cell once an epoch, so that only ``window_blocks`` blocks of neighbours must be at hand at any time.

    Blocks of cells that follow each other on disk are permuted by key and cut into windows of ``window_blocks``; all
    cells of a window are permuted by key. What stands at a place is a function of (seed, epoch, place): to ask for it
    adds up the sizes of that epoch's blocks, once, and permutes one window, whatever came before. Memory: 32 bytes a
    block and 8 bytes a cell of a window; besides the cell ids, where a count is not enough.

    Args:
        cells: a count (cells 0 .. count-1) or int64 cell ids in any order; a block holds those of them that lie in it.
        seed: which permutations.
        block_cells: cells of a block: block b is the cells b*block_cells .. (b+1)*block_cells-1.
        window_blocks: blocks of a window; the more, the better the shuffle and the more must be held.
        bounds: int64, rising, instead of ``block_cells`` for blocks of unlike size, such as those of tar shards: block
            b is the cells bounds[b] .. bounds[b+1]-1.
    """

    def __init__(
        self,
        cells: int | npt.NDArray[np.int64],
        seed: int,
        *,
        block_cells: int | None = None,
        window_blocks: int,
        bounds: npt.ArrayLike | None = None,
    ) -> None:
        if (block_cells is None) == (bounds is None):
            raise InputError("block_cells and bounds say the same thing: give one of them")
        if window_blocks < 1:
            raise InputError(f"window_blocks is {window_blocks}: wanted 1 or more blocks in a window")
        self.seed = seed
        self.window_blocks = window_blocks
        self._size = num_cells_of(cells)
        self._cells = None if isinstance(cells, int) else np.sort(np.asarray(cells, dtype=np.int64))
        self._bounds = self._even_bounds(block_cells) if block_cells is not None else _checked_bounds(bounds)
        begins = self._bounds.clip(0, self._size) if self._cells is None else np.searchsorted(self._cells, self._bounds)
        if begins[0] != 0 or begins[-1] != self._size:
            raise InputError(
                f"the blocks hold cells {self._bounds[0]} to {self._bounds[-1] - 1}, but some cells lie outside: give "
                "bounds that hold every cell"
            )
        self._blocks = np.flatnonzero(np.diff(begins))
        self._begins = begins[self._blocks]
        self._sizes = np.diff(self._begins, append=self._size)
        self._last_epoch: _Epoch | None = None
        self._last_window: tuple[int, int, npt.NDArray[np.int64]] | None = None

    def _even_bounds(self, block_cells: int) -> npt.NDArray[np.int64]:
        if block_cells < 1:
            raise InputError(f"block_cells is {block_cells}: wanted 1 or more cells in a block")
        stop = self._size if self._cells is None else int(self._cells[-1]) + 1
        return np.append(np.arange(0, stop, block_cells, dtype=np.int64), stop)

    def __len__(self) -> int:
        return self._size

    @property
    def num_windows(self) -> int:
        """Windows of an epoch."""
        return -(-len(self._blocks) // self.window_blocks)

    def blocks_of(self, cells: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """int64 [C]: the block in which each cell lies."""
        return np.searchsorted(self._bounds, np.asarray(cells, dtype=np.int64), side="right") - 1

    def window_at(self, epoch: int, place: int) -> int:
        """The window of an epoch in which a place lies."""
        return int(np.searchsorted(self._epoch(epoch).window_starts, place, side="right")) - 1

    def window_of(self, epoch: int, window: int) -> npt.NDArray[np.int64]:
        """int64: the blocks of a window, for those who fetch them ahead."""
        if not 0 <= window < self.num_windows:
            raise InputError(f"there is no window {window}: an epoch has {self.num_windows} windows")
        kept = self._last_epoch
        blocks = kept.blocks if kept is not None and kept.epoch == epoch else self._permuted_blocks(epoch)
        return self._blocks[self._held(blocks, window)]

    def part(self, epoch: int, start: int, stop: int) -> CellsAndEpochs:
        """See `PlacedOrder.part`."""
        starts = self._epoch(epoch).window_starts
        parts = []
        for window in range(self.window_at(epoch, start), self.num_windows):
            first = int(starts[window])
            if first >= stop:
                break
            parts.append(self._window(epoch, window)[max(start - first, 0) : stop - first])
        return np.concatenate(parts), np.full(stop - start, epoch, dtype=np.int64)

    def _epoch(self, epoch: int) -> _Epoch:
        kept = self._last_epoch
        if kept is None or kept.epoch != epoch:
            blocks = self._permuted_blocks(epoch)
            sizes = self._sizes[blocks.run(0, len(self._blocks))]
            of_windows = np.add.reduceat(sizes, np.arange(0, len(sizes), self.window_blocks))
            starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(of_windows)])
            self._last_epoch = kept = _Epoch(epoch, blocks, starts)
        return kept

    def _permuted_blocks(self, epoch: int) -> PlacePermutation:
        return PlacePermutation(len(self._blocks), key_from(BLOCK_STREAM, self.seed, epoch))

    def _held(self, blocks: PlacePermutation, window: int) -> npt.NDArray[np.int64]:
        """A window's blocks as places in the list of those that hold any cell."""
        first = window * self.window_blocks
        return blocks.run(first, min(first + self.window_blocks, len(self._blocks)))

    def _window(self, epoch: int, window: int) -> npt.NDArray[np.int64]:
        """A window's cells in order; the last one is kept, since batches take it bit by bit."""
        kept = self._last_window
        if kept is None or kept[:2] != (epoch, window):
            held = self._held(self._epoch(epoch).blocks, window)
            begins, sizes = self._begins[held], self._sizes[held]
            before = np.cumsum(sizes) - sizes
            num_cells = int(sizes.sum())
            on_disk = np.repeat(begins - before, sizes) + np.arange(num_cells)
            permutation = PlacePermutation(num_cells, key_from(BLOCK_STREAM, self.seed, epoch, window))
            places = on_disk[permutation.run(0, num_cells)]
            self._last_window = kept = (epoch, window, places if self._cells is None else self._cells[places])
        return kept[2]


def _checked_bounds(bounds: npt.ArrayLike | None) -> npt.NDArray[np.int64]:
    given = np.asarray(bounds)
    if given.ndim != 1 or len(given) < 2 or not np.issubdtype(given.dtype, np.integer):
        raise InputError("bounds must be whole numbers, the first cell of each block and the end of the last")
    checked = given.astype(np.int64)
    if np.any(np.diff(checked) < 0):
        raise InputError("bounds must rise: they are the first cell of each block and the end of the last")
    return checked
