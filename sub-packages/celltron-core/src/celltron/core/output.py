"""What is printed, and what becomes of it when nobody reads any more."""

import errno
import os
import select
import sys
from typing import TextIO

_NOBODY_READS = {errno.EPIPE, errno.EIO}  # the pipe's reader has ended; the terminal is closed


def tell(line: str) -> None:
    """Print a line on standard error; long work goes on when nobody reads it any more, as when Ctrl-C ended `| tee`."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError as error:
        if error.errno not in _NOBODY_READS:
            raise
        _send_nowhere(sys.stderr)


def drop_unread_output() -> bool:
    """Whether nobody reads what is printed any more; it then goes nowhere, so that Python's end does not complain."""
    unread = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
    for stream in unread:
        _send_nowhere(stream)
    return bool(unread)


def _is_unread(stream: TextIO) -> bool:
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
    except (AttributeError, ValueError):  # it is no file, as under a test, or none at all where the shell closed it
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _send_nowhere(stream: TextIO) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
