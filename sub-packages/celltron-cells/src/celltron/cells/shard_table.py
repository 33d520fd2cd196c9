"""The shards of one store or of many as one run of cells: where the counts of any of these cells lie.

S shards, K cells asked for.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from celltron.cells.memory import address_of
from celltron.cells.reader import Located
from celltron.cells.row_table import RowTable, locate_rows
from celltron.cells.shard import Shard
from celltron.core import InputError

_ENDS = np.empty(0, dtype=np.uint64)


class ShardTable:
    """Finds cells in S shards, which are opened when the first of their cells is asked for and stay open.

    Args:
        entries: for each shard its ``cells``, ``nnz`` and the types of its ``indices`` and ``counts``.
        open_shard: maps a shard by its number; its ``totals`` must be there.
        gene_lists: int64 [S], which gene list the indices of each shard mean.
    """

    def __init__(
        self,
        entries: Sequence[Mapping[str, Any]],
        open_shard: Callable[[int], Shard],
        gene_lists: npt.NDArray[np.int64],
    ) -> None:
        def item_bytes(name: str) -> npt.NDArray[np.uint64]:
            return np.array([np.dtype(entry[name]).itemsize for entry in entries], dtype=np.uint64)

        def unknown() -> npt.NDArray[np.uint64]:
            return np.zeros(len(entries), dtype=np.uint64)

        kinds = [
            (str(entry["indices"]), str(entry["counts"]), int(genes))
            for entry, genes in zip(entries, gene_lists, strict=True)
        ]
        self._kinds = sorted(set(kinds))
        number_of = {kind: number for number, kind in enumerate(self._kinds)}
        self._rows = RowTable(
            starts=np.cumsum([0] + [int(entry["cells"]) for entry in entries], dtype=np.int64),
            nnz=np.array([int(entry["nnz"]) for entry in entries], dtype=np.int64),
            indptr=unknown(),
            indices=unknown(),
            counts=unknown(),
            totals=unknown(),
            index_bytes=item_bytes("indices"),
            count_bytes=item_bytes("counts"),
            kinds=np.array([number_of[kind] for kind in kinds], dtype=np.int64),
        )
        self._open_shard = open_shard
        self._open: dict[int, Shard] = {}
        self._is_open = np.zeros(len(entries), dtype=np.bool_)
        self._lock = threading.Lock()

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """int64 [S+1]: the first cell of each shard, then the number of all cells."""
        return self._rows.starts

    def locate(self, cells: npt.NDArray[np.int64]) -> list[Located]:
        """Where the counts of cells (checked numbers) lie: one `Located` for each pair of types and gene list."""
        shard_of = np.searchsorted(self.starts, cells, side="right") - 1
        is_open = self._is_open[shard_of]
        if not is_open.all():
            for i in np.unique(shard_of[~is_open]).tolist():
                self.shard(i)
        return locate_rows(cells, shard_of, self._rows, _ENDS, self._kinds, memory=(self,), damage=self._damage_of)

    def _damage_of(self, i: int) -> InputError:
        return InputError(
            f"{self._open[i].folder / 'indptr.bin'} is damaged: a cell ends where the shard does not; run celltron "
            "verify"
        )

    def shard(self, i: int) -> Shard:
        """The mapped arrays of a shard."""
        with self._lock:
            if not self._is_open[i]:
                self._open[i] = shard = self._open_shard(i)
                assert shard.totals is not None, f"no totals of {shard.folder}"
                self._rows.indptr[i] = address_of(shard.indptr)
                self._rows.indices[i] = address_of(shard.indices)
                self._rows.counts[i] = address_of(shard.counts)
                self._rows.totals[i] = address_of(shard.totals)
                self._is_open[i] = True  # last: other threads look at it without the lock
            return self._open[i]
