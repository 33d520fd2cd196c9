"""How well an order shuffles: the entropy of the labels in its batches against that of a perfect shuffle.

K labels, N cells of an epoch, n cells of a batch.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import gammaln

from celltron.cells.sampler import LoaderState, Order
from celltron.core import InputError

STEP_CELLS = 1 << 20
"""Cells of an epoch that are looked at together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShuffleEntropy:
    """How mixed batches are; `str` is the line to print."""

    bits: float
    """Mean entropy of the labels in a batch."""
    perfect_bits: float
    """What it is for batches drawn at random from the same cells, without replacement."""
    cells_per_batch: int
    """Cells of the batches looked at."""
    num_batches: int
    """How many were looked at."""

    @property
    def ratio(self) -> float:
        """Share of the perfect shuffle's entropy; 1 where that is 0, which is where there is only one label."""
        return self.bits / self.perfect_bits if self.perfect_bits > 0.0 else 1.0

    def __str__(self) -> str:
        return (
            f"shuffle: {self.bits:.3f} bits a batch of {self.cells_per_batch} cells, of {self.perfect_bits:.3f} in a "
            f"perfect shuffle ({100 * self.ratio:.1f} %, over {self.num_batches} batches)"
        )


def shuffle_entropy(
    order: Order,
    labels: npt.ArrayLike | pd.Series,
    *,
    cells_per_batch: int,
    epoch: int = 0,
    num_batches: int = 256,
    cells: npt.NDArray[np.int64] | None = None,
) -> ShuffleEntropy:
    """The entropy an order achieves: the mean over batches of -sum_k p_k log2 p_k, where p_k is label k's share.

    A perfect shuffle has, with N_k cells of label k among N and hypergeometric counts X_k of a batch of n, the mean
    sum_k E[-(X_k / n) log2(X_k / n)], which is computed, not drawn.

    Args:
        order: whose batches.
        labels: of each cell by its id: an obs column, or the block on disk in which it lies; missing ones are a
            label of their own.
        cells_per_batch: cells of a batch; at most those of an epoch.
        epoch: whose batches.
        num_batches: batches looked at, spread over the epoch; all when there are fewer.
        cells: int64 [N], the cells of an epoch, when they are known; the epoch is gone through otherwise.
    """
    if not 1 <= cells_per_batch <= len(order):
        raise InputError(f"cells_per_batch is {cells_per_batch}: wanted 1 to {len(order)}, the cells of an epoch")
    if num_batches < 1:
        raise InputError(f"num_batches is {num_batches}: wanted 1 or more batches to look at")
    codes = np.asarray(pd.factorize(pd.Series(labels), use_na_sentinel=False)[0], dtype=np.int64)
    in_epoch = len(order) // cells_per_batch
    looked_at = np.unique(np.linspace(0, in_epoch - 1, min(num_batches, in_epoch)).astype(np.int64))
    bits = [_entropy(_labels(order, codes, epoch, int(b) * cells_per_batch, cells_per_batch)) for b in looked_at]
    perfect_bits = _perfect_entropy(_label_counts(order, codes, epoch, cells), cells_per_batch)
    return ShuffleEntropy(
        bits=float(np.mean(bits)),
        perfect_bits=perfect_bits,
        cells_per_batch=cells_per_batch,
        num_batches=len(looked_at),
    )


def _labels(
    order: Order, codes: npt.NDArray[np.int64], epoch: int, position: int, num_cells: int
) -> npt.NDArray[np.int64]:
    """Of the cells from a place of the epoch on."""
    cells, _, _ = order.take(LoaderState(order.seed, epoch, position), num_cells, epochs=epoch + 1)
    if cells.max() >= len(codes):
        raise InputError(f"there are {len(codes)} labels, but the order holds cell {cells.max()}: give one a cell")
    return codes[cells]


def _label_counts(
    order: Order, codes: npt.NDArray[np.int64], epoch: int, cells: npt.NDArray[np.int64] | None
) -> npt.NDArray[np.int64]:
    """int64 [K]: cells of each label in an epoch."""
    num_labels = int(codes.max()) + 1
    if cells is not None:
        return np.bincount(codes[cells], minlength=num_labels)
    counts = np.zeros(num_labels, dtype=np.int64)
    for first in range(0, len(order), STEP_CELLS):
        counts += np.bincount(_labels(order, codes, epoch, first, STEP_CELLS), minlength=num_labels)
    return counts


def _entropy(codes: npt.NDArray[np.int64]) -> float:
    """Of the labels of one batch, in bits."""
    shares = np.unique(codes, return_counts=True)[1] / len(codes)
    return float(-(shares * np.log2(shares)).sum())


def _perfect_entropy(counts_K: npt.NDArray[np.int64], batch: int) -> float:
    """Expected entropy of ``batch`` cells drawn without replacement; labels of equal count have equal parts in it."""
    total = int(counts_K.sum())
    bits = 0.0
    for count, num_labels in zip(*np.unique(counts_K, return_counts=True), strict=True):
        drawn = np.arange(max(1, batch - (total - count)), min(batch, count) + 1, dtype=np.float64)
        log_chance = (
            _log_choose(count, drawn) + _log_choose(total - count, batch - drawn) - _log_choose(total, float(batch))
        )
        shares = drawn / batch
        bits -= num_labels * float((np.exp(log_chance) * shares * np.log2(shares)).sum())
    return bits


def _log_choose(num: float, drawn: npt.NDArray[np.float64] | float) -> npt.NDArray[np.float64]:
    """Logarithm of the binomial coefficient."""
    return np.asarray(gammaln(num + 1.0) - gammaln(drawn + 1.0) - gammaln(num - drawn + 1.0), dtype=np.float64)
