"""The order of training cells as a config says it, made over the cells of a split."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from celltron.cells.block_order import BlockOrder
from celltron.cells.collection import CellCollection
from celltron.cells.length_order import LengthOrder
from celltron.cells.reader import CellReader
from celltron.cells.sampler import EpochOrder, Order
from celltron.cells.sampling_weights import balanced_weights, store_weights
from celltron.cells.tar_store import TarStore
from celltron.cells.weighted_order import WeightedOrder
from celltron.core import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderConfig:
    """Which training cells come when."""

    block_cells: int = 0
    """Cells of a block of neighbours on a slow disk, which are read together; 0 shuffles all cells freely. Tar shards
    have blocks of their own and are always shuffled in blocks."""
    window_blocks: int = 64
    """Blocks whose cells are shuffled together; more shuffle better and need more memory."""
    balance_by: str | None = None
    """An obs column whose classes are drawn equally often, with replacement; null takes every cell once an epoch."""
    balance_power: float = 1.0
    """How strongly: weights are the classes' frequencies to minus this power; 0 leaves them as they are."""
    use_store_weights: bool = False
    """Draw the stores of a collection by the weights in its file, with replacement."""
    length_window: int = 0
    """Batches of a window within which cells of like length are put into one batch; 0 does not look at lengths."""

    def __post_init__(self) -> None:
        for name, least in (("block_cells", 0), ("window_blocks", 1), ("length_window", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.order.{name} is {getattr(self, name)}, but must be at least {least}")
        if self.block_cells and self.is_weighted:
            raise ValueError(
                "data.order.block_cells and balance_by or use_store_weights exclude each other: cells drawn by weight "
                "come from everywhere; leave one out"
            )

    @property
    def is_weighted(self) -> bool:
        """Whether cells are drawn by weight, with replacement."""
        return self.balance_by is not None or self.use_store_weights


def make_order(
    config: OrderConfig,
    store: CellReader,
    cells: npt.NDArray[np.int64],
    lengths_of: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]],
    *,
    cells_per_batch: int,
    seed: int,
) -> Order:
    """The order that a config asks for.

    Args:
        config: what is asked.
        store: where the cells are.
        cells: int64, rising: those to train on.
        lengths_of: tokens of each of some cells.
        cells_per_batch: cells of a global batch.
        seed: of the order.
    """
    order: Order
    if config.is_weighted:
        order = WeightedOrder(_weights(config, store, cells), seed, cells=cells)
    elif isinstance(store, TarStore):
        order = BlockOrder(cells, seed, bounds=store.disk_runs, window_blocks=config.window_blocks)
    elif config.block_cells:
        order = BlockOrder(cells, seed, block_cells=config.block_cells, window_blocks=config.window_blocks)
    else:
        order = EpochOrder(cells, seed)
    if config.length_window:
        order = LengthOrder(order, lengths_of, cells_per_batch=cells_per_batch, window_batches=config.length_window)
    return order


def _weights(config: OrderConfig, store: CellReader, cells: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Of each of the cells, float64, by the classes and stores of these cells alone."""
    weights = np.ones(len(cells))
    if config.balance_by is not None:
        weights *= balanced_weights(store, config.balance_by, power=config.balance_power, cells=cells)
    if config.use_store_weights:
        if not isinstance(store, CellCollection):
            raise InputError(
                f"data.order.use_store_weights was asked, but {store.name} is no collection: name a collection's file"
            )
        weights *= store_weights(store, cells=cells)
    return weights
