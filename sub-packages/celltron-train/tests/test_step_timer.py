"""Time by parts, against clocks that the test moves by hand, and in a real step."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from celltron.train.optimizer import OptimizerConfig, wrap_model
from celltron.train.step_timer import (
    MAX_UNREAD,
    PART_OF_MEGATRON_TIMER,
    PARTS,
    PAUSED,
    StepTimer,
    as_fractions,
    start_timer,
)


class SlowDevice:
    """Marks are queued behind the work asked for, and come when the test lets the device work."""

    def __init__(self) -> None:
        self.queued = 0.0
        self.done = 0.0
        self.num_waits = 0
        self.given_back: list[float] = []

    def ask_for(self, seconds: float) -> None:
        self.queued += seconds

    def work(self, seconds: float) -> None:
        self.done = min(self.queued, self.done + seconds)

    def mark(self) -> float:
        return self.queued

    def has_come(self, mark: float) -> bool:
        return mark <= self.done

    def wait_for(self, mark: float) -> None:
        self.num_waits += 1
        self.done = max(self.done, mark)

    def seconds_between(self, start: float, end: float) -> float:
        assert end <= self.done, "asked for a time that has not come"
        return end - start

    def give_back(self, mark: float) -> None:
        self.given_back.append(mark)


def take_step(device: SlowDevice, timer: StepTimer[float]) -> None:
    """A step as the loop and Megatron make it."""
    with timer.part("data_wait"):
        device.ask_for(1.0)
    device.ask_for(0.5)
    timer("forward-backward", log_level=1).start(barrier=True)
    for _ in range(2):
        timer("forward-compute", log_level=2).start()
        device.ask_for(2.0)
        timer("forward-compute").stop()
        timer("backward-compute", log_level=2).start()
        device.ask_for(4.0)
        timer("backward-compute").stop()
    timer("all-grads-sync", log_level=1).start(barrier=True)
    device.ask_for(0.25)
    timer("all-grads-sync").stop()
    timer("forward-backward").stop()
    with timer.part("optimizer"):
        device.ask_for(1.0)
        timer("params-all-gather", log_level=1).start(barrier=False)
        device.ask_for(0.125)
        timer("params-all-gather").stop()
        timer("optimizer-inner-step", log_level=1).start()
        device.ask_for(0.5)
        timer("optimizer-inner-step").stop()


EXPECTED = {
    "data_wait": 1.0,
    "forward": 4.0,
    "backward": 8.0,
    "communication": 0.375,
    "optimizer": 1.5,
    "other": 0.5,
}


def test_every_moment_belongs_to_the_innermost_part() -> None:
    device = SlowDevice()
    timer = StepTimer(device)
    take_step(device, timer)
    assert timer.read() == EXPECTED


def test_the_device_is_waited_for_only_where_it_is_read() -> None:
    device = SlowDevice()
    timer = StepTimer(device)
    for _ in range(5):
        take_step(device, timer)
        device.work(3.0)
    assert device.num_waits == 0
    seconds = timer.read()
    assert device.num_waits == 1
    assert seconds == {part: 5 * value for part, value in EXPECTED.items()}


def test_reading_starts_over() -> None:
    device = SlowDevice()
    timer = StepTimer(device)
    take_step(device, timer)
    timer.read()
    assert sum(timer.read().values()) == 0.0
    device.ask_for(2.0)
    assert timer.read() == {**dict.fromkeys(PARTS, 0.0), "other": 2.0}


def test_many_steps_between_readings_keep_few_marks() -> None:
    device = SlowDevice()
    timer = StepTimer(device)
    num_steps = 10 * MAX_UNREAD
    for _ in range(num_steps):
        with timer.part("forward"):
            device.ask_for(0.5)
        device.work(0.5)
        assert len(timer._unread) <= MAX_UNREAD
    assert timer.read()["forward"] == 0.5 * num_steps
    # All but the last two: the end of the last part, and the reading.
    assert len(device.given_back) == 2 * num_steps + 1


def test_nothing_within_a_pause_is_counted() -> None:
    device = SlowDevice()
    timer = StepTimer(device)
    with timer.part(PAUSED):
        take_step(device, timer)
    device.ask_for(1.0)
    assert timer.read() == {**dict.fromkeys(PARTS, 0.0), "other": 1.0}


def test_a_part_ends_where_an_error_leaves_it() -> None:
    device = SlowDevice()
    timer = StepTimer(device)
    with pytest.raises(RuntimeError), timer.part("forward"):
        device.ask_for(1.0)
        raise RuntimeError
    device.ask_for(2.0)
    assert timer.read()["forward"] == 1.0


def test_fractions_have_names_of_their_own_and_leave_out_the_rest() -> None:
    fractions = as_fractions(EXPECTED)
    assert fractions == {f"{part}_fraction": EXPECTED[part] / 15.375 for part in PARTS if part != "other"}
    assert as_fractions(dict.fromkeys(PARTS, 0.0))["forward_fraction"] == 0.0


def test_megatron_says_when_its_parts_begin_and_end(make_model: Callable[..., Any]) -> None:
    """One micro-batch slow in the forward pass, and one in the backward pass."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    class SlowBackward(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, values: torch.Tensor) -> torch.Tensor:
            return values.clone()

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
            time.sleep(0.1)
            return gradient

    def forward_step(micro_batches: Any, model: torch.nn.Module) -> Any:
        time.sleep(0.05)
        output = SlowBackward.apply(model(next(micro_batches)))
        return output, lambda output: (output.sum(), torch.tensor(3, dtype=torch.int32), output.detach().sum())

    model, optimizer = wrap_model(make_model(), OptimizerConfig(), dtype=torch.float64, distributed_optimizer=True)
    timer = start_timer(torch.device("cpu"))
    timer.watch(model, optimizer)
    asked = []
    count = StepTimer.__call__

    def note(self: StepTimer[float], name: str, log_level: int | None = None) -> Any:
        asked.append(name)
        return count(self, name, log_level)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepTimer, "__call__", note)
        timer.read()
        start = time.perf_counter()
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([torch.ones(3, 4, dtype=torch.float64)] * 2),
            model=[model],
            num_microbatches=2,
            seq_length=1,
            micro_batch_size=1,
            forward_only=False,
        )
        with timer.part("optimizer"):
            optimizer.step()
        seconds = timer.read()
    passed = time.perf_counter() - start
    assert 0.1 <= seconds["forward"] < 0.2 <= seconds["backward"] < passed
    assert sum(seconds.values()) == pytest.approx(passed, abs=0.01)
    assert set(asked) & set(PART_OF_MEGATRON_TIMER) == {
        *("forward-compute", "backward-compute", "all-grads-sync", "params-all-gather"),
        *("conditional-embedder-grads-all-reduce", "embedding-grads-all-reduce"),
        "non-tensor-parallel-grads-all-reduce",
    }
