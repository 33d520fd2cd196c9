"""Run a command on a disk that fills up: `break_writes.py NUM_BYTES NAME ARGUMENT ...`.

Files whose path contains NAME can be written up to NUM_BYTES by this process and those it forks; then every write fails
as it does on a full disk. For the NAME `checkpoint` the system itself refuses longer files once a checkpoint is begun:
writers outside Python meet it too.
"""

import builtins
import errno
import io
import os
import resource
import sys
from typing import Any

from celltron.cli.main import main
from celltron.train.checkpoint import Checkpoints

NUM_BYTES, NAME = int(sys.argv[1]), sys.argv[2]
open_file = io.open


class FullDisk:
    """A file that takes so many bytes and no more."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.room = NUM_BYTES

    def write(self, data: Any) -> int:
        size = len(data) if isinstance(data, str) else memoryview(data).nbytes
        if size > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= size
        return int(self.file.write(data))

    def __enter__(self) -> "FullDisk":
        return self

    def __exit__(self, *unused: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def open_on_full_disk(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
    opened = open_file(file, mode, *rest, **more)
    return FullDisk(opened) if NAME in str(file) and set(mode) & set("wax+") else opened


def limit_checkpoints() -> None:
    begin = Checkpoints.begin

    def begin_within_limit(*arguments: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (NUM_BYTES, resource.RLIM_INFINITY))
        return begin(*arguments)

    Checkpoints.begin = begin_within_limit  # type: ignore[method-assign]


if __name__ == "__main__":
    if NAME == "checkpoint":
        limit_checkpoints()
    else:
        builtins.open = io.open = open_on_full_disk  # type: ignore[assignment]
    sys.exit(main(sys.argv[3:]))
