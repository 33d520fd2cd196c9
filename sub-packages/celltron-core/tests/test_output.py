import errno
import os
import sys
from collections.abc import Callable

import pytest

from celltron.core import tell


def pipe() -> tuple[int, int]:
    return os.pipe()


def terminal() -> tuple[int, int]:
    return os.openpty()


@pytest.mark.parametrize("make", [pipe, terminal])
def test_lines_are_printed_until_nobody_reads(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], tuple[int, int]]
) -> None:
    reader, writer = make()
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        tell("read")
        assert os.read(reader, 100).split() == [b"read"]
        os.close(reader)
        with pytest.raises(OSError):
            os.write(writer, b"x")
        tell("not read")
        tell("neither")
        os.write(writer, b"x")  # it goes nowhere


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = open("/dev/full", "w")
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(OSError) as error:
        tell("a line")
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(OSError):
        stream.close()
