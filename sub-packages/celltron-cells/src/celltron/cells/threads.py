"""Work on several threads whose results come in order, with little of it ahead of its use."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from celltron.core import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]
"""Called with how much is done, and of how much."""


def num_workers(wanted: int | None) -> int:
    """How many threads to use; None takes as many as the process may use processors."""
    if wanted is not None and wanted < 1:
        raise InputError(f"workers is {wanted}: wanted 1 or more, or none for one a processor")
    return wanted or len(os.sched_getaffinity(0))


def map_in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """``function(item)`` of each item, in order; at most twice as many as there are workers are made ahead."""
    if workers == 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers)
    ahead: deque[Future[Result]] = deque()
    try:
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) >= 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class SharedProgress:
    """Adds up what threads have done and passes it on, one thread at a time.

    Args:
        progress: told of it; None for nobody.
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
