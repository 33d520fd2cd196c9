import os
import signal

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
