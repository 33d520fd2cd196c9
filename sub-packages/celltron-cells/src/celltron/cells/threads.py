"""Work on several threads whose results come in order, with little of it ahead of its use."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from celltron.core import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")


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
