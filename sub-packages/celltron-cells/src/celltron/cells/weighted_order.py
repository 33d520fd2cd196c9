"""Sampling with replacement: by weights of cells, of stores or of classes.

C cells, D different weights.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from celltron.cells.compiled import compiled
from celltron.cells.sampler import CellsAndEpochs, PlacedOrder
from celltron.cells.sampler_kernel import bits_at
from celltron.core import InputError, key_from

WEIGHT_STREAM = 6
"""First word of the draws' keys; see `celltron.cells.sampler.ORDER_STREAM`."""
DRAWS_PER_PLACE = 3


class _Classes(NamedTuple):
    """The cells of each weight, and the alias table by which a weight is drawn."""

    cells: npt.NDArray[Any]
    """[C], class after class, in the smallest of uint32 and uint64 that holds them."""
    begins: npt.NDArray[np.int64]
    """[D+1]"""
    thresholds: npt.NDArray[np.uint64]
    """[D]: a column of the table is its own class for draws of 53 bits below it, else the other one."""
    others: npt.NDArray[np.int64]
    """[D]"""


class WeightedOrder(PlacedOrder):
    """Each place holds a cell drawn with replacement, in proportion to its weight.

    Draw k of epoch e is a function of (seed, e, k). Two steps: a class of cells of equal weight by Walker's alias table
    (Vose 1991), then one of its cells, each exact to 2^-53. Class-balanced and store weights take few different values,
    so the table stays in the nearest cache and a cell costs 4 bytes; a cell that shares its weight with no other costs
    24 bytes more. Cells of weight 0 are left out beforehand and never come.

    A cell that comes twice must not get the same mask, so in place of the epoch `take` says the number of the draw,
    ``epoch * len(order) + place``, which no other draw has.

    Args:
        weights: float64 [C], of ``cells``, at least 0; only their ratios count.
        seed: which draws.
        cells: int64 [C] cell ids; 0 .. C-1 otherwise.
        epoch_cells: draws of an epoch; C otherwise.
    """

    def __init__(
        self,
        weights: npt.ArrayLike,
        seed: int,
        *,
        cells: npt.NDArray[np.int64] | None = None,
        epoch_cells: int | None = None,
    ) -> None:
        weights_C = _checked_weights(weights)
        cells_C = np.arange(len(weights_C)) if cells is None else np.asarray(cells, dtype=np.int64)
        if len(cells_C) != len(weights_C):
            raise InputError(f"there are {len(weights_C)} weights for {len(cells_C)} cells: give one weight a cell")
        self._size = len(weights_C) if epoch_cells is None else epoch_cells
        if self._size < 1:
            raise InputError(f"epoch_cells is {epoch_cells}: wanted 1 or more draws in an epoch")
        self.seed = seed
        self._classes = _classes(weights_C, cells_C)
        self._key = (0, np.uint64(key_from(WEIGHT_STREAM, seed, 0)))

    def __len__(self) -> int:
        return self._size

    def part(self, epoch: int, start: int, stop: int) -> CellsAndEpochs:
        """See `PlacedOrder.part`; the second array holds the numbers of the draws."""
        kept = self._key
        if kept[0] != epoch:
            self._key = kept = (epoch, np.uint64(key_from(WEIGHT_STREAM, self.seed, epoch)))
        cells = np.empty(stop - start, dtype=np.int64)
        _draw(kept[1], start, self._classes, cells)
        first = epoch * self._size
        return cells, np.arange(first + start, first + stop, dtype=np.int64)


def _checked_weights(weights: npt.ArrayLike) -> npt.NDArray[np.float64]:
    weights_C = np.asarray(weights, dtype=np.float64)
    if weights_C.ndim != 1:
        raise InputError(f"weights have {weights_C.ndim} dimensions: give one weight a cell")
    wrong = np.flatnonzero(~(np.isfinite(weights_C) & (weights_C >= 0.0)))
    if len(wrong):
        raise InputError(
            f"weight {wrong[0]} is {weights_C[wrong[0]]}: weights must be finite and at least 0, set it to 0 to leave "
            "the cell out"
        )
    if not weights_C.any():
        raise InputError("there is no weight above 0: give at least one cell a weight")
    return weights_C


def _classes(weights_C: npt.NDArray[np.float64], cells_C: npt.NDArray[np.int64]) -> _Classes:
    """Gather the cells of each weight above 0 and build the table of their classes."""
    order = np.argsort(weights_C, kind="stable")
    order = order[np.searchsorted(weights_C, 0.0, side="right", sorter=order) :]
    rising = weights_C[order]
    begins = np.concatenate([[0], np.flatnonzero(np.diff(rising)) + 1, [len(rising)]]).astype(np.int64)
    shares_D = rising[begins[:-1]] / rising[-1] * np.diff(begins)
    shares_D /= np.cumsum(shares_D)[-1]  # summed one after the other: the same on every machine
    thresholds, others = _alias_table(shares_D * len(shares_D))
    if cells_C.min() < 0:
        raise InputError(f"there is no cell {cells_C.min()}: cells are numbered from 0")
    dtype = np.uint32 if cells_C.max() < 1 << 32 else np.uint64
    return _Classes(cells_C[order].astype(dtype), begins, thresholds, others)


@compiled
def _alias_table(shares: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """Vose 1991, "A linear algorithm for generating random numbers with a given distribution", from shares of mean 1.

    A column whose share is below 1 is filled up from one that has more, of which the rest is filled up later.
    """
    num = shares.shape[0]
    left = shares.copy()
    thresholds = np.full(num, np.uint64(1 << 53), dtype=np.uint64)
    others = np.arange(num)
    queue = np.empty(num, dtype=np.int64)  # the short columns from the front, the long ones from the back
    num_short, num_long = 0, 0
    for i in range(num):
        if left[i] < 1.0:
            queue[num_short] = i
            num_short += 1
        else:
            num_long += 1
            queue[num - num_long] = i
    while num_short > 0 and num_long > 0:
        num_short -= 1
        short, long = queue[num_short], queue[num - num_long]
        thresholds[short] = np.uint64(left[short] * 2.0**53)
        others[short] = long
        rest = left[long] - (1.0 - left[short])
        left[long] = rest
        if rest < 1.0:
            num_long -= 1
            queue[num_short] = long
            num_short += 1
    return thresholds, others


@compiled
def _draw(key: np.uint64, start: int, classes: _Classes, out: npt.NDArray[np.int64]) -> None:
    """Write the cells of the draws from ``start`` on."""
    unit = 2.0**-53
    num_classes = classes.thresholds.shape[0]
    for i in range(out.shape[0]):
        counter = (start + i) * DRAWS_PER_PLACE
        drawn = np.int64(np.float64(bits_at(key, counter) >> np.uint64(11)) * unit * num_classes)
        if bits_at(key, counter + 1) >> np.uint64(11) >= classes.thresholds[drawn]:
            drawn = classes.others[drawn]
        begin = classes.begins[drawn]
        num_cells = classes.begins[drawn + 1] - begin
        at = np.int64(np.float64(bits_at(key, counter + 2) >> np.uint64(11)) * unit * num_cells)
        out[i] = np.int64(classes.cells[begin + at])
