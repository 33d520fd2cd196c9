"""Files behind addresses (s3, gs, az, http, …) through fsspec: read in ranges, never downloaded whole.

A server must answer range requests; one that does not is refused, since each look into the file would fetch all of it.
"""

import gc
import io
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import fsspec
import numpy as np

from celltron.cells.ingest.row_arrays import Bytes, check_ranges
from celltron.core import InputError

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}
EXTRAS |= {"http": "http", "https": "http"}
CHANGE_KEYS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created")
ATTEMPTS = 4
FIRST_WAIT_SECONDS = 0.25
JOINED_GAP_BYTES = 2**16
JOINED_BYTES = 2**23
"""Ranges with small gaps between them are fetched as one, up to so many bytes."""
BLOCK_BYTES = 2**16
BLOCKS_AHEAD = 32
"""Blocks fetched at once of a file that is read from front to back; one where places are looked up."""
KEPT_BLOCKS = 512


class UnreachableError(InputError):
    """An address does not answer now, or no longer lets us in; nothing need be wrong with what lies there."""


def is_address(spec: str) -> bool:
    """Whether a source is named by an address such as ``s3://bucket/file.h5ad``, not by a path."""
    return "://" in spec


def open_file_system(spec: str, storage: Mapping[str, Any] | None) -> tuple[Any, str]:
    """The fsspec file system of an address, made with the options ``storage``, and the path in it."""
    scheme = spec.split("://")[0]
    if scheme.split("::")[-1] not in fsspec.available_protocols():
        raise InputError(f"{spec} has the unknown scheme {scheme!r}: wanted s3, gs, az, https or another of fsspec's")
    try:
        with network(spec):
            fs, path = fsspec.core.url_to_fs(spec, **(storage or {}))
    except ImportError as error:
        how = f"pip install 'celltron-cells[{EXTRAS[scheme]}]'" if scheme in EXTRAS else _words(error)
        raise InputError(f"{spec} needs a package that is not installed: {how}") from error
    return fs, str(path)


@contextmanager
def network(spec: str) -> Iterator[None]:
    """Turn what goes wrong on the way to an address into one sentence; each protocol's library has its own errors.

    What another time might go well is an `UnreachableError`.
    """
    try:
        yield
    except (InputError, ImportError):
        raise
    except Exception as error:
        cause = error.__cause__
        refused = type(cause).__module__.startswith("aiohttp") and getattr(cause, "status", 0) not in (404, 410)
        if isinstance(error, FileNotFoundError) and not refused:  # fsspec says so also if there is no server
            raise InputError(f"there is nothing at {spec}: check the address") from error
        if isinstance(error, PermissionError):
            raise UnreachableError(
                f"{spec} may not be read with these credentials ({_words(error)}): pass others in storage"
            ) from error
        raise UnreachableError(
            f"{spec} cannot be reached ({_words(cause or error)}): check the address, the network and storage"
        ) from error


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def identity_of(info: Mapping[str, Any]) -> dict[str, Any]:
    """What changes when a file behind an address does, of what its file system says about it."""
    tag = next((str(info[key]) for key in CHANGE_KEYS if info.get(key)), "")
    return {"bytes": info.get("size"), "changed": tag}


