import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from celltron.train.interrupt import Interruption

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def caught() -> list[int]:
    """Handlers that note a signal instead of ending the tests, put back afterwards."""
    noted: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: noted.append(number)) for number in SIGNALS}
    yield noted
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_remembered(caught: list[int], number: int) -> None:
    with Interruption() as interruption:
        assert interruption.signal_number is None
        os.kill(os.getpid(), number)
        assert interruption.signal_number == number
    assert caught == []


@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_goes_where_signals_went_before(caught: list[int], second: int) -> None:
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), second)
        assert interruption.signal_number == signal.SIGTERM
    assert caught == [second]


@pytest.mark.parametrize("number", SIGNALS)
def test_handlers_are_put_back_at_the_end(caught: list[int], number: int) -> None:
    with pytest.raises(ValueError, match="of the block"), Interruption() as interruption:
        raise ValueError("of the block")
    os.kill(os.getpid(), number)
    assert interruption.signal_number is None
    assert caught == [number]


# A lock taken twice waits for ever inside the C library, as a collective does for a process that is gone.
STUCK = """
import ctypes
from celltron.train.interrupt import Interruption

with Interruption(deadline_seconds=0.5):
    print("entered", flush=True)
    library, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(lock)
    library.pthread_mutex_lock(lock)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_process_that_waits_for_ever_ends_at_the_deadline(number: int) -> None:
    stuck = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert stuck.stdout is not None and stuck.stdout.readline() == "entered\n"
    time.sleep(0.1)
    begin = time.monotonic()
    stuck.send_signal(number)
    _, said = stuck.communicate(timeout=30)
    assert stuck.returncode == 128 + number and time.monotonic() - begin > 0.5
    assert said.startswith(f"celltron: error: not stopped 0.5 s after {signal.Signals(number).name}: ")
    assert said.count("\n") == 1 and "--resume auto" in said


def test_nothing_is_left_after_the_block(caught: list[int]) -> None:
    threads = threading.active_count()
    with Interruption(deadline_seconds=0.2):
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.4)
    assert threading.active_count() == threads
    assert signal.set_wakeup_fd(-1) == -1
