import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from celltron.train.interrupt import SAME_REQUEST_SECONDS, Interruption, StopRequest

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
    with Interruption(100.0) as interruption:
        assert interruption.signal_number is None
        os.kill(os.getpid(), number)
        assert interruption.signal_number == number
    assert caught == []


@pytest.mark.parametrize("second", SIGNALS)
def test_signals_right_after_the_first_are_the_same_request(caught: list[int], second: int) -> None:
    with Interruption(100.0) as interruption:
        for number in (signal.SIGTERM, second, second):
            os.kill(os.getpid(), number)
        time.sleep(0.1)  # a thread is told, too
        assert interruption.signal_number == signal.SIGTERM
    assert caught == []


@pytest.mark.parametrize("first", SIGNALS)
def test_only_a_later_ctrl_c_ends_the_process_at_once(first: int) -> None:
    request = StopRequest(60.0)
    assert request.seconds_left(10.0) is None
    soon, later = 10.0 + SAME_REQUEST_SECONDS, 10.1 + SAME_REQUEST_SECONDS
    assert not request.receive(first, 10.0)
    assert not any(request.receive(number, soon) for number in SIGNALS)
    assert not request.receive(signal.SIGTERM, later)
    assert request.receive(signal.SIGINT, later)
    assert request.signal_number == first


def test_the_deadline_is_that_of_the_first_signal() -> None:
    request = StopRequest(60.0)
    request.receive(signal.SIGTERM, 10.0)
    request.receive(signal.SIGTERM, 50.0)
    assert [request.seconds_left(now) for now in (10.0, 50.0, 70.0, 71.0)] == [60.0, 20.0, 0.0, 0.0]


@pytest.mark.parametrize("number", SIGNALS)
def test_handlers_are_put_back_at_the_end(caught: list[int], number: int) -> None:
    with pytest.raises(ValueError, match="of the block"), Interruption(100.0) as interruption:
        raise ValueError("of the block")
    os.kill(os.getpid(), number)
    assert interruption.signal_number is None
    assert caught == [number]


# A lock taken twice waits for ever inside the C library, as a collective does for a process that is gone.
STUCK = """
import ctypes, sys
from celltron.train import interrupt

interrupt.SAME_REQUEST_SECONDS = 0.2
with interrupt.Interruption(deadline_seconds=float(sys.argv[1])):
    print("entered", flush=True)
    library, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(lock)
    library.pthread_mutex_lock(lock)
"""


def start_stuck(deadline_seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", STUCK, str(deadline_seconds)]
    stuck = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert stuck.stdout is not None and stuck.stdout.readline() == "entered\n"
    time.sleep(0.1)
    return stuck


@pytest.mark.parametrize("number", SIGNALS)
def test_a_process_that_waits_for_ever_ends_at_the_deadline(number: int) -> None:
    stuck = start_stuck(deadline_seconds=0.5)
    begin = time.monotonic()
    stuck.send_signal(number)
    _, said = stuck.communicate(timeout=30)
    assert stuck.returncode == 128 + number and time.monotonic() - begin > 0.5
    assert said.startswith(f"celltron: error: not stopped 0.5 s after {signal.Signals(number).name} ")
    assert said.count("\n") == 1 and "--resume auto" in said


def test_a_second_ctrl_c_ends_a_process_that_waits_for_ever() -> None:
    stuck = start_stuck(deadline_seconds=1000.0)
    stuck.send_signal(signal.SIGTERM)
    stuck.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert stuck.poll() is None
    stuck.send_signal(signal.SIGINT)
    _, said = stuck.communicate(timeout=30)
    assert stuck.returncode == 130
    assert said.startswith("celltron: error: interrupted once more, so ended at once without saving, ")


def test_nothing_is_left_after_the_block(caught: list[int]) -> None:
    threads = threading.active_count()
    with Interruption(deadline_seconds=0.2):
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.4)
    assert threading.active_count() == threads
    assert signal.set_wakeup_fd(-1) == -1
