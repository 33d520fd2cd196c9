"""Progress of long work: a line that is rewritten on a terminal, a plain line now and then elsewhere."""

import math
import sys
import time
from typing import TextIO


class ProgressLine:
    """Shows how much of some work is done, at what rate, and how long the rest takes.

    Args:
        what: what is being done, such as "converting".
        unit: what is counted, such as "cells".
        stream: where to write; standard error otherwise.
    """

    def __init__(self, what: str, unit: str, stream: TextIO | None = None) -> None:
        self.what = what
        self.unit = unit
        self.stream = sys.stderr if stream is None else stream
        self.is_terminal = self.stream.isatty()
        self.interval_seconds = 0.2 if self.is_terminal else 10.0
        self.start = self.last = time.monotonic()
        self.is_open = False

    def __call__(self, done: int, total: int) -> None:
        """Say that `done` of `total` are done; most calls write nothing."""
        now = time.monotonic()
        if now - self.last < self.interval_seconds and not (done >= total and self.is_open):
            return
        self.last = now
        rate = done / max(now - self.start, 1e-9)
        text = f"{self.what}: {done:,} of {total:,} {self.unit}, {rate:,.0f} {self.unit}/s"
        if 0 < done < total:
            text += f", {describe_seconds((total - done) / rate)} left"
        if self.is_terminal:
            self.stream.write(f"\r{text:<79}" + ("\n" if done >= total else ""))
        else:
            self.stream.write(text + "\n")
        self.stream.flush()
        self.is_open = done < total


def describe_seconds(seconds: float) -> str:
    """A duration for people.

    >>> describe_seconds(44.2), describe_seconds(200), describe_seconds(7500)
    ('45 s', '3 min 20 s', '2 h 05 min')
    """
    seconds = math.ceil(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"
