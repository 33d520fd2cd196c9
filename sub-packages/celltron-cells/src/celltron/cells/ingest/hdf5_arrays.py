"""The big arrays of an HDF5 file, read around HDF5: its library lets one thread in at a time, the file itself does not.

What lies flat, and what is chunked and unpacked with gzip and shuffle, is read from the file's bytes, where HDF5 says
that they are. Everything else goes through h5py.
"""

import threading
import zlib
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from celltron.cells.compiled import compiled
from celltron.cells.ingest.damage import damaged, reading
from celltron.cells.ingest.row_arrays import (
    ByteRanges,
    Bytes,
    ChunkedArray,
    FlatArray,
    RowArray,
    as_numbers,
    plain_dtype,
)
from celltron.core import InputError

FIRST_CHUNKS = 64
"""Chunks that are looked up to read the beginning of an array, so many times more if that does not do, then all."""
LARGEST_CHUNK_BYTES = 2**32  # HDF5's own limit
DEFLATE, SHUFFLE = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE


def open_array(dataset: h5py.Dataset, file: ByteRanges) -> RowArray:
    """The fastest true way to read a dataset [R] or [R, K] of numbers; ``file`` holds the same file's bytes."""
    if dataset.external:
        raise InputError(
            f"{dataset.name} of {file.name} keeps its values in other files, which celltron does not follow: write it "
            "again with anndata"
        )
    if not _is_plain(dataset):
        return LockedArray(dataset, file.name)
    shape, dtype = tuple(int(n) for n in dataset.shape), dataset.dtype
    if dataset.chunks is None:
        offset = dataset.id.get_offset()
        return LockedArray(dataset, file.name) if offset is None else FlatArray(file, offset, dtype, shape)
    filters = _filters(dataset)
    if filters is None:
        return LockedArray(dataset, file.name)
    chunks = _Chunks(dataset, file, filters)
    if len(shape) == 1 and not filters:
        return ScatteredArray(shape, dtype, chunks)
    return ChunkedArray(shape, dtype, dataset.chunks, chunks.load)


def _is_plain(dataset: h5py.Dataset) -> bool:
    """Whether the bytes in the file are those of the array that h5py would hand out."""
    dtype = dataset.dtype
    return (
        dtype.kind in "iufb"
        and dataset.ndim in (1, 2)
        and dataset.size > 0
        and not dataset.is_virtual
        and dataset.file.userblock_size == 0
        and dataset.id.get_create_plist().get_layout() in (h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED)
        and hasattr(dataset.id, "chunk_iter")
        and bool(dataset.id.get_type().equal(h5py.h5t.py_create(dtype, logical=True)))
    )


def _filters(dataset: h5py.Dataset) -> tuple[int, ...] | None:
    """The filters in the order in which they were applied; None if there is one that only h5py undoes."""
    plist = dataset.id.get_create_plist()
    filters = []
    for i in range(plist.get_nfilters()):
        code, _, settings, _ = plist.get_filter(i)
        if code not in (DEFLATE, SHUFFLE) or (code == SHUFFLE and settings[:1] != (dataset.dtype.itemsize,)):
            return None
        filters.append(int(code))
    return tuple(filters)


class LockedArray:
    """A dataset read through h5py, one thread at a time."""

    def __init__(self, dataset: h5py.Dataset, name: str) -> None:
        self.shape: tuple[int, ...] = dataset.shape
        self.dtype = plain_dtype(dataset.dtype)
        self._dataset, self._name = dataset, name

    def __getitem__(self, part: Any, /) -> npt.NDArray[Any]:
        """A run of rows (a slice), or of rows and columns (two slices)."""
        with reading(self._name):
            array: npt.NDArray[Any] = self._dataset[part]
        return array.astype(self.dtype, copy=False)


