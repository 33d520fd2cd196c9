"""A run's folder: made by runs alone, and written by one of them at a time."""

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from celltron.core import InputError, tell
from celltron.core.durable import lock_folder
from celltron.train.launch import Launch
from celltron.train.together import do_on_main

RUN_MARK_NAME = ".celltron-run"
"""A file that says that the folder is a run's; while one goes on, it says which process that is."""


def check_folder(out: Path) -> None:
    """Refuse a folder in which somebody's files would be overwritten."""
    if out.exists() and any(out.iterdir()) and not (out / RUN_MARK_NAME).exists():
        raise InputError(f"{out} holds files that no run made; choose a new folder for --out")


def mark_folder(out: Path) -> None:
    """Say that the folder is a run's, and that this is its main process."""
    since = datetime.now(UTC)
    who = f"process {os.getpid()} on {socket.gethostname()}, since {since:%Y-%m-%d %H:%M} UTC"
    (out / RUN_MARK_NAME).write_text(f"{who}\n", encoding="utf-8")


@contextlib.contextmanager
def hold_folder(out: Path, launch: Launch) -> Iterator[None]:
    """Keep every other run out of a folder, which is made if need be; every process enters this.

    The system drops the lock of a main process that dies. A folder that nothing was put into is removed again.

    Raises:
        InputError: another run holds the folder.
    """
    missing: list[Path] = []
    locks: list[int] = []

    def take() -> None:
        missing.extend(folder for folder in (out, *out.parents) if not folder.exists())
        out.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(out)
        if lock is False:
            raise InputError(
                f"{out} is in use by another run{_read_mark(out)}; stop that one, wait for its end, or choose another "
                "--out"
            )
        if lock is None:
            tell(f"{out}: no locks on this file system; start no second run there")
        else:
            locks.append(lock)
        if (out / RUN_MARK_NAME).exists():
            mark_folder(out)

    do_on_main(launch, take)
    try:
        yield
    finally:
        if launch.is_main:
            with contextlib.suppress(OSError):  # it names a process that is gone, which does no harm
                os.truncate(out / RUN_MARK_NAME, 0)
            for folder in missing:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            for lock in locks:
                os.close(lock)


def _read_mark(out: Path) -> str:
    """Whose folder it is, in brackets, as far as is known."""
    try:
        text = (out / RUN_MARK_NAME).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    who = " ".join(text.split())[:200]
    return f" ({who})" if who else ""
