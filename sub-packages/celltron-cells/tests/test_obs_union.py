import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celltron.cells.obs_union import MISSING, groups_of, obs_frame, unite_columns
from celltron.core import InputError


def values_of(column: pd.Series) -> list[object]:
    return [None if pd.isna(value) else value for value in column]


COLUMNS = {
    "whole": pd.Series([3, -1], dtype=np.int32),
    "large": pd.Series([2**53 + 1, 0]),
    "huge": pd.Series([2**64 - 1, 0], dtype=np.uint64),
    "number": pd.Series([0.5, np.nan], dtype=np.float32),
    "double": pd.Series([0.1, 1e300]),
    "truth": pd.Series([True, False]),
    "maybe": pd.Series([True, None], dtype=object),
    "text": pd.Series(["b", None], dtype=object),
    "category": pd.Series(pd.Categorical(["b", "a"], categories=["z", "b", "a"])),
    "other": pd.Series(pd.Categorical(["c", None])),
    "coded": pd.Series(pd.Categorical([5, 6])),
    "day": pd.Series(pd.to_datetime(["2024-01-02", "2024-01-03"])),
    "nothing": pd.Series([None, None], dtype=object),
    "part": pd.Series([2**53 + 1, None], dtype="Int64"),
    "lacking": None,
}


@pytest.mark.parametrize(
    ("names", "dtype", "expected"),
    [
        (["whole", "large"], "int64", [3, -1, 2**53 + 1, 0]),
        (["whole", "whole"], "int32", [3, -1, 3, -1]),
        (["whole", "lacking", "large"], "Int64", [3, -1, None, None, 2**53 + 1, 0]),
        (["huge", "huge"], "object", [str(2**64 - 1), "0", str(2**64 - 1), "0"]),
        (["whole", "huge"], "object", ["3", "-1", str(2**64 - 1), "0"]),
        (["whole", "number"], "float64", [3.0, -1.0, 0.5, None]),
        (["number", "double"], "float64", [0.5, None, 0.1, 1e300]),
        (["large", "double"], "object", [str(2**53 + 1), "0", "0.1", "1e+300"]),
        (["number", "lacking"], "float32", [0.5, None, None, None]),
        (["truth", "truth"], "bool", [True, False, True, False]),
        (["truth", "maybe"], "boolean", [True, False, True, None]),
        (["lacking", "truth"], "boolean", [None, None, True, False]),
        (["truth", "whole"], "object", ["True", "False", "3", "-1"]),
        (["maybe", "text"], "object", ["True", None, "b", None]),
        (["category", "other", "lacking"], "category", ["b", "a", "c", None, None, None]),
        (["category", "text"], "object", ["b", "a", "b", None]),
        (["coded", "category"], "object", ["5", "6", "b", "a"]),
        (["text", "double"], "object", ["b", None, "0.1", "1e+300"]),
        (["day", "lacking"], "datetime64[ns]", [*map(pd.Timestamp, ["2024-01-02", "2024-01-03"]), None, None]),
        (["nothing", "whole"], "Int64", [None, None, 3, -1]),
        (["part", "whole"], "Int64", [2**53 + 1, None, 3, -1]),
        (["part", "double"], "object", [str(2**53 + 1), None, "0.1", "1e+300"]),
        (["nothing", "lacking"], "object", [None] * 4),
    ],
)
def test_columns_of_two_readers(names: list[str], dtype: str, expected: list[object]) -> None:
    found = unite_columns([COLUMNS[name] for name in names], [2] * len(names), "obs column 'x'")
    assert str(found.dtype) == dtype and values_of(found) == expected
    assert found.index.equals(pd.RangeIndex(2 * len(names)))


@pytest.mark.parametrize("others", [{}, {"word": ["x", "y", None]}])
def test_whole_numbers_stay_whole_where_some_are_missing(others: dict[str, list[str | None]]) -> None:
    large = pa.array([2**53 + 1, None, -(2**63)])
    small = pa.array([255, None, 0], pa.uint8())
    found = obs_frame(pa.table({"large": large, **others, "small": small}))
    assert list(found) == ["large", *others, "small"] and found.index.equals(pd.RangeIndex(3))
    assert found.dtypes["large"] == "Int64" and found.dtypes["small"] == "UInt8"
    assert values_of(found["large"]) == large.to_pylist() and values_of(found["small"]) == small.to_pylist()
    whole = obs_frame(pa.table({"large": large.drop_null(), "number": [0.5, None]}))
    assert whole.dtypes.astype(str).tolist() == ["int64", "float64"]


def test_one_reader_keeps_its_column() -> None:
    assert unite_columns([COLUMNS["category"]], [2], "x") is COLUMNS["category"]


def test_readers_without_cells_have_no_say() -> None:
    parts = [pd.Series([], dtype=object), COLUMNS["whole"], pd.Series([], dtype=np.float64)]
    found = unite_columns(parts, [0, 2, 0], "x")
    assert found.dtype == np.int32 and found.tolist() == [3, -1]


def test_arrays_stay_arrays_and_do_not_become_text() -> None:
    arrays = pd.Series([np.zeros(2), np.ones(2)])
    found = unite_columns([arrays, None], [2, 2], "x")
    assert np.array_equal(found[1], np.ones(2)) and found[2] is None
    with pytest.raises(InputError, match="obs column 'x' holds arrays"):
        unite_columns([arrays, COLUMNS["text"]], [2, 2], "obs column 'x'")


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(
        st.one_of(st.none(), st.lists(st.sampled_from(["a", "b", "é", MISSING, None]), min_size=1, max_size=6)),
        min_size=1,
        max_size=5,
    ).filter(lambda parts: any(part is not None for part in parts)),
    kind=st.sampled_from(["category", "object"]),
)
def test_groups_of_united_text(parts: list[list[str | None] | None], kind: str) -> None:
    columns = [None if part is None else pd.Series(part, dtype=object).astype(kind) for part in parts]
    sizes = [2 if part is None else len(part) for part in parts]
    expected = [value or MISSING for part in parts for value in ([None, None] if part is None else part)]
    codes, names = groups_of(unite_columns(columns, sizes, "x"), "x")
    assert names == sorted(set(expected)) and [names[code] for code in codes] == expected
    assert codes.dtype == np.int64


def test_values_of_one_name_are_one_group() -> None:
    codes, names = groups_of(pd.Series([1, "1", 2.5, None], dtype=object), "x")
    assert names == [MISSING, "1", "2.5"] and codes.tolist() == [1, 1, 2, 0]
    codes, names = groups_of(pd.Series([], dtype=object), "x")
    assert names == [] and len(codes) == 0
