"""The files of tar shards, in a folder or behind an address; what fails in passing is tried again."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from celltron.cells.ingest.remote import is_address, network, open_file_system
from celltron.cells.memory import address_of
from celltron.cells.threads import map_in_order
from celltron.core import InputError

Bytes = npt.NDArray[np.uint8]
Result = TypeVar("Result")

OPEN_ATTEMPTS = 4
READ_ATTEMPTS = 8
"""A wrong address is told soon; a run that has trained for days waits half a minute for the network to come back."""
FIRST_WAIT_SECONDS = 0.25
REFUSED, TRY_AGAIN = (401, 403), (408, 429)
"""Statuses of HTTP: other credentials are wanted; the server has no time now."""
OURS = (ImportError, NotImplementedError, TypeError)
"""Errors that no waiting mends."""
ARRAY_BYTES = 8
"""Arrays begin at multiples of so many bytes from the beginning of a block, and so must a block in memory."""


class TarFiles(Protocol):
    """Files beside each other; one that is missing or out of reach is an InputError. Safe to use from threads."""

    name: str
    """The folder, for messages; without the query of an address, which may hold a secret."""

    def where(self, file: str) -> str:
        """A file's path or address, for messages."""

    def length(self, file: str) -> int | None:
        """A file's length in bytes; None where the server does not say."""

    def lengths(self) -> dict[str, int] | None:
        """The lengths of all files; None where they cannot be listed."""

    def read(self, file: str, *, attempts: int = READ_ATTEMPTS) -> Bytes:
        """A whole file."""

    def read_range(self, file: str, offset: int, length: int, *, attempts: int = READ_ATTEMPTS) -> Bytes:
        """Bytes ``offset .. offset + length`` of a file, never fewer, beginning at a multiple of 8 in memory."""


def open_files(address: str | Path, storage: Mapping[str, Any] | None) -> TarFiles:
    """The files in a folder, or behind an address such as ``s3://bucket/cells.tars``."""
    text = os.fspath(address)
    return _AddressFiles(text, storage) if is_address(text) else _FolderFiles(Path(text))


class _FolderFiles:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = str(folder)
        if folder.is_file():
            raise InputError(f"{folder} is a file, wanted the folder of tar shards: make one with celltron shard")
        if not folder.is_dir():
            raise InputError(f"{folder} does not exist; check the path")

    def where(self, file: str) -> str:
        return str(self._folder / file)

    def length(self, file: str) -> int | None:
        try:
            return (self._folder / file).stat().st_size
        except FileNotFoundError as error:
            raise self._missing(file) from error

    def lengths(self) -> dict[str, int] | None:
        with os.scandir(self._folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}

    def read(self, file: str, *, attempts: int = READ_ATTEMPTS) -> Bytes:
        try:
            return np.fromfile(self._folder / file, dtype=np.uint8)
        except FileNotFoundError as error:
            raise self._missing(file) from error

    def read_range(self, file: str, offset: int, length: int, *, attempts: int = READ_ATTEMPTS) -> Bytes:
        try:
            data = np.fromfile(self._folder / file, dtype=np.uint8, count=length, offset=offset)
        except FileNotFoundError as error:
            raise self._missing(file) from error
        if len(data) != length:
            raise InputError(f"{self.where(file)} ends before byte {offset + length}; copy the shards again")
        return data

    def _missing(self, file: str) -> InputError:
        return InputError(f"{self.where(file)} is missing; copy the shards again")


