"""Length buckets: batches of cells of like length, so that little is padded, from the cells of another order."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from celltron.cells.sampler import CellsAndEpochs, LoaderState, Order, PlacedOrder
from celltron.cells.sampler_kernel import PlacePermutation
from celltron.core import InputError, key_from

LENGTH_STREAM = 7
"""First word of the keys that permute batches; see `celltron.cells.sampler.ORDER_STREAM`."""

LengthsOf = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]
"""The lengths int64 [C] of cells int64 [C], such as the numbers of their tokens in a token cache."""


class LengthOrder(PlacedOrder):
    """Another order whose cells are sorted by length inside windows of some batches.

    The next ``window_batches * cells_per_batch`` cells of the inner order are sorted by length (equal ones stay as they
    were), cut into batches, and the batches permuted by key. So a window holds the cells it held before, and an epoch
    too; what stands at a place is a function of (seed, epoch, place) and the lengths. The loader's batches are those
    that were cut when it has the same ``cells_per_batch`` and began at place 0 of epoch 0. Inside a batch short and
    long cells are dealt out (see `deal`), so that ranks, which take runs of it, get equal loads, however many they are.

    Windows end with the epoch, and the last one may be shorter; what does not fill a batch in it comes last. A loader's
    batch goes on into the next epoch, so that one begins with the few cells, sorted, which complete the batch, and
    its windows are counted from there.

    Args:
        order: which cells, and the seed.
        lengths_of: the length of each cell; must always give the same ones.
        cells_per_batch: cells of a global batch, over all ranks.
        window_batches: batches of a window: the more, the more alike the lengths in a batch.
    """

    def __init__(self, order: Order, lengths_of: LengthsOf, *, cells_per_batch: int, window_batches: int) -> None:
        if cells_per_batch < 1:
            raise InputError(f"cells_per_batch is {cells_per_batch}: wanted 1 or more cells in a batch")
        if window_batches < 1:
            raise InputError(f"window_batches is {window_batches}: wanted 1 or more batches in a window")
        self.order = order
        self.seed = order.seed
        self.cells_per_batch = cells_per_batch
        self.window_batches = window_batches
        self._lengths_of = lengths_of
        self._dealt = deal(cells_per_batch)
        self._last_window: tuple[int, int, CellsAndEpochs] | None = None

    def __len__(self) -> int:
        return len(self.order)

    def part(self, epoch: int, start: int, stop: int) -> CellsAndEpochs:
        """See `PlacedOrder.part`."""
        cells, epoch_of = [], []
        while start < stop:
            first, end = self._window_bounds(epoch, start)
            window = self._window(epoch, first, end)
            inside = slice(start - first, stop - first)
            cells.append(window[0][inside])
            epoch_of.append(window[1][inside])
            start = end
        return np.concatenate(cells), np.concatenate(epoch_of)

    def _window_bounds(self, epoch: int, place: int) -> tuple[int, int]:
        """Where the window begins in which a place lies, and where it ends."""
        size = len(self.order)
        before = min(-epoch * size % self.cells_per_batch, size)
        if place < before:
            return 0, before
        window_cells = self.window_batches * self.cells_per_batch
        first = place - (place - before) % window_cells
        return first, min(first + window_cells, size)

    def _window(self, epoch: int, first: int, end: int) -> CellsAndEpochs:
        """A window in order; the last one is kept, since batches take it bit by bit."""
        kept = self._last_window
        if kept is None or kept[:2] != (epoch, first):
            state = LoaderState(self.seed, epoch, first)
            cells, epoch_of, _ = self.order.take(state, end - first, epochs=epoch + 1)
            lengths = np.asarray(self._lengths_of(cells))
            if lengths.shape != cells.shape:
                raise InputError(
                    f"lengths_of gave {lengths.shape} lengths for {len(cells)} cells: it must give one a cell"
                )
            places = self._batches(np.argsort(lengths, kind="stable"), key_from(LENGTH_STREAM, self.seed, epoch, first))
            self._last_window = kept = (epoch, first, (cells[places], epoch_of[places]))
        return kept[2]

    def _batches(self, places: npt.NDArray[np.int64], key: int) -> npt.NDArray[np.int64]:
        """Cut sorted places into batches, permute those that are full, and deal out each."""
        num_full = len(places) // self.cells_per_batch
        full, rest = np.split(places, [num_full * self.cells_per_batch])
        permuted = full.reshape(num_full, self.cells_per_batch)[PlacePermutation(num_full, key).run(0, num_full)]
        return np.concatenate([permuted[:, self._dealt].ravel(), rest[deal(len(rest))]])


def deal(num: int) -> npt.NDArray[np.int64]:
    """The numbers below ``num`` by their bits reversed, int64: any run of them has small and large ones alike.

    Of 2^m numbers each aligned run of 2^j is every 2^(m-j)-th number (van der Corput 1935), so that the sums over two
    such runs of sorted lengths differ by no more than the longest and the shortest do.

    >>> deal(8).tolist()
    [0, 4, 2, 6, 1, 5, 3, 7]
    """
    numbers = np.arange(num)
    turned = np.zeros(num, dtype=np.int64)
    for _ in range((num - 1).bit_length()):
        turned = turned << 1 | numbers & 1
        numbers >>= 1
    return np.argsort(turned)
