"""The lines of a MatrixMarket matrix as arrays of numbers."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from celltron.cells.compiled import compiled
from celltron.core import InputError

SHORTEST_LINE = 6  # bytes: "1 1 1\n"
MOST_DIGITS = 15
"""So many digits are exact in float64; a power of ten up to 10^22 is too, so one product or quotient rounds once."""
POWERS = np.array([10.0**k for k in range(23)])
FINE, NO_NUMBERS, OUTSIDE = range(3)
SPACE, TAB, CARRIAGE_RETURN, NEWLINE, PLUS, MINUS, POINT, ZERO, NINE = b" \t\r\n+-.09"
EXPONENTS = (101, 69)  # e, E


class Entries(NamedTuple):
    """Stored values: ``genes`` and ``cells`` int32 [n], counted from 0, ``values`` float64 [n]."""

    genes: npt.NDArray[np.int32]
    cells: npt.NDArray[np.int32]
    values: npt.NDArray[np.float64]


class _Result(NamedTuple):
    """How many values were found and how many of them are still to be read; what is wrong, and in which line."""

    num_found: int
    num_hard: int
    problem: int
    place: int


def parse_entries(text: bytes, shape: tuple[int, int], name: str, lines_before: int) -> Entries:
    """Read whole lines ``gene cell value``, counted from 1; values are rounded as Python's ``float`` does.

    Args:
        text: the lines.
        shape: how many cells and genes there are.
        name: the file, for messages.
        lines_before: how many lines of it come before these.

    Raises:
        InputError: a line is something else, or names a gene or cell that is not there.
    """
    data = np.frombuffer(text, dtype=np.uint8)
    room = len(data) // SHORTEST_LINE + 1
    entries = Entries(np.empty(room, np.int32), np.empty(room, np.int32), np.empty(room, np.float64))
    hard = np.empty((room, 3), dtype=np.int32)
    result = _Result(*_parse(data, shape, entries.genes, entries.cells, entries.values, hard))
    if result.problem != FINE:
        raise _bad_line(text, result, shape, name, lines_before)
    if result.num_hard:
        _fill_hard(text, entries.values, hard[: result.num_hard], name, lines_before)
    end = result.num_found
    return Entries(entries.genes[:end], entries.cells[:end], entries.values[:end])


@compiled
def _parse(
    data: npt.NDArray[np.uint8],
    shape: tuple[int, int],
    genes: npt.NDArray[np.int32],
    cells: npt.NDArray[np.int32],
    values: npt.NDArray[np.float64],
    hard: npt.NDArray[np.int32],
) -> tuple[int, int, int, int]:
    """The fields of a `_Result`; ``hard`` gets the entry, first and last byte of values that `_number` leaves."""
    i, count, num_hard, size = 0, 0, 0, data.shape[0]
    while True:
        while i < size and (data[i] == NEWLINE or _is_blank(data[i])):
            i += 1
        if i == size:
            return count, num_hard, FINE, 0
        line = i
        gene, i = _index(data, i)
        cell, i = _index(data, i)
        start = i
        while i < size and data[i] != NEWLINE and not _is_blank(data[i]):
            i += 1
        stop = i
        while i < size and _is_blank(data[i]):
            i += 1
        if gene < 0 or cell < 0 or start == stop or (i < size and data[i] != NEWLINE):
            return count, num_hard, NO_NUMBERS, line
        if gene < 1 or gene > shape[1] or cell < 1 or cell > shape[0]:
            return count, num_hard, OUTSIDE, line
        genes[count], cells[count] = gene - 1, cell - 1
        values[count], is_read = _number(data, start, stop)
        if not is_read:
            hard[num_hard] = (count, start, stop)
            num_hard += 1
        count += 1


@compiled
def _is_blank(byte: int) -> bool:
    return byte == SPACE or byte == TAB or byte == CARRIAGE_RETURN


@compiled
def _index(data: npt.NDArray[np.uint8], i: int) -> tuple[Any, int]:
    """A whole number and the blanks after it: the number, -1 if there is none, and where the next field begins."""
    number, start, size = np.int64(0), i, data.shape[0]
    while i < size and ZERO <= data[i] <= NINE and i - start < MOST_DIGITS:
        number = number * 10 + (np.int64(data[i]) - ZERO)
        i += 1
    if i == start or i == size or not (data[i] == SPACE or data[i] == TAB):
        return np.int64(-1), i
    while i < size and (data[i] == SPACE or data[i] == TAB):
        i += 1
    return number, i


@compiled
def _number(data: npt.NDArray[np.uint8], i: int, stop: int) -> tuple[float, bool]:
    """The number of a decimal text, and whether it was found here: it has few digits and a small exponent."""
    is_negative = data[i] == MINUS
    if data[i] == MINUS or data[i] == PLUS:
        i += 1
    mantissa, exponent = np.int64(0), np.int64(0)
    num_digits, num_zeros, is_fraction, has_digits = 0, 0, False, False
    while i < stop:
        if data[i] == POINT and not is_fraction:
            is_fraction = True
        elif ZERO <= data[i] <= NINE:
            has_digits = True
            exponent -= np.int64(is_fraction)
            num_zeros += 1
            if data[i] != ZERO:
                num_digits += num_zeros if num_digits else 1
                if num_digits > MOST_DIGITS:
                    return 0.0, False
                mantissa = mantissa * np.int64(POWERS[num_zeros if mantissa else 1]) + (np.int64(data[i]) - ZERO)
                num_zeros = 0
        else:
            break
        i += 1
    if not has_digits:
        return 0.0, False
    if i < stop:
        written, is_read = _exponent(data, i, stop)
        if not is_read:
            return 0.0, False
        exponent += written
    exponent += num_zeros
    if mantissa == 0:
        return (-0.0 if is_negative else 0.0), True
    if exponent < -22 or exponent > 22:
        return 0.0, False
    value = mantissa / POWERS[-exponent] if exponent < 0 else mantissa * POWERS[exponent]
    return (-value if is_negative else value), True


@compiled
def _exponent(data: npt.NDArray[np.uint8], i: int, stop: int) -> tuple[Any, bool]:
    """The exponent ``e-05`` of a decimal text, and whether it is one of few digits."""
    is_one = data[i] == EXPONENTS[0] or data[i] == EXPONENTS[1]
    i += 1
    is_negative = i < stop and data[i] == MINUS
    if i < stop and (data[i] == MINUS or data[i] == PLUS):
        i += 1
    number, start = np.int64(0), i
    while i < stop and ZERO <= data[i] <= NINE and i - start < 4:
        number = number * 10 + (np.int64(data[i]) - ZERO)
        i += 1
    return (-number if is_negative else number), bool(is_one and i == stop and i > start)


def _fill_hard(
    text: bytes, values: npt.NDArray[np.float64], hard: npt.NDArray[np.int32], name: str, lines_before: int
) -> None:
    """Read the values that `_number` left, with many digits or none."""
    words = [text[start:stop] for _, start, stop in hard.tolist()]
    try:
        found = pa.array(words, type=pa.binary()).cast(pa.string()).cast(pa.float64())
    except pa.ArrowInvalid:
        place = next(start for word, (_, start, _) in zip(words, hard.tolist(), strict=True) if not _is_number(word))
        line = text.rfind(b"\n", 0, place) + 1
        raise _bad_line(text, _Result(0, 0, NO_NUMBERS, line), (0, 0), name, lines_before) from None
    values[hard[:, 0]] = found.to_numpy()


def _is_number(word: bytes) -> bool:
    try:
        pa.scalar(word, type=pa.binary()).cast(pa.string()).cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return True


def _bad_line(text: bytes, result: _Result, shape: tuple[int, int], name: str, lines_before: int) -> InputError:
    number = lines_before + 1 + text.count(b"\n", 0, result.place)
    end = text.find(b"\n", result.place)
    shown = text[result.place : end if end >= 0 else len(text)][:60].decode("ascii", "replace").strip()
    if result.problem == OUTSIDE:
        what = f"it has {shape[1]} genes and {shape[0]} cells, counted from 1"
    else:
        what = "wanted a gene, a cell and a number"
    return InputError(f"line {number} of {name} is {shown!r}: {what}; it is damaged, copy or download it again")