class _AddressFiles:
    """Through fsspec; a process that was forked gets a file system of its own, as fsspec wants it."""

    def __init__(self, address: str, storage: Mapping[str, Any] | None) -> None:
        self.name, mark, query = address.partition("?")
        self.name = self.name.rstrip("/")
        self._query = mark + query
        self._storage = storage
        self._opened = self._open()

    def where(self, file: str) -> str:
        return f"{self.name}/{file}"

    def _open(self) -> tuple[int, Any, str]:
        """This process, its file system, and the folder's path in it."""
        return os.getpid(), *open_file_system(self.name + self._query, self._storage)

    def _place(self, file: str) -> tuple[Any, str]:
        """The file system and a file's path in it."""
        if self._opened[0] != os.getpid():
            self._opened = self._open()
        _, fs, root = self._opened
        return fs, f"{root.removesuffix(self._query).rstrip('/')}/{file}{self._query}"

    def length(self, file: str) -> int | None:
        fs, path = self._place(file)
        size = _persist(self.where(file), lambda: fs.info(path), OPEN_ATTEMPTS).get("size")
        return int(size) if isinstance(size, int) else None

    def lengths(self) -> dict[str, int] | None:
        if "http://" in self.name or "https://" in self.name:  # such servers list nothing
            return None
        fs, folder = self._place("")
        try:
            fs.invalidate_cache()
            entries = _persist(self.name, lambda: fs.ls(folder.rstrip("/"), detail=True), OPEN_ATTEMPTS)
        except _RefusedError:  # who may read each file need not be allowed to list them
            return None
        return {str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]: int(entry["size"] or 0) for entry in entries}

    def read(self, file: str, *, attempts: int = READ_ATTEMPTS) -> Bytes:
        fs, path = self._place(file)
        return _array(_persist(self.where(file), lambda: fs.cat_file(path), attempts))

    def read_range(self, file: str, offset: int, length: int, *, attempts: int = READ_ATTEMPTS) -> Bytes:
        fs, path = self._place(file)

        def fetch() -> bytes:
            data: bytes = fs.cat_file(path, start=offset, end=offset + length)
            if len(data) < length:
                raise ConnectionError(f"{len(data)} bytes came where {length} were asked for")
            return data

        data = _persist(self.where(file), fetch, attempts) if length else b""
        if len(data) > length:
            raise InputError(
                f"the server of {self.where(file)} does not answer range requests: download the shards and name the "
                "copy"
            )
        return _array(data)


class _RefusedError(InputError):
    """The server wants other credentials."""


def _array(data: bytes) -> Bytes:
    array = np.frombuffer(data, dtype=np.uint8)
    return array.copy() if address_of(array) % ARRAY_BYTES else array


def _persist(where: str, call: Callable[[], Result], attempts: int) -> Result:
    """Call until it goes well, at most so many times with longer and longer waits; then say what was wrong."""
    for attempt in range(attempts):
        if attempt:
            time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
        try:
            return call()
        except Exception as error:
            status = _status_of(error)
            if isinstance(error, PermissionError) or status in REFUSED:
                raise _RefusedError(
                    f"{where} may not be read with these credentials: pass others in storage"
                ) from error
            is_final = isinstance(error, OURS) or (isinstance(error, FileNotFoundError) and not _hides_another(error))
            is_final |= 400 <= status < 500 and status not in TRY_AGAIN
            if is_final or attempt == attempts - 1:
                with network(where):
                    raise
    raise AssertionError(attempts)


def _status_of(error: BaseException) -> int:
    """The HTTP status that an error of aiohttp, or what it came from, carries; 0 otherwise."""
    for each in (error, error.__cause__):
        if each is not None and isinstance(status := getattr(each, "status", None), int):
            return status
    return 0


def _hides_another(error: FileNotFoundError) -> bool:
    """Whether fsspec says "not found" of a web server that could not be asked."""
    cause = error.__cause__
    is_of_network = isinstance(cause, OSError) or type(cause).__module__.startswith("aiohttp")
    return is_of_network and _status_of(error) not in (404, 410)


def check_lengths(files: TarFiles, wanted: Mapping[str, int], workers: int) -> None:
    """Compare the lengths of files with what the manifest says."""
    found: Mapping[str, int | None] | None = files.lengths()
    if found is None:
        found = dict(zip(wanted, map_in_order(files.length, wanted, workers), strict=True))
    for file, length in wanted.items():
        if file not in found:
            raise InputError(f"{files.where(file)} is missing; copy the shards again")
        if found[file] not in (None, length):
            raise InputError(
                f"{files.where(file)} has {found[file]} bytes where the manifest says {length}; copy the shards again"
            )