class RemoteFile:
    """A file behind an address, read in ranges by several threads at once; passing failures are tried again."""

    def __init__(self, spec: str, storage: Mapping[str, Any] | None) -> None:
        self.name = spec
        self._fs, self._path = open_file_system(spec, storage)
        with network(spec):
            info = self._fs.info(self._path)
        if info.get("type") == "directory":
            raise InputError(f"{spec} is a folder: wanted a file, or a folder whose name ends in .zarr")
        if not isinstance(info.get("size"), int):
            raise InputError(f"the server of {spec} does not say how long it is: download it and name the copy")
        self.size = int(info["size"])
        self.identity = identity_of(info)
        if "http" in self._protocols():
            self._check_ranges_work(info)

    def _protocols(self) -> tuple[str, ...]:
        protocol = self._fs.protocol
        return (protocol,) if isinstance(protocol, str) else tuple(protocol)

    def _check_ranges_work(self, info: Mapping[str, Any]) -> None:
        """Ask for one byte in the middle, in a way that does not take in the rest if it is sent too."""
        works = info.get("partial", True) is not False
        if works and self.size > 1:
            try:
                with self._fs.open(self._path, size=self.size, cache_type="none") as file:
                    file.seek(self.size // 2)
                    works = len(file.read(1)) == 1
            except ValueError:  # fsspec's, for an answer that is no range
                works = False
            except Exception as error:
                with network(self.name):
                    raise error
        if not works:
            raise self._no_ranges()

    def _no_ranges(self) -> InputError:
        return InputError(f"the server of {self.name} does not answer range requests: download it and name the copy")

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[Bytes]:
        """The bytes of each (offset, length); ranges that lie close together are fetched as one."""
        check_ranges(self.name, self.size, ranges)
        joined, places = _join(ranges)
        data = self._fetch(joined)
        return [
            data[i][offset - joined[i][0] : offset - joined[i][0] + length]
            for i, (offset, length) in zip(places, ranges, strict=True)
        ]

    def _fetch(self, ranges: list[tuple[int, int]]) -> list[Bytes]:
        """The bytes of each (offset, length), at the same time where the file system can."""
        found: dict[int, Bytes] = {i: np.empty(0, dtype=np.uint8) for i, (_, n) in enumerate(ranges) if n == 0}
        for attempt in range(ATTEMPTS):
            left = [i for i in range(len(ranges)) if i not in found]
            if not left:
                break
            if attempt:
                time.sleep(FIRST_WAIT_SECONDS * 4 ** (attempt - 1))
            starts, ends = [ranges[i][0] for i in left], [sum(ranges[i]) for i in left]
            with network(self.name):
                answers = self._fs.cat_ranges([self._path] * len(left), starts, ends, on_error="return")
            for i, answer in zip(left, answers, strict=True):
                if isinstance(answer, BaseException):
                    if attempt == ATTEMPTS - 1 or isinstance(answer, (FileNotFoundError, PermissionError)):
                        with network(self.name):
                            raise answer
                elif len(answer) > ranges[i][1]:
                    raise self._no_ranges()
                elif len(answer) == ranges[i][1]:
                    found[i] = np.frombuffer(bytearray(answer), dtype=np.uint8)
        short = next((i for i in range(len(ranges)) if i not in found), None)
        if short is not None:
            raise UnreachableError(f"the server of {self.name} keeps sending less than was asked for: try again later")
        return [found[i] for i in range(len(ranges))]

    def close(self) -> None:
        """There is nothing to close: connections belong to fsspec."""


def _join(ranges: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[int]]:
    """Join ranges that follow one another closely; also the joined range of each."""
    joined: list[tuple[int, int]] = []
    places = []
    for offset, length in ranges:
        if joined:
            first, size = joined[-1]
            gap = offset - (first + size)
            if 0 <= gap <= JOINED_GAP_BYTES and offset + length - first <= JOINED_BYTES:
                joined[-1] = (first, offset + length - first)
                places.append(len(joined) - 1)
                continue
        joined.append((offset, length))
        places.append(len(joined) - 1)
    return joined, places


class BlockReader(io.RawIOBase):
    """A file object over a `RemoteFile` for h5py: reads whole blocks and keeps the last ones."""

    def __init__(self, file: RemoteFile) -> None:
        super().__init__()
        self._file = file
        self._place = 0
        self._blocks: OrderedDict[int, Bytes] = OrderedDict()
        self._ahead, self._next = 1, -1
        self._lock = threading.Lock()
        self.error: InputError | None = None
        """What the last read that failed said: HDF5 passes only some of it on."""

    def readable(self) -> bool:
        """It can be read."""
        return True

    def seekable(self) -> bool:
        """Any place can be read."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Go to a place."""
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._file.size}[whence]
        return self._place

    def tell(self) -> int:
        """The place."""
        return self._place

    def readinto(self, buffer: Any, /) -> int:
        """Fill ``buffer`` from the place on, as far as the file goes."""
        target = memoryview(buffer).cast("B")
        start, stop = self._place, min(self._place + len(target), self._file.size)
        if stop <= start:
            return 0
        try:
            data = self._take(range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)))
        except InputError as error:
            self.error = error
            raise
        skip = start - start // BLOCK_BYTES * BLOCK_BYTES
        target[: stop - start] = data[skip : skip + stop - start].data
        self._place = stop
        return stop - start

    def _take(self, numbers: range) -> Bytes:
        with self._lock, _without_collection():
            missing = [number for number in numbers if number not in self._blocks]
            if missing:
                self._fetch(missing)
            for number in numbers:
                self._blocks.move_to_end(number)
            data = np.concatenate([self._blocks[number] for number in numbers])
            while len(self._blocks) > KEPT_BLOCKS:
                self._blocks.popitem(last=False)
            return data

    def _fetch(self, missing: list[int]) -> None:
        self._ahead = min(2 * self._ahead, BLOCKS_AHEAD) if missing[0] == self._next else 1
        last = -(-self._file.size // BLOCK_BYTES)
        missing += range(missing[-1] + 1, min(missing[-1] + self._ahead, last))
        spans = [(n * BLOCK_BYTES, min(BLOCK_BYTES, self._file.size - n * BLOCK_BYTES)) for n in missing]
        self._blocks |= zip(missing, self._file.read_many(spans), strict=True)
        self._next = missing[-1] + 1


@contextmanager
def _without_collection() -> Iterator[None]:
    """Keep the garbage collector still: h5py reads while it holds its lock, and waits for fsspec's thread.

    Were h5py objects collected on that thread, it would wait for the lock, and both for ever.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
