"""Columns of obs: their groups of cells, and the column of several readers as one.

C cells.
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from pandas.api.types import (
    infer_dtype,
    is_bool_dtype,
    is_float_dtype,
    is_integer_dtype,
    is_string_dtype,
    union_categoricals,
)

from celltron.core import InputError

MISSING = "(missing)"
"""The group of the cells that have no value in a column."""
LARGEST_EXACT = 2**53
"""Whole numbers up to here are exact in float64."""
_OBJECTS = np.dtype(object)
_WHOLE = {
    pa.int8(): pd.Int8Dtype(),
    pa.int16(): pd.Int16Dtype(),
    pa.int32(): pd.Int32Dtype(),
    pa.int64(): pd.Int64Dtype(),
    pa.uint8(): pd.UInt8Dtype(),
    pa.uint16(): pd.UInt16Dtype(),
    pa.uint32(): pd.UInt32Dtype(),
    pa.uint64(): pd.UInt64Dtype(),
}


def obs_frame(table: pa.Table) -> pd.DataFrame:
    """A table of obs for pandas; whole numbers of which some are missing stay whole (`Int64` and its like)."""
    lacking = [name for name in table.column_names if table[name].type in _WHOLE and table[name].null_count]
    if not lacking:
        return cast(pd.DataFrame, table.to_pandas(split_blocks=True))
    whole = pd.DataFrame({name: table[name].to_pandas(types_mapper=_WHOLE.get) for name in lacking})
    others = table.drop_columns(lacking).to_pandas(split_blocks=True)
    frame: pd.DataFrame = pd.concat([others, whole], axis=1)[table.column_names]
    return frame


def groups_of(column: "pd.Series[Any]", where: str) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Put cells that have the same value into one group.

    Args:
        column: one value a cell.
        where: what the column is called in messages.

    Returns:
        The number of each cell's group, int64 [C], and the groups' names: the values as text, rising, among them
        `MISSING` where cells have none.
    """
    codes, names = _factorise(column, where)
    if (codes < 0).any():
        codes = np.where(codes < 0, len(names), codes)
        names = [*names, MISSING]
    rising, places = np.unique(np.array(names, dtype=object), return_inverse=True)
    return places.astype(np.int64)[codes], [str(name) for name in rising]


def _factorise(column: "pd.Series[Any]", where: str) -> tuple[npt.NDArray[np.int64], list[str]]:
    """For each cell the number of its value or -1, and the values as text, some of which may be equal."""
    try:
        codes, values = pd.factorize(column)
    except TypeError as error:
        raise InputError(
            f"{where} holds arrays, wanted one text, number or truth value a cell: name another column"
        ) from error
    return codes.astype(np.int64, copy=False), [str(value) for value in pd.Series(values).astype(object)]


def unite_columns(parts: Sequence["pd.Series[Any] | None"], sizes: Sequence[int], where: str) -> "pd.Series[Any]":
    """The column of several readers over the cells of all, one reader after the other.

    Categories stay categories, whole numbers and truth values stay what they are and become pandas' Int64 and boolean
    where values are missing; whole numbers beside others become float64 where each is exact there. What the readers
    hold in ways that do not go together becomes text.

    Args:
        parts: the column of each reader; None, of not all of them, where it lacks the column.
        sizes: cells of each reader.
        where: what the column is called in messages.
    """
    given = [part for part in parts if part is not None]
    pieces = [(part, size) for part, size in zip(parts, sizes, strict=True) if size]
    pieces = [(None if part is None or part.isna().all() else part, size) for part, size in pieces]
    there = [part for part, _ in pieces if part is not None]
    if len(parts) == 1 or not there:
        return given[0] if len(parts) == 1 else _missing(sum(sizes), _OBJECTS)
    if {_kind_of(part) for part in there} == {"category"}:
        empty = pd.Categorical([], categories=there[0].cat.categories)
        arrays = [
            empty.take(np.full(size, -1), allow_fill=True) if part is None else part.array for part, size in pieces
        ]
        return pd.Series(union_categoricals(arrays, ignore_order=True))
    dtype = _joined_type(there, is_complete=len(there) == len(pieces))
    if dtype is None:
        dtype = _OBJECTS
        pieces = [(None if part is None else _as_text(part, where), size) for part, size in pieces]
    columns = [_missing(size, dtype) if part is None else part.astype(dtype) for part, size in pieces]
    united: pd.Series[Any] = pd.concat(columns, ignore_index=True)
    return united


def _kind_of(column: "pd.Series[Any]") -> str:
    """What the values are, as far as it matters to those of other readers."""
    dtype = column.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        is_text = is_string_dtype(dtype.categories.dtype) or infer_dtype(dtype.categories) == "string"
        return "category" if is_text else f"category of {dtype.categories.dtype}"
    for kind, is_of in (("truth", is_bool_dtype), ("whole", is_integer_dtype), ("number", is_float_dtype)):
        if is_of(dtype):
            return kind
    if dtype == _OBJECTS or is_string_dtype(dtype):
        inferred = infer_dtype(column, skipna=True)
        return {"string": "text", "boolean": "truth"}.get(inferred, f"objects ({inferred})")
    return str(dtype)


def _joined_type(parts: Sequence["pd.Series[Any]"], *, is_complete: bool) -> Any:
    """The type for the values of all parts, and for missing ones unless ``is_complete``; None is text."""
    kinds, types = {_kind_of(part) for part in parts}, {part.dtype for part in parts}
    is_plain = is_complete and all(isinstance(dtype, np.dtype) and dtype != _OBJECTS for dtype in types)
    wholes = [part.dropna() for part in parts if _kind_of(part) == "whole"]
    largest = max((max(int(part.max()), -int(part.min())) for part in wholes), default=0)
    if kinds == {"truth"}:
        return np.dtype(bool) if is_plain else pd.BooleanDtype()
    if kinds == {"whole"} and largest <= np.iinfo(np.int64).max:
        joined = types.pop() if len(types) == 1 else np.dtype(np.int64)
        return joined if is_plain else pd.Int64Dtype()
    if "number" in kinds and kinds <= {"whole", "number"} and largest <= LARGEST_EXACT:
        return types.pop() if len(types) == 1 else np.dtype(np.float64)
    if kinds <= {"text", "category"}:
        return _OBJECTS
    return types.pop() if len(types) == 1 and len(kinds) == 1 and kinds != {"whole"} else None


def _as_text(column: "pd.Series[Any]", where: str) -> "pd.Series[Any]":
    codes, names = _factorise(column, where)
    return pd.Series(np.array([*names, None], dtype=object)[codes])


def _missing(size: int, dtype: Any) -> "pd.Series[Any]":
    """A column without values."""
    nothing = np.full(size, None, dtype=_OBJECTS) if dtype == _OBJECTS else None
    column: pd.Series[Any] = pd.Series(nothing, index=pd.RangeIndex(size), dtype=dtype)
    return column
