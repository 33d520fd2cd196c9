"""Blocks in memory: fetched once, within bounds, by many threads."""

import os
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from celltron.cells.memory import address_of
from celltron.cells.tar_cache import BlockCache
from celltron.core import InputError

BYTES = 1000


class Fetcher:
    """Makes blocks whose bytes are their number, and writes down which were asked for."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.asked: list[int] = []
        self.failing: set[int] = set()

    def __call__(self, block: int) -> np.ndarray:
        self.asked.append(block)
        time.sleep(self.seconds)
        if block in self.failing:
            raise InputError(f"no block {block}")
        return np.full(BYTES, block, dtype=np.uint8)


def cache_of(fetcher: Fetcher, *, limit: int, num_blocks: int = 100) -> BlockCache:
    return BlockCache(fetcher, np.full(num_blocks, BYTES, dtype=np.int64), limit, 4)


def test_the_last_used_blocks_are_held() -> None:
    fetcher = Fetcher()
    cache = cache_of(fetcher, limit=3 * BYTES)
    for block in (0, 1, 2, 0, 3, 0, 1):  # 3 takes the place of 1, then 1 that of 2
        addresses, buffers = cache.hold(np.array([block]))
        assert address_of(buffers[0]) == addresses[0] and (buffers[0] == block).all()
    assert fetcher.asked == [0, 1, 2, 3, 1]
    cache.hold(np.array([0, 1, 3]))
    assert len(fetcher.asked) == 5 and cache.num_bytes == 3 * BYTES


def test_memory_is_bounded_while_threads_read() -> None:
    fetcher = Fetcher()
    cache = cache_of(fetcher, limit=10 * BYTES)
    most: list[int] = []

    def read(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(300):
            blocks = np.unique(random.integers(0, 100, 4))
            addresses, buffers = cache.hold(blocks)
            assert [int(buffer[0]) for buffer in buffers] == blocks.tolist()
            assert [address_of(buffer) for buffer in buffers] == addresses.tolist()
            most.append(cache.num_bytes)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(read, range(6)))
    assert max(most) == 10 * BYTES
    assert sum(buffer is not None for buffer in cache._buffers) == 10


def test_what_does_not_fit_is_handed_out_and_dropped() -> None:
    fetcher = Fetcher()
    for limit in (0, BYTES - 1, 2 * BYTES):
        cache = cache_of(fetcher, limit=limit)
        _, buffers = cache.hold(np.arange(50))
        assert [int(buffer[0]) for buffer in buffers] == list(range(50))
        assert cache.num_bytes == limit // BYTES * BYTES
        held = weakref.ref(buffers[7])
        del buffers
        assert held() is None


def test_a_block_wanted_by_many_is_fetched_once() -> None:
    fetcher = Fetcher(seconds=0.05)
    cache = cache_of(fetcher, limit=100 * BYTES)
    begin = threading.Barrier(8)

    def read(_: int) -> None:
        begin.wait()
        cache.hold(np.arange(5))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))
    assert sorted(fetcher.asked) == list(range(5))


def test_prefetch_does_not_wait_and_stops_at_half_of_the_room() -> None:
    fetcher = Fetcher(seconds=0.05)
    cache = cache_of(fetcher, limit=20 * BYTES)
    began = time.monotonic()
    cache.prefetch(np.arange(30))
    assert time.monotonic() - began < 0.05
    cache.hold(np.arange(10))
    assert sorted(fetcher.asked) == list(range(10))


def test_a_failure_is_told_and_not_kept() -> None:
    fetcher = Fetcher()
    fetcher.failing = {3}
    cache = cache_of(fetcher, limit=10 * BYTES)
    cache.prefetch(np.array([3]))
    for _ in range(2):
        with pytest.raises(InputError, match="no block 3"):
            cache.hold(np.array([2, 3, 4]))
    fetcher.failing.clear()
    assert [int(buffer[0]) for buffer in cache.hold(np.array([2, 3, 4]))[1]] == [2, 3, 4]


def test_closing() -> None:
    fetcher = Fetcher(seconds=0.02)
    cache = cache_of(fetcher, limit=100 * BYTES)
    _, buffers = cache.hold(np.array([5]))
    cache.prefetch(np.arange(50))
    cache.close()
    assert len(fetcher.asked) < 50 and cache.num_bytes == 0
    assert (buffers[0] == 5).all()
    with pytest.raises(InputError, match="are closed"):
        cache.hold(np.array([1]))
    cache.close()


def test_a_forked_process_has_threads_of_its_own() -> None:
    cache = cache_of(Fetcher(), limit=10 * BYTES)
    cache.hold(np.array([1]))
    cache._lock.acquire()  # as another thread may have, at the moment of the fork
    pid = os.fork()
    if pid == 0:
        _, buffers = cache.hold(np.array([1, 2]))
        os._exit(int([int(buffer[0]) for buffer in buffers] != [1, 2]))
    cache._lock.release()
    assert os.waitpid(pid, 0)[1] == 0
