import io

import pytest

from celltron.core import progress
from celltron.core.progress import ProgressLine, describe_seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_file_gets_plain_lines_now_and_then(clock: list[float]) -> None:
    stream = io.StringIO()
    line = ProgressLine("converting", "cells", stream)
    for done in range(0, 3001, 100):
        line(done, 3000)
        clock[0] += 1.0
    assert stream.getvalue().splitlines() == [
        "converting: 1,000 of 3,000 cells, 100 cells/s, 20 s left",
        "converting: 2,000 of 3,000 cells, 100 cells/s, 10 s left",
        "converting: 3,000 of 3,000 cells, 100 cells/s",
    ]


def test_a_terminal_gets_one_line_that_is_rewritten(clock: list[float]) -> None:
    stream = Terminal()
    line = ProgressLine("hashing", "bytes", stream)
    for done in (10, 20):
        clock[0] += 1.0
        line(done, 20)
    text = stream.getvalue()
    assert text.count("\r") == 2 and text.count("\n") == 1 and text.endswith("\n")
    assert "hashing: 10 of 20 bytes, 10 bytes/s, 1 s left" in text


def test_work_that_is_over_at_once_says_nothing(clock: list[float]) -> None:
    stream = io.StringIO()
    ProgressLine("converting", "cells", stream)(5, 5)
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.2, "1 s"),
        (59.5, "1 min 00 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (90_000, "25 h 00 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert describe_seconds(seconds) == text
