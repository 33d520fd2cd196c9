"""Doing something on one process or on all of them, so that a failure on one fails all and none waits for ever."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator

import torch

from celltron.core import InputError
from celltron.train.launch import Launch, patient_group

# What gloo, NCCL and the store of addresses say of a process at the other end that is gone.
_LOST_PROCESS = re.compile(
    r"Connection (closed|reset) by peer|Connection refused|timed out connecting|Broken pipe"
    r"|remote process exited|Did the remote server shutdown or crash"
)
# Long enough for a launcher to see first which process failed by itself.
_SECONDS_BEHIND = 1.0


@contextlib.contextmanager
def blame_lost_process() -> Iterator[None]:
    """Turn the many ways in which communication fails when another process ended into one sentence.

    Raises:
        InputError: another process is gone; it is raised a moment after, so that the launcher tells of that one.
    """
    try:
        yield
    except RuntimeError as error:
        if not _LOST_PROCESS.search(str(error)):
            raise
        time.sleep(_SECONDS_BEHIND)
        raise InputError("another process of this run ended; its own message, or the launcher, says why") from error


def do_together(action: Callable[[], object]) -> None:
    """Do something on every process and wait for all.

    Raises:
        InputError: `action` failed on another process only.
        Exception: what `action` raised here.
    """
    failure: Exception | None = None
    try:
        action()
    except Exception as error:
        failure = error
    num_failed = torch.tensor([int(failure is not None)], dtype=torch.int64)
    torch.distributed.all_reduce(num_failed, group=patient_group())
    if failure is not None:
        raise failure
    if int(num_failed.item()):
        raise InputError("another process of this run failed; its message says why")


def do_on_main(launch: Launch, action: Callable[[], object]) -> None:
    """Do something on the main process while the others wait.

    Raises:
        Exception: as `do_together`.
    """
    do_together(action if launch.is_main else lambda: None)


def share_from_main(launch: Launch, find: Callable[[], int]) -> int:
    """Find a number on the main process and tell it to all.

    Raises:
        Exception: as `do_together`.
    """
    found = torch.zeros(1, dtype=torch.int64)
    do_on_main(launch, lambda: found.fill_(find()))
    torch.distributed.broadcast(found, src=0, group=patient_group())
    return int(found.item())
