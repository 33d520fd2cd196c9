"""Arrays in files, read in runs of rows from several threads at once, whatever the file around them.

R rows of an array, K columns.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from celltron.cells.ingest.damage import damaged

CACHE_BYTES = 2**25
"""Unpacked chunks kept of one array, so that a chunk that several blocks of rows share is unpacked once."""
CACHE_CHUNKS = 4
"""Chunks kept even if they are larger than that."""

Bytes = npt.NDArray[np.uint8]


class RowArray(Protocol):
    """An array [R] or [R, K] of numbers, sliced by rows, or by rows and columns."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __getitem__(self, part: Any, /) -> npt.NDArray[Any]:
        """A run of rows (a slice), or of rows and columns (two slices)."""


class ByteRanges(Protocol):
    """A file, here or behind an address, read at any place."""

    name: str
    size: int

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[Bytes]:
        """The bytes of each (offset, length), in memory that may be written to."""

    def close(self) -> None:
        """Let go of the file."""


def check_ranges(name: str, size: int, ranges: Sequence[tuple[int, int]]) -> None:
    """Refuse ranges that do not lie in a file of ``size`` bytes."""
    for offset, length in ranges:
        if offset < 0 or length < 0 or offset + length > size:
            raise damaged(name, f"it names bytes {offset} to {offset + length} of {size}")


class LocalFile:
    """A file on this machine."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._file = path.open("rb", buffering=0)
        self.size = os.fstat(self._file.fileno()).st_size

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[Bytes]:
        """The bytes of each (offset, length)."""
        check_ranges(self.name, self.size, ranges)
        return [self._read(offset, length) for offset, length in ranges]

    def _read(self, offset: int, length: int) -> Bytes:
        data = np.empty(length, dtype=np.uint8)
        done = 0
        while done < length:
            count = os.preadv(self._file.fileno(), [data.data[done:]], offset + done)
            if count == 0:
                raise damaged(self.name, f"it ends at byte {offset + done}")
            done += count
        return data

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def plain_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type values are handed out in: the machine's byte order, truth values as such."""
    return dtype.newbyteorder("=")


class FlatArray:
    """An array that lies in a file as it is, row after row, from byte ``offset`` on."""

    def __init__(self, file: ByteRanges, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.dtype = plain_dtype(dtype)
        self._file, self._offset, self._stored = file, offset, dtype
        self._row_bytes = dtype.itemsize * (shape[1] if len(shape) == 2 else 1)
        check_ranges(file.name, file.size, [(offset, shape[0] * self._row_bytes)])

    def __getitem__(self, part: Any, /) -> npt.NDArray[Any]:
        """A run of rows (a slice), or of rows and columns (two slices)."""
        rows, columns = part if isinstance(part, tuple) else (part, None)
        start, stop, _ = rows.indices(self.shape[0])
        length = max(0, stop - start) * self._row_bytes
        data = self._file.read_many([(self._offset + start * self._row_bytes, length)])[0]
        array = as_numbers(data, self._stored).reshape(-1, *self.shape[1:])
        return array if columns is None else array[:, columns]


def as_numbers(data: Bytes, stored: np.dtype[Any]) -> npt.NDArray[Any]:
    """Bytes of a file as numbers in the machine's byte order; any byte but 0 is a truth value that is true."""
    if stored.kind == "b":
        return np.not_equal(data, 0)
    array: npt.NDArray[Any] = data.view(stored).astype(plain_dtype(stored), copy=False)
    return array


class ChunkCache:
    """The chunks of one array that were used last; a chunk that several threads ask for at once is loaded once."""

    def __init__(self, chunk_bytes: int) -> None:
        self._room = max(CACHE_CHUNKS, CACHE_BYTES // max(1, chunk_bytes))
        self._lock = threading.Lock()
        self._chunks: OrderedDict[int, Future[npt.NDArray[Any]]] = OrderedDict()

    def take(
        self, numbers: Sequence[int], load: Callable[[list[int]], list[npt.NDArray[Any]]], shared: Collection[int]
    ) -> list[npt.NDArray[Any]]:
        """The chunks with these numbers, all of which that must be loaded by one call of ``load``.

        Only those that are ``shared`` with other blocks are kept.
        """
        mine: dict[int, Future[npt.NDArray[Any]]] = {}
        theirs: dict[int, Future[npt.NDArray[Any]]] = {}
        with self._lock:
            for number in shared:
                if number in self._chunks:
                    theirs[number] = self._chunks[number]
                else:
                    self._chunks[number] = mine[number] = Future()
                self._chunks.move_to_end(number)
            while len(self._chunks) > self._room:
                self._chunks.popitem(last=False)
        missing = [number for number in numbers if number not in theirs]
        try:
            loaded = dict(zip(missing, load(missing) if missing else (), strict=True))
        except BaseException as error:
            with self._lock:
                for number, future in mine.items():
                    if self._chunks.get(number) is future:
                        del self._chunks[number]
            for future in mine.values():
                future.set_exception(error)
            raise
        for number, future in mine.items():
            future.set_result(loaded[number])
        return [theirs[number].result() if number in theirs else loaded[number] for number in numbers]


class ChunkedArray:
    """An array stored in chunks of ``chunks`` rows (and columns), numbered row after row.

    ``load`` takes chunk numbers and returns each as an array of the full chunk's shape.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        chunks: tuple[int, ...],
        load: Callable[[list[int]], list[npt.NDArray[Any]]],
    ) -> None:
        self.shape = shape
        self.dtype = plain_dtype(dtype)
        self.chunks = chunks
        self._load = load
        self._cache = ChunkCache(int(np.prod(chunks)) * dtype.itemsize)

    def __getitem__(self, part: Any, /) -> npt.NDArray[Any]:
        """A run of rows (a slice), or of rows and columns (two slices)."""
        slices = part if isinstance(part, tuple) else (part,)
        spans = [slices[i].indices(n)[:2] if i < len(slices) else (0, n) for i, n in enumerate(self.shape)]
        spans = [(start, max(start, stop)) for start, stop in spans]
        out = np.empty([stop - start for start, stop in spans], dtype=self.dtype)
        if out.size == 0:
            return out
        touched = [range(a // n, -(-b // n)) for (a, b), n in zip(spans, self.chunks, strict=True)]
        across = 1 if len(spans) == 1 else -(-self.shape[1] // self.chunks[1])
        numbers = [place[0] * across + sum(place[1:]) for place in product(*touched)]
        shared = [number for number in numbers if self._is_cut(number // across, spans[0])]
        for place, chunk in zip(product(*touched), self._cache.take(numbers, self._load, shared), strict=True):
            source, target = [], []
            for i, n, (start, stop) in zip(place, self.chunks, spans, strict=True):
                first, last = max(i * n, start), min((i + 1) * n, stop)
                source.append(slice(first - i * n, last - i * n))
                target.append(slice(first - start, last - start))
            out[tuple(target)] = chunk[tuple(source)]
        return out

    def _is_cut(self, row: int, span: tuple[int, int]) -> bool:
        """Whether the chunks in a row of them hold rows outside ``span`` too."""
        tall = self.chunks[0]
        return row * tall < span[0] or min((row + 1) * tall, self.shape[0]) > span[1]
