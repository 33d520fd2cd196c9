"""One table of cells out of several files: which columns, of which type."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from celltron.cells.gene_map import free_name
from celltron.cells.h5ad_frame import CATEGORY, H5adFrame, as_text
from celltron.core import InputError

OWN_COLUMNS = ("cell_id", "source", "total_counts")


@dataclass(slots=True)
class ObsSchema:
    """The union of the obs columns of several sources; ``wanted`` None takes every column.

    A column that the files store in different ways becomes text, and ``notes`` says so; a column that a file lacks is
    missing there.
    """

    wanted: Sequence[str] | None = None
    types: dict[str, pa.DataType] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)

    def add(self, obs: H5adFrame, path: Path) -> None:
        """Take in the columns of one source."""
        if self.wanted is not None:
            for name in self.wanted:
                if name not in obs.columns:
                    there = ", ".join(obs.columns) or "none"
                    raise InputError(
                        f"{path} has no obs column {name!r}: it has {there}; name one of these in obs_columns"
                    )
        for name, note in obs.notes.items():
            if self._is_wanted(name):
                self.notes.setdefault(f"{name} ({note})")
        for name in obs.columns:
            if self._is_wanted(name):
                kind = obs.column(name, 0, min(1, obs.num_rows)).type
                self.types[name] = self._join(name, self.types.get(name, kind), kind)

    def _is_wanted(self, name: str) -> bool:
        return self.wanted is None or name in self.wanted

    def _join(self, name: str, first: pa.DataType, second: pa.DataType) -> pa.DataType:
        if first == second:
            return first
        texts = [kind == pa.string() or pa.types.is_dictionary(kind) for kind in (first, second)]
        if all(texts):
            return pa.string()
        if all(pa.types.is_integer(kind) for kind in (first, second)):
            return pa.int64()
        if all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in (first, second)):
            return pa.float64()
        self.notes.setdefault(f"{name} (of different types in different files)")
        return pa.string()

    def table(self, obs: H5adFrame, source: str, start: int, totals: npt.NDArray[np.float64]) -> pa.Table:
        """A run of one source's cells from ``start`` on: ``cell_id``, ``source``, ``total_counts``, the columns."""
        stop = start + len(totals)
        columns: dict[str, pa.Array] = {
            "cell_id": obs.index(start, stop),
            "source": pa.DictionaryArray.from_arrays(np.zeros(len(totals), dtype=np.int32), pa.array([source])),
            "total_counts": pa.array(totals),
        }
        for name, kind in self.types.items():
            if name in obs.columns:
                array = obs.column(name, start, stop)
                if array.type != kind:
                    array = as_text(array) if kind == pa.string() else array.cast(kind)
            else:
                array = _missing(len(totals), kind)
            columns[free_name(name, columns)] = array
        return pa.table(columns)


def _missing(length: int, kind: pa.DataType) -> pa.Array:
    if kind == CATEGORY:
        indices = pa.nulls(length, type=pa.int32())
        return pa.DictionaryArray.from_arrays(indices, pa.array([], type=pa.string()))
    return pa.nulls(length, type=kind)
