"""Weights for drawing cells with replacement: by store, by class; combined by multiplying.

Cells of one class or store have one weight, to the bit: `celltron.cells.weighted_order.WeightedOrder` relies on it.

C cells.
"""

import numpy as np
import numpy.typing as npt

from celltron.cells.collection import CellCollection
from celltron.cells.obs_union import MISSING, groups_of
from celltron.cells.reader import CellReader
from celltron.core import InputError


def store_weights(collection: CellCollection, cells: npt.ArrayLike | None = None) -> npt.NDArray[np.float64]:
    """Weights under which cells are drawn from each store as often as the collection's weights say.

    A cell's weight is (weight of its store) / (number of the cells that are of this store), scaled to a mean of 1; it
    is 1 in a collection without weights. A store with none of the cells takes no part.

    Args:
        collection: the stores and their weights.
        cells: the cells that are drawn from, such as those of training; all otherwise.

    Returns:
        float64 [C], one weight for each of ``cells``.
    """
    chosen = None if cells is None else collection.check_cells(cells)
    if collection.weights is None:
        return np.ones(len(collection) if chosen is None else len(chosen))
    sizes = np.diff(collection.starts)
    if chosen is None:
        member_of = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    else:
        member_of = (np.searchsorted(collection.starts, chosen, side="right") - 1).astype(np.int32)
    shares = np.array(collection.weights)
    if not shares[np.unique(member_of)].any():
        raise InputError(
            f"the stores of {collection.name} that have any of the {len(member_of)} cells have weight 0, so that "
            "nothing can be drawn: raise one's weight"
        )
    return _spread(member_of, shares)


def balanced_weights(
    reader: CellReader,
    column: str,
    *,
    power: float = 1.0,
    exclude_missing: bool = False,
    cells: npt.ArrayLike | None = None,
) -> npt.NDArray[np.float64]:
    """Weights under which the classes of a column of obs are drawn alike often.

    A cell's weight is (number of the cells of its class) ** -power, scaled to a mean of 1.

    Args:
        reader: the cells.
        column: column of obs; cells without a value are a class of their own.
        power: 1 draws every class alike often, 0 every cell; between them, large classes come more often than small.
        exclude_missing: give cells without a value weight 0, so that they are never drawn.
        cells: the cells that are drawn from, such as those of training; all otherwise. Class sizes are of these.

    Returns:
        float64 [C], one weight for each of ``cells``.
    """
    if not 0.0 <= power <= 10.0:
        raise InputError(f"power is {power}: wanted a number from 0 (no balance) over 1 (full balance) to 10")
    values = reader.obs_column(column)
    if cells is not None:
        values = values.iloc[reader.check_cells(cells)]
    if not len(values):
        return np.zeros(0, dtype=np.float64)
    class_of, names = groups_of(values, f"obs column {column!r} of {reader.name}")
    sizes = np.bincount(class_of, minlength=len(names)).astype(np.float64)
    shares = sizes ** (1.0 - power)
    if exclude_missing and MISSING in names:
        shares[names.index(MISSING)] = 0.0
        if len(names) == 1:
            raise InputError(
                f"obs column {column!r} of {reader.name} has no value for any of the {len(values)} cells: name another "
                "column or keep the missing ones"
            )
    return _spread(class_of, shares)


def _spread(class_of: npt.NDArray[np.integer], shares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A weight for each cell, of mean 1, under which each class is drawn in proportion to its share."""
    sizes = np.bincount(class_of, minlength=len(shares))
    shares = np.where(sizes > 0, shares / shares.max(), 0.0)
    per_cell = shares / np.maximum(sizes, 1) * (len(class_of) / np.cumsum(shares)[-1])
    return np.asarray(per_cell[class_of], dtype=np.float64)