class ScatteredArray(ChunkedArray):
    """An array [R] in chunks that are not packed: what is wanted of them is read, neighbours in the file at once."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], chunks: "_Chunks") -> None:
        super().__init__(shape, dtype, chunks.shape, chunks.load)
        self._stored, self._places = dtype, chunks

    def __getitem__(self, part: Any, /) -> npt.NDArray[Any]:
        """A run of rows (a slice)."""
        rows = part[0] if isinstance(part, tuple) else part
        start, stop, _ = rows.indices(self.shape[0])
        if stop <= start:
            return np.empty(0, dtype=self.dtype)
        length, size = self.chunks[0], self._stored.itemsize
        first, last = start // length, -(-stop // length)
        begins = self._places.offsets(np.arange(first, last))
        if begins is None:  # some were never written
            return super().__getitem__(rows)
        edges = np.clip(np.arange(first, last + 1) * length, start, stop)
        begins[0] += (start - first * length) * size
        lengths = np.diff(edges) * size
        runs = np.flatnonzero(np.append(True, begins[1:] != begins[:-1] + lengths[:-1]))
        ranges = [(int(begins[i]), int(n)) for i, n in zip(runs, np.add.reduceat(lengths, runs), strict=True)]
        read = self._places.file.read_many(ranges)
        return as_numbers(read[0] if len(read) == 1 else np.concatenate(read), self._stored)


class _Table(NamedTuple):
    """Where chunks lie: rising chunk numbers, and of each the first byte, the bytes, and the filters left out."""

    numbers: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    masks: npt.NDArray[np.int64]


class _Chunks:
    """The chunks of one dataset, read from the file and unpacked outside of any lock."""

    def __init__(self, dataset: h5py.Dataset, file: ByteRanges, filters: tuple[int, ...]) -> None:
        self._dataset, self.file, self._filters = dataset, file, filters
        self.shape: tuple[int, ...] = dataset.chunks
        self._num_bytes = int(np.prod(self.shape, dtype=np.float64)) * dataset.dtype.itemsize
        if self._num_bytes > LARGEST_CHUNK_BYTES:
            raise damaged(file.name, f"{dataset.name} has chunks of {self._num_bytes} bytes")
        self._dtype = dataset.dtype
        self._lock = threading.Lock()
        self._table = _Table(*(np.zeros(0, dtype=np.int64) for _ in range(4)))
        self._is_whole = False

    def load(self, numbers: list[int]) -> list[npt.NDArray[Any]]:
        """Read and unpack chunks; one that was never written holds the fill value."""
        table, places, found = self._find(np.array(numbers))
        there = places[found]
        packed = iter(self.file.read_many([(int(table.offsets[i]), int(table.sizes[i])) for i in there]))
        masks = iter(table.masks[there])
        return [
            self._unpack(next(packed), int(next(masks))) if is_found else self._never_written() for is_found in found
        ]

    def offsets(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
        """The first byte of each of some chunks that are not packed; None if one of them was never written."""
        table, places, found = self._find(numbers)
        if not found.all():
            return None
        if np.any(table.sizes[places] != self._num_bytes):
            raise damaged(self.file.name, f"a chunk of {self._dataset.name} does not hold {self._num_bytes} bytes")
        return table.offsets[places]

    def _find(self, numbers: npt.NDArray[np.int64]) -> tuple[_Table, npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """A table, the places of chunks in it, and which of them it has: the others were never written."""
        with self._lock:
            limits = iter((max(FIRST_CHUNKS, FIRST_CHUNKS * len(self._table.numbers)), None))
            while True:
                known = self._table.numbers
                places = np.searchsorted(known, numbers)
                found = places < len(known)
                found[found] = known[places[found]] == numbers[found]
                if self._is_whole or found.all():
                    return self._table, places, found
                self._table = self._read_table(next(limits))

    def _read_table(self, limit: int | None) -> _Table:
        across = -(-self._dataset.shape[1] // self.shape[1]) if len(self.shape) == 2 else 1
        rows: list[tuple[int, int, int, int]] = []

        def add(chunk: h5py.h5d.StoreInfo) -> bool | None:
            place = [first // size for first, size in zip(chunk.chunk_offset, self.shape, strict=True)]
            number = place[0] * across + (place[1] if len(place) == 2 else 0)
            rows.append((number, chunk.byte_offset, chunk.size, chunk.filter_mask))
            return True if len(rows) == limit else None

        with reading(self.file.name):
            self._dataset.id.chunk_iter(add)
            table = np.array(rows, dtype=np.int64).reshape(-1, 4)
        self._is_whole = limit is None or len(rows) < limit
        table = table[np.argsort(table[:, 0], kind="stable")]
        return _Table(*(np.ascontiguousarray(table[:, k]) for k in range(4)))

    def _unpack(self, data: Bytes, mask: int) -> npt.NDArray[Any]:
        for i in reversed(range(len(self._filters))):
            if mask >> i & 1:
                continue
            data = self._inflate(data) if self._filters[i] == DEFLATE else self._unshuffle(data)
        if len(data) != self._num_bytes:
            raise damaged(self.file.name, f"a chunk of {self._dataset.name} does not hold {self._num_bytes} bytes")
        return as_numbers(data, self._dtype).reshape(self.shape)

    def _inflate(self, data: Bytes) -> Bytes:
        """Unpack a zlib stream; never more is made than the chunk should hold."""
        unpacker = zlib.decompressobj()
        try:
            unpacked = unpacker.decompress(data.data, self._num_bytes + 1)
        except zlib.error as error:
            raise damaged(self.file.name, f"a compressed chunk of {self._dataset.name}: {error}") from error
        if not unpacker.eof:
            raise damaged(self.file.name, f"a compressed chunk of {self._dataset.name} does not end")
        return np.frombuffer(unpacked, dtype=np.uint8)

    def _unshuffle(self, data: Bytes) -> Bytes:
        size = self._dtype.itemsize
        return data if size == 1 else _interleave(data, size)

    def _never_written(self) -> npt.NDArray[Any]:
        return np.full(self.shape, self._dataset.fillvalue, dtype=plain_dtype(self._dtype))


@compiled
def _interleave(data: Bytes, size: int) -> Bytes:
    """Undo HDF5's shuffle: the first bytes of all values, then the second ones, …; a rest stays where it is."""
    num_values = data.shape[0] // size
    out = np.empty(data.shape[0], dtype=np.uint8)
    for k in range(size):
        plane = data[k * num_values : (k + 1) * num_values]
        for i in range(num_values):
            out[i * size + k] = plane[i]
    out[num_values * size :] = data[num_values * size :]
    return out
