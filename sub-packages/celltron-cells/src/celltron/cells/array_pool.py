"""Memory of large arrays, used again once nothing lies in it: the system clears new memory page by page.

Without it a loader that reads ranked tokens spends a third of its time on that.
"""

import weakref
from collections import deque

import numpy as np
import numpy.typing as npt

SMALLEST = 2**15
"""Smaller arrays are not worth keeping: the allocator does so itself."""


class ArrayPool:
    """Makes arrays whose memory comes back when the last view of them is gone; any thread may ask.

    Args:
        most_idle: pieces of memory kept for arrays to come; further ones are let go.
    """

    def __init__(self, most_idle: int) -> None:
        self._idle: deque[npt.NDArray[np.int32]] = deque(maxlen=most_idle)

    def empty(self, size: int) -> npt.NDArray[np.int32]:
        """An int32 array [size] of whatever was in its memory."""
        if size < SMALLEST:
            return np.empty(size, dtype=np.int32)
        memory = self._take(size)
        # Views of an array refer to the one that owns the memory, unless a memoryview stands between them.
        array: npt.NDArray[np.int32] = np.frombuffer(memory.data, dtype=np.int32)
        weakref.finalize(array, self._idle.append, memory).atexit = False
        return array[:size]

    def _take(self, size: int) -> npt.NDArray[np.int32]:
        while self._idle:
            try:
                memory = self._idle.pop()
            except IndexError:  # another thread was faster
                break
            if len(memory) >= size:
                return memory
        return np.empty(size + size // 8, dtype=np.int32)
