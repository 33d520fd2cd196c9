from collections.abc import Callable

import pytest
import torch

from celltron.core import InputError
from celltron.train import together
from celltron.train.launch import Launch
from celltron.train.together import blame_lost_process, do_on_main, do_together, share_from_main

pytestmark = pytest.mark.usefixtures("engine")
OTHER = Launch(rank=1, world_size=2, local_rank=1)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have another process report a number of failures."""

    def report(num_failed: int) -> None:
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda numbers, group: numbers.add_(num_failed))

    return report


def fail(error: Exception) -> None:
    raise error


def test_what_goes_well_goes_on() -> None:
    done: list[int] = []
    do_together(lambda: done.append(1))
    do_on_main(Launch(), lambda: done.append(2))
    assert done == [1, 2]


@pytest.mark.parametrize("error", [InputError("of this process"), OSError(28, "No space left on device", "/a/file")])
@pytest.mark.parametrize("num_failed_elsewhere", [0, 3])
def test_a_failure_here_is_raised_here(
    error: Exception, num_failed_elsewhere: int, elsewhere: Callable[[int], None]
) -> None:
    elsewhere(num_failed_elsewhere)
    with pytest.raises(type(error)) as raised:
        do_together(lambda: fail(error))
    assert raised.value is error


def test_a_failure_elsewhere_is_raised_here_too(elsewhere: Callable[[int], None]) -> None:
    elsewhere(1)
    done: list[int] = []
    with pytest.raises(InputError, match="another process of this run failed"):
        do_together(lambda: done.append(1))
    assert done == [1]


def test_other_processes_wait_for_the_main_one(elsewhere: Callable[[int], None]) -> None:
    do_on_main(OTHER, lambda: fail(ValueError("never called")))
    elsewhere(1)
    with pytest.raises(InputError, match="another process of this run failed"):
        do_on_main(OTHER, lambda: fail(ValueError("never called")))


def test_a_number_is_found_on_the_main_process_and_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert share_from_main(Launch(), lambda: -1) == -1
    assert share_from_main(Launch(), lambda: 2**40 + 1) == 2**40 + 1
    monkeypatch.setattr(torch.distributed, "broadcast", lambda numbers, src, group: numbers.fill_(7 if src == 0 else 8))
    assert share_from_main(OTHER, lambda: fail(ValueError("never called"))) == 7  # type: ignore[func-returns-value]


def test_defects_are_told_to_the_others_and_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda numbers, group: told.append(int(numbers)))
    with pytest.raises(ZeroDivisionError):
        do_together(lambda: 1 // 0)
    assert told == [1]


@pytest.mark.parametrize(
    "said",
    [
        "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:14007",
        "NCCL error: remote process exited or there was a network error, NCCL version 2.27.3",
        "failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
    ],
)
def test_a_process_that_is_gone_is_blamed_in_one_sentence(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setattr(together, "_SECONDS_BEHIND", 0.0)
    with pytest.raises(InputError, match="another process of this run ended; its own message"), blame_lost_process():
        raise RuntimeError(said)


def test_other_errors_stay_as_they_are() -> None:
    error = RuntimeError("shapes [3] and [4] do not fit")
    with pytest.raises(RuntimeError) as raised, blame_lost_process():
        raise error
    assert raised.value is error
