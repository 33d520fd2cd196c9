"""Blocks of tar shards held in memory: fetched once by however many threads want them, dropped to make room.

B blocks.
"""

import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from celltron.cells.memory import address_of
from celltron.cells.tar_files import Bytes
from celltron.core import InputError


class BlockCache:
    """The last used blocks, at most ``limit`` bytes of them; those used longest ago go first.

    What is known of a block lies in arrays over all B, so that holding many blocks that are there costs no Python for
    each of them. ``num_bytes`` are the bytes of the blocks held.

    Args:
        fetch: brings a block and checks it.
        lengths: int64 [B], of the blocks in bytes.
        limit: bytes.
        fetchers: how many blocks are fetched at a time.
    """

    def __init__(
        self, fetch: Callable[[int], Bytes], lengths: npt.NDArray[np.int64], limit: int, fetchers: int
    ) -> None:
        self._fetch = fetch
        self._lengths = lengths
        self._limit = limit
        self._fetchers = fetchers
        self._closed = False
        self._begin()
        _all.add(self)

    def _begin(self) -> None:
        """Hold nothing, with no threads."""
        num_blocks = len(self._lengths)
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._buffers = np.full(num_blocks, None, dtype=object)
        self._addresses = np.zeros(num_blocks, dtype=np.uint64)
        self._used = np.zeros(num_blocks, dtype=np.int64)
        self._clock = 0
        self._in_flight: dict[int, Future[Bytes]] = {}
        self._in_flight_bytes = 0
        self.num_bytes = 0

    def hold(self, blocks: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.object_]]:
        """Where blocks (each once) begin in memory, and the buffers that must live as long as that is used."""
        with self._lock:
            self._clock += 1
            self._used[blocks] = self._clock
            buffers, addresses = self._buffers[blocks], self._addresses[blocks]
            coming = [(i, self._request(int(blocks[i]))) for i in np.flatnonzero(addresses == 0).tolist()]
        for i, future in coming:
            try:
                buffers[i] = future.result()
            except CancelledError as error:
                raise InputError("the tar shards were closed while a block was fetched: open them again") from error
            addresses[i] = address_of(buffers[i])
        return addresses, buffers

    def prefetch(self, blocks: npt.NDArray[np.int64]) -> None:
        """Begin to fetch blocks that are not there, in this order, as far as half of the room goes; does not wait."""
        with self._lock:
            self._clock += 1
            for block in blocks[self._addresses[blocks] == 0].tolist():
                if self._in_flight_bytes + self._lengths[block] > self._limit // 2:
                    break
                self._used[block] = self._clock
                self._request(block)

    def _request(self, block: int) -> Future[Bytes]:
        """The fetch of a block, begun unless it is under way; the lock is held."""
        future = self._in_flight.get(block)
        if future is None:
            if self._closed:
                raise InputError("the tar shards are closed: open them again")
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._fetchers, thread_name_prefix="celltron-fetch")
            future = self._in_flight[block] = self._pool.submit(self._bring, block)
            self._in_flight_bytes += int(self._lengths[block])
        return future

    def _bring(self, block: int) -> Bytes:
        data = None
        try:
            data = self._fetch(block)
            return data
        finally:
            with self._lock:
                del self._in_flight[block]
                self._in_flight_bytes -= int(self._lengths[block])
                if data is not None and not self._closed:
                    self._keep(block, data)

    def _keep(self, block: int, data: Bytes) -> None:
        """Hold a block and drop those used longest ago until all fit; the lock is held."""
        self._drop(self._limit - len(data))
        if self.num_bytes + len(data) <= self._limit:
            self._buffers[block], self._addresses[block] = data, address_of(data)
            self.num_bytes += len(data)

    def _drop(self, limit: int) -> None:
        if self.num_bytes <= limit:
            return
        held = np.flatnonzero(self._addresses)
        held = held[np.argsort(self._used[held], kind="stable")]
        freed = np.cumsum(self._lengths[held])
        gone = held[: np.searchsorted(freed, self.num_bytes - limit) + 1]
        self._buffers[gone] = None
        self._addresses[gone] = 0
        self.num_bytes -= int(self._lengths[gone].sum())

    def close(self) -> None:
        """Stop the threads and drop all blocks; those handed out live on."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._begin()


_all: weakref.WeakSet[BlockCache] = weakref.WeakSet()


def _begin_all() -> None:
    for cache in _all:
        cache._begin()


# A forked process has none of the threads, and a lock that one of them held would stay taken.
os.register_at_fork(after_in_child=_begin_all)
