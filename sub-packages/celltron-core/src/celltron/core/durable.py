"""What the operating system is asked for so that a crash or a full disk never leaves half a file under its name."""

import contextlib
import ctypes
import errno
import os
import secrets
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a small file so that its name shows the old content or the new, never a part.

    Args:
        path: the file; its folder must exist.
        data: the content; text is written as UTF-8.
    """
    path = Path(path)
    content = data.encode("utf-8") if isinstance(data, str) else data
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with name_file_in_errors(path):
        try:
            with aside.open("xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
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


def sync_tree(folder: Path) -> None:
    """Push every file and every folder below `folder` to the disk."""
    for parent, _, names in os.walk(folder):
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
