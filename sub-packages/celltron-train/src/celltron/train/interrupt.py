"""Turning SIGTERM and SIGINT into an orderly end after the current step, within a deadline."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from celltron.core import InputError

STOPPING_SIGNALS = (signal.SIGTERM, signal.SIGINT)
DEADLINE_SECONDS = 100.0
"""Less than the 120 s that the launchers under scripts/ leave a run before they kill it."""


class Interruption:
    """Remembers the first SIGTERM or SIGINT while it is entered; a second one ends the process at once.

    `signal_number` is None until then.

    Args:
        deadline_seconds: Time from the first signal to the end of the process, wherever it is by then: it may be
            waiting for a process that is gone.
    """

    def __init__(self, deadline_seconds: float = DEADLINE_SECONDS) -> None:
        self.signal_number: int | None = None
        self.deadline_seconds = deadline_seconds
        self._previous: dict[int, Any] = {}
        self._has_left = threading.Event()

    def __enter__(self) -> "Interruption":
        # Python runs no handler while the main thread waits in a library, so a thread is told of the signal, too.
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous_writer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._hold_to_deadline, args=(reader,), name="deadline", daemon=True).start()
        for number in STOPPING_SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        self._has_left.set()
        signal.set_wakeup_fd(self._previous_writer)
        os.close(self._writer)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _hold_to_deadline(self, reader: int) -> None:
        while number := os.read(reader, 1):
            if number[0] in STOPPING_SIGNALS and not self._has_left.wait(self.deadline_seconds):
                _end(number[0], self.deadline_seconds)
        os.close(reader)


def _end(number: int, seconds: float) -> None:
    error = InputError(
        f"not stopped {seconds:g} s after {signal.Signals(number).name}: the step or its checkpoint takes longer, or "
        "another process of this run is gone; ended without saving, --resume auto continues from the newest checkpoint"
    )
    print(f"celltron: error: {error}", file=sys.stderr, flush=True)
    os._exit(128 + number)
