"""Progress that several threads report together."""

import threading
from collections.abc import Callable

Progress = Callable[[int, int], None]


class SharedProgress:
    """Adds up what threads have done and passes it on, one thread at a time.

    Args:
        progress: called with (done, total); None for nobody.
        total: all there is to do.
    """

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0
        self._lock = threading.Lock()

    def __call__(self, amount: int) -> None:
        """So much more is done."""
        if self._progress is not None:
            with self._lock:
                self._done += amount
                self._progress(self._done, self._total)
