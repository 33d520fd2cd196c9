"""One table of cells out of several sources: which columns, of which type."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from celltron.cells.gene_map import common_type, free_name
from celltron.cells.ingest.anndata_frame import CATEGORY, as_text
from celltron.cells.ingest.source import Source
from celltron.core import InputError

OWN_COLUMNS = ("cell_id", "source", "total_counts")
OBSM_PREFIX = "obsm/"


@dataclass(frozen=True, slots=True, kw_only=True)
class ObsColumns:
    """What one source has of the wanted columns and arrays: their types, and what became text, and why."""

    name: str
    types: dict[str, pa.DataType]
    arrays: dict[str, pa.FixedSizeListType]
    notes: dict[str, str]


def look_at_obs(source: Source, wanted: Sequence[str] | None, obsm: Sequence[str]) -> ObsColumns:
    """The types of the columns ``wanted`` (None: all) and of the arrays ``obsm``; one that is not there is refused."""
    obs = source.obs
    for name in wanted or ():
        if name not in obs.columns:
            there = ", ".join(obs.columns) or "none"
            raise InputError(
                f"{source.name} has no obs column {name!r}: it has {there}; name one of these in obs_columns"
            )
    names = [name for name in obs.columns if wanted is None or name in wanted]
    return ObsColumns(
        name=source.name,
        types={name: obs.column(name, 0, min(1, obs.num_rows)).type for name in names},
        arrays={key: _array_type(source, key) for key in obsm},
        notes={name: note for name, note in obs.notes.items() if name in names},
    )


def _array_type(source: Source, key: str) -> pa.FixedSizeListType:
    if key not in source.obsm:
        there = ", ".join(source.obsm) or "none"
        raise InputError(f"{source.name} has no obsm array {key!r}: it has {there}; name one of these in obsm")
    shape = source.obsm[key].shape
    if len(shape) != 2 or shape[1] == 0:
        raise InputError(f"obsm {key!r} of {source.name} has the shape {shape}, wanted rows of numbers; leave it out")
    return _rows_array(source.obsm[key][0:1]).type


def _rows_array(rows: npt.NDArray[np.generic]) -> pa.FixedSizeListArray:
    plain = rows.astype(np.float32) if rows.dtype == np.float16 else rows
    flat = np.ascontiguousarray(plain, dtype=plain.dtype.newbyteorder("=")).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), rows.shape[1])


@dataclass(slots=True)
class ObsSchema:
    """The union of the obs columns of several sources.

    A column that the sources store in different ways becomes text, and ``notes`` says so; a column that a source lacks
    is missing there. Arrays of obsm are lists of one length, in columns ``obsm/<key>``.

    Args:
        store: where sources are added to a store, its columns and their types; new columns are brought to these.
    """

    store: Mapping[str, pa.DataType] = field(default_factory=dict)
    types: dict[str, pa.DataType] = field(default_factory=dict)
    arrays: dict[str, pa.FixedSizeListType] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)

    def add(self, columns: ObsColumns) -> None:
        """Take in the columns of one source."""
        for name, note in columns.notes.items():
            self.notes.setdefault(f"{name} ({note})")
        for name, kind in columns.types.items():
            self.types[name] = self._join(name, self.types.get(name, kind), kind)
        for key, kind in columns.arrays.items():
            joined = _join_arrays(self.arrays.get(key, kind), kind)
            if joined is None:
                raise InputError(
                    f"obsm {key!r} of {columns.name} holds rows of {kind.list_size} {kind.value_type}, the sources "
                    f"before it {self.arrays[key].list_size} {self.arrays[key].value_type}; leave it out or convert it "
                    "apart"
                )
            self.arrays[key] = joined

    def _join(self, name: str, first: pa.DataType, second: pa.DataType) -> pa.DataType:
        if first == second:
            return first
        if _is_text(first) and _is_text(second):
            return pa.string()
        common = common_type({first, second})
        if common is None:
            self.notes.setdefault(f"{name} (of different types in different files)")
        return common or pa.string()

    def columns(self) -> dict[str, tuple[str, pa.DataType]]:
        """By its name on disk, each column's name in the sources and its type; arrays of obsm last.

        Raises:
            InputError: a column cannot be brought to the type that the store has for it.
        """
        found: dict[str, tuple[str, pa.DataType]] = {}
        taken = dict.fromkeys(OWN_COLUMNS)
        for name, kind in [*self.types.items(), *((OBSM_PREFIX + key, kind) for key, kind in self.arrays.items())]:
            on_disk = free_name(name, taken)
            taken[on_disk] = None
            found[on_disk] = name, self._type_in_store(on_disk, kind)
        return found

    def _type_in_store(self, name: str, kind: pa.DataType) -> pa.DataType:
        there = self.store.get(name, kind)
        if kind == there or (_is_text(kind) and _is_text(there)):
            return there
        if there == pa.string():
            self.notes.setdefault(f"{name} (text in the store)")
            return there
        if pa.types.is_fixed_size_list(kind) and pa.types.is_fixed_size_list(there):
            fits = _join_arrays(there, kind) == there
        else:
            fits = not pa.types.is_dictionary(there) and common_type({there, kind}) == there
        if not fits:
            raise InputError(
                f"the obs column {name!r} is {_show(there)} in the store and {_show(kind)} in the new sources; name "
                "the columns to keep in obs_columns without it, or convert all sources together"
            )
        return there

    def table(self, source: Source, label: str, start: int, totals: npt.NDArray[np.float64]) -> pa.Table:
        """A run of one source's cells from ``start`` on: ``cell_id``, ``source``, ``total_counts``, the columns.

        Args:
            source: it has the columns that `look_at_obs` saw.
            label: what the column ``source`` says.
            start: the first cell.
            totals: float64, one for each cell of the run.
        """
        stop = start + len(totals)
        columns: dict[str, pa.Array] = {
            "cell_id": source.obs.index(start, stop),
            "source": pa.DictionaryArray.from_arrays(np.zeros(len(totals), dtype=np.int32), pa.array([label])),
            "total_counts": pa.array(totals),
        }
        for on_disk, (name, kind) in self.columns().items():
            if not pa.types.is_fixed_size_list(kind):
                is_there = name in source.obs.columns
                array = source.obs.column(name, start, stop) if is_there else pa.nulls(len(totals), pa.string())
                columns[on_disk] = _as_type(array, kind, f"the obs column {name!r} of {source.name}")
            else:
                rows = _rows_array(source.obsm[name.removeprefix(OBSM_PREFIX)][start:stop])
                columns[on_disk] = _as_type(rows, kind, f"{name} of {source.name}")
        return pa.table(columns)


def _is_text(kind: pa.DataType) -> bool:
    return bool(kind == pa.string() or pa.types.is_dictionary(kind))


def _show(kind: pa.DataType) -> str:
    return "text" if _is_text(kind) else str(kind)


def _join_arrays(first: pa.FixedSizeListType, second: pa.FixedSizeListType) -> pa.FixedSizeListType | None:
    value = common_type({first.value_type, second.value_type})
    return None if value is None or first.list_size != second.list_size else pa.list_(value, first.list_size)


def _as_type(array: pa.Array, kind: pa.DataType, what: str) -> pa.Array:
    if array.type == kind:
        return array
    if kind == pa.string():
        return as_text(array)
    if kind == CATEGORY:
        return as_text(array).dictionary_encode()
    try:
        return array.cast(kind)
    except pa.ArrowInvalid as error:
        raise InputError(f"{what} cannot be stored as {kind} ({error}); leave it out") from error
