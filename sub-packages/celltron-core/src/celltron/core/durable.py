"""What the operating system is asked for so that a crash or a full disk never leaves half a file under its name."""

import contextlib
import ctypes
import errno
import hashlib
import os
import secrets
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal, TypedDict

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_BEGIN_WRITING = 2  # SYNC_FILE_RANGE_WRITE
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


class FileEntry(TypedDict):
    """Length and checksum (sha256, hex) of a file, as a manifest lists it."""

    bytes: int
    sha256: str


class HashedFile:
    """A new file that is hashed while it is written, so that it need not be read again for its checksum.

    It has what libraries want of a file that they only write on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._digest = hashlib.sha256()
        self._bytes = 0
        with name_file_in_errors(path):
            self._stream = path.open("wb")

    def write(self, data: Any) -> int:
        """Append bytes, or what holds them in a row (arrays); a full disk is an OSError with the file's name."""
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        with name_file_in_errors(self.path):
            self._stream.write(view)
        self._digest.update(view)
        self._bytes += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        """Bytes so far."""
        return self._bytes

    def flush(self) -> None:
        """Hand what was written to the system."""
        with name_file_in_errors(self.path):
            self._stream.flush()

    def close(self) -> None:
        """End the file; its way to the disk begins, so that a sync later has less to wait for."""
        with name_file_in_errors(self.path):
            try:
                if not self._stream.closed:
                    self._stream.flush()
                    begin_writing_out(self._stream.fileno())
            finally:
                self._stream.close()

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether the file has ended."""
        return self._stream.closed

    def entry(self) -> FileEntry:
        """Length and checksum of what was written."""
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


def begin_writing_out(descriptor: int) -> None:
    """Ask Linux to write a file's pages to the disk, and do not wait; other systems do so in their own time."""
    library = ctypes.CDLL(None)
    if hasattr(library, "sync_file_range"):
        library.sync_file_range(descriptor, ctypes.c_int64(0), ctypes.c_int64(0), _BEGIN_WRITING)


def hash_file(path: Path) -> FileEntry:
    """Read a file for its length and checksum."""
    with path.open("rb") as stream:
        return {"bytes": os.fstat(stream.fileno()).st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def write_atomically(path: Path, data: bytes | str, *, sync: bool = True) -> None:
    """Write a small file so that its name shows the old content or the new, never a part.

    Args:
        path: the file; its folder must exist.
        data: the content; text is written as UTF-8.
        sync: push it to the disk. Without, all that is said holds if the process dies, but not if the machine does.
    """
    path = Path(path)
    content = data.encode("utf-8") if isinstance(data, str) else data
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with name_file_in_errors(path):
        try:
            with aside.open("xb") as stream:
                stream.write(content)
                stream.flush()
                if sync:
                    os.fsync(stream.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        if sync:
            sync_folder(path.parent)


@contextlib.contextmanager
def name_file_in_errors(path: Path, only: Collection[int] | None = None) -> Iterator[None]:
    """Give an OSError that names no file, as a full disk gives on write, the name of the file being written.

    Args:
        path: the name.
        only: the error numbers that are meant; None for all.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and (only is None or error.errno in only):
            error.filename = str(path)
        raise


def sync_folder(folder: Path) -> None:
    """Push the names in a folder to the disk; file systems that cannot sync a folder are left alone."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path, *, leave_out: Collection[str] = ()) -> None:
    """Push every file and every folder below `folder` to the disk, save the folders `leave_out` right in it."""
    for parent, folders, names in os.walk(folder):
        if parent == os.fspath(folder):
            folders[:] = [name for name in folders if name not in leave_out]
        for name in names:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(parent))


def exchange_folders(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system cannot (it must be Linux, and not every file system can)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    result = rename(
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(os.fsencode(first)),
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(os.fsencode(second)),
        ctypes.c_uint(_RENAME_EXCHANGE),
    )
    return bool(result == 0)


def lock_folder(folder: Path) -> int | Literal[False] | None:
    """Take the writer's lock of a folder.

    Returns:
        A descriptor to close when done, None where the file system has no locks, False when another process holds it.
        The system drops the lock of a process that dies.
    """
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
