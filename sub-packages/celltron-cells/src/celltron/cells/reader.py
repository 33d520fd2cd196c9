"""What everything that holds cells can do: a store on disk, a collection of stores, tar shards behind an address.

C cells, G genes, N non-zero counts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from celltron.core import InputError


class CellIndexError(InputError, IndexError):
    """A cell number outside the store."""


class Rows(NamedTuple):
    """Cells in compressed rows: ``indptr`` int64 [C+1], ``gene_index`` [N] (rising in each cell) and ``counts`` [N]."""

    indptr: npt.NDArray[np.int64]
    gene_index: npt.NDArray[Any]
    counts: npt.NDArray[Any]


class Located(NamedTuple):
    """Where the counts of some cells lie in memory; all of one gene list and one pair of types.

    ``slots`` int64 [K], their places among the cells that were asked for; ``index_addresses`` and ``count_addresses``
    uint64 [K], of the first gene index and the first count of each; ``sizes`` int64 [K], how many it has; ``totals``
    float64 [K], the total counts; ``index_dtype`` and ``count_dtype``, little-endian; ``member``, which of the reader's
    gene lists the indices mean; ``memory``, what must live as long as the addresses are used.
    """

    slots: npt.NDArray[np.int64]
    index_addresses: npt.NDArray[np.uint64]
    count_addresses: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.int64]
    totals: npt.NDArray[np.float64]
    index_dtype: str
    count_dtype: str
    member: int
    memory: tuple[object, ...]


class CellReader(Protocol):
    """C cells in G genes, read-only; the cells are numbered from 0. Safe to use from several threads at once."""

    name: str
    """Path or address, for messages."""
    num_genes: int
    gene_maps: tuple[npt.NDArray[np.int64] | None, ...]
    """For each member its genes' places in ``gene_ids``, int64; None where they are the same."""

    def __len__(self) -> int: ...

    @property
    def gene_ids(self) -> tuple[str, ...]:
        """The Ensembl id of each gene index."""

    @property
    def genes_fingerprint(self) -> str:
        """sha256 (hex) of the gene ids in order."""

    @property
    def fingerprint(self) -> str:
        """sha256 (hex), equal for equal content, wherever it lies."""

    def check_cells(self, cells: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Cell numbers as int64 [C]; one outside is a `CellIndexError`."""

    def locate(self, cells: npt.NDArray[np.int64]) -> list[Located]:
        """Where the counts of cells (checked, in any order, repeats allowed) lie; each slot comes once."""

    def rows(self, cells: npt.ArrayLike) -> Rows:
        """Cells in the given order, repeats allowed, as copies, in the reader's own gene indices."""

    def totals(self, cells: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """float64 [C]: the sum of all counts of each cell in its source, genes that were left out too."""

    @property
    def obs_columns(self) -> list[str]:
        """The names of the columns of obs."""

    def obs_column(self, name: str) -> "pd.Series[Any]":
        """One column of obs over all cells, read alone; an unknown name is an InputError.

        Whole numbers of which some are missing are pandas' nullable ones, such as ``Int64``, and never rounded.
        """

    def verify(self, progress: Callable[[int, int], None] | None = None, *, workers: int | None = None) -> None:
        """Read everything, on some threads, and compare it with its checksums; an InputError names what differs."""

    def info(self) -> str:
        """A few lines for a person."""

    @property
    def disk_runs(self) -> npt.NDArray[np.int64]:
        """int64 [runs + 1], rising, from 0 to C: cells between two bounds lie together on disk."""


def checked_cells(cells: npt.ArrayLike, num_cells: int, name: str) -> npt.NDArray[np.int64]:
    """Cell numbers as int64 [C]; one outside ``0 .. num_cells - 1`` is a `CellIndexError`."""
    array = np.atleast_1d(np.asarray(cells))
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(
            f"cells must be a list of whole numbers, got an array of {array.dtype} with shape {array.shape}"
        )
    lowest, highest = int(array.min()), int(array.max())
    if lowest < 0 or highest >= num_cells:
        wrong = lowest if lowest < 0 else highest
        raise CellIndexError(f"there is no cell {wrong} in {name}: its cells are numbered 0 to {num_cells - 1}")
    return array.astype(np.int64, copy=False)
