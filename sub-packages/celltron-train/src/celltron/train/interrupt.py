"""Turning SIGTERM and SIGINT into an orderly end after the current step, within a deadline."""

import os
import selectors
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, NoReturn

from celltron.core import InputError, tell

STOPPING_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_REQUEST_SECONDS = 2.0
"""A signal this soon after the first is the same request: a launcher passes on what its processes were sent as well."""
_HAS_LEFT = 0
"""No signal's number."""


class StopRequest:
    """What the signals so far ask for; all times are in seconds of one clock.

    The first one asks for an end within `deadline_seconds`. Another SIGTERM asks for nothing new, since schedulers
    repeat theirs; another SIGINT, unless it comes right after the first signal, is a person who will not wait.
    """

    def __init__(self, deadline_seconds: float) -> None:
        self.deadline_seconds = deadline_seconds
        self.signal_number: int | None = None
        self._received_at = 0.0

    def receive(self, number: int, now: float) -> bool:
        """Take note of a signal; returns whether the process is to end at once."""
        if self.signal_number is None:
            self.signal_number, self._received_at = number, now
            return False
        return number == signal.SIGINT and now - self._received_at > SAME_REQUEST_SECONDS

    def seconds_left(self, now: float) -> float | None:
        """Until the deadline; None where nothing was asked."""
        return None if self.signal_number is None else max(0.0, self._received_at + self.deadline_seconds - now)


class Interruption:
    """Remembers the first SIGTERM or SIGINT while it is entered; a second Ctrl-C ends the process at once.

    `signal_number` is None until then.

    Args:
        deadline_seconds: Time from the first signal to the end of the process, wherever it is by then: it may be
            waiting for a process that is gone.
    """

    def __init__(self, deadline_seconds: float) -> None:
        self.signal_number: int | None = None
        self.deadline_seconds = deadline_seconds
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        # Python runs no handler while the main thread waits in a library, so a thread is told of the signals, too.
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous_writer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), name="deadline", daemon=True).start()
        for number in STOPPING_SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_writer)
        os.write(self._writer, bytes([_HAS_LEFT]))
        os.close(self._writer)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is None:
            self.signal_number = number

    def _watch(self, reader: int) -> None:
        request = StopRequest(self.deadline_seconds)
        with selectors.DefaultSelector() as selector:
            selector.register(reader, selectors.EVENT_READ)
            while True:
                if not selector.select(request.seconds_left(time.monotonic())):
                    assert request.signal_number is not None
                    name = signal.Signals(request.signal_number).name
                    _end(
                        request.signal_number,
                        f"not stopped {self.deadline_seconds:g} s after {name} (loop.stop_seconds): the step or its "
                        "checkpoint takes longer, or another process of this run is gone; ended",
                    )
                (number,) = os.read(reader, 1)
                if number == _HAS_LEFT:
                    break
                if number in STOPPING_SIGNALS and request.receive(number, time.monotonic()):
                    _end(number, "interrupted once more, so ended at once")
        os.close(reader)


def _end(number: int, reason: str) -> NoReturn:
    error = InputError(f"{reason} without saving, --resume auto continues from the newest checkpoint")
    tell(f"celltron: error: {error}")
    os._exit(128 + number)
