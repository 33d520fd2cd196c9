"""Numbers of MatrixMarket lines are those that Python reads, whatever is between them; bad lines are named."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from celltron.cells.ingest.mtx_text import Entries, parse_entries
from celltron.core import InputError

SHAPE = (7, 9)


def parse(text: str, lines_before: int = 0) -> Entries:
    return parse_entries(text.encode(), SHAPE, "a.mtx", lines_before)


def test_lines() -> None:
    entries = parse("1 1 5\r\n9\t7   12 \n\n  2 3 4")
    assert entries.genes.tolist() == [0, 8, 1] and entries.genes.dtype == np.int32
    assert entries.cells.tolist() == [0, 6, 2] and entries.cells.dtype == np.int32
    assert entries.values.tolist() == [5.0, 12.0, 4.0]
    assert all(len(array) == 0 for array in parse(""))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(allow_nan=False) | st.integers(-(2**70), 2**70), min_size=1, max_size=20), st.integers(0, 3))
@example(
    [1e22, 1e23, 1e-22, 1e-23, 0.1, 123456789012345.0, 1234567890123456.0, -0.0, 5e-324, 1.7976931348623157e308], 0
)
def test_values_are_pythons(values: list[float], form: int) -> None:
    words = [(repr(v), f"{v:.16e}", f"{v:.3f}", f"{v:g}")[form] for v in values]
    found = parse("".join(f"1 1 {word}\n" for word in words)).values
    wanted = np.array([float(word) for word in words])
    assert np.array_equal(found, wanted) and np.array_equal(np.signbit(found), np.signbit(wanted))


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("+3", 3.0),
        ("007", 7.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("1e3", 1000.0),
        ("1.5E-01", 0.15),
        ("1.50000000000000e+00", 1.5),
    ]
    + [
        ("0e9999", 0.0),
        ("1200", 1200.0),
        ("0.00000000000000000000000000012", 1.2e-28),
        ("inf", np.inf),
        ("-inf", -np.inf),
    ],
)
def test_forms_of_numbers(word: str, wanted: float) -> None:
    assert parse(f"1 1 {word}\n").values.tolist() == [wanted]


def test_nan() -> None:
    assert np.isnan(parse("1 1 nan\n1 1 NaN\n").values).all()


@pytest.mark.parametrize("line", ["1 1", "1", "1 1 x", "1 1 2 3", "a 1 1", "1.0 1 1", "-1 1 1", "1 1 1.2.3", "1 1 1e"])
@pytest.mark.parametrize("before", [0, 3])
def test_what_is_no_line(line: str, before: int) -> None:
    with pytest.raises(
        InputError, match=f"line {before + 12} of a.mtx is '{line}': wanted a gene, a cell and a number"
    ):
        parse("1 1 1\n" * before + f"{line}\n2 2 2\n", lines_before=11)


@pytest.mark.parametrize("line", ["0 1 1", "10 1 1", "1 0 1", "1 8 1", "999999999999999999 1 1"])
def test_indices_out_of_range(line: str) -> None:
    with pytest.raises(InputError, match=f"line 2 of a.mtx is '{line}'"):
        parse(f"9 7 1\n{line}\n")
