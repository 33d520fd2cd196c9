"""Where the time of training steps goes, on this process: every moment belongs to exactly one part.

- `data_wait`: waiting for the next batch, with what makes tensors of it.
- `forward`: Megatron's forward step: model and loss, with what tensor, sequence and context parallelism communicate in
  them, and the wait for parameters that are gathered while the forward pass runs.
- `backward`: the backward pass, with recomputed activations and what the same parallelisms communicate.
- `communication`: sending and receiving between pipeline stages, the summing of gradients over processes as far as the
  backward pass does not hide it, the gathering of parameters after the optimizer's step, and the summing of losses. It
  contains the wait for slower processes: a stage that has nothing to do is found here.
- `optimizer`: the optimizer's step, the norm of the gradients and its sum over processes among it.
- `other`: the rest of a step: clearing gradients, the schedule's Python, writing metrics.
- `paused`: what is no training, such as validation and checkpoints; left out of what is read.
"""

import time
from typing import Any, Generic, Protocol, TypeVar

import torch
from megatron.core.optimizer import MegatronOptimizer

from celltron.train.fully_sharded import DataParallel

PARTS = ("data_wait", "forward", "backward", "communication", "optimizer", "other")
PAUSED = "paused"
_BETWEEN_STAGES = (
    "forward-recv",
    "forward-send",
    "backward-recv",
    "backward-send",
    "forward-send-backward-recv",
    "backward-send-forward-recv",
    "forward-send-forward-recv",
    "backward-send-backward-recv",
    "forward-backward-send-forward-backward-recv",
)
_OF_GRADIENTS = (
    "all-grads-sync",
    "conditional-embedder-grads-all-reduce",
    "non-tensor-parallel-grads-all-reduce",
    "embedding-grads-all-reduce",
)
PART_OF_MEGATRON_TIMER = {
    "forward-compute": "forward",
    "backward-compute": "backward",
    **dict.fromkeys((*_BETWEEN_STAGES, *_OF_GRADIENTS, "params-all-gather"), "communication"),
}
"""Megatron-core 0.16's names of timers; the others lie around these and are not needed."""
MAX_UNREAD = 1024

Mark = TypeVar("Mark")


class Clock(Protocol[Mark]):
    """Marks moments, whose distance can be asked for later."""

    def mark(self) -> Mark:
        """Mark this moment, without waiting for it."""

    def has_come(self, mark: Mark) -> bool:
        """Whether the device has reached a mark."""

    def wait_for(self, mark: Mark) -> None:
        """Wait until it has."""

    def seconds_between(self, start: Mark, end: Mark) -> float:
        """Seconds from one mark to another, both of which have come."""

    def give_back(self, mark: Mark) -> None:
        """A mark that is not asked for any more."""


class HostClock:
    """The time of the processor, which does the work itself."""

    def mark(self) -> float:
        """Read the clock."""
        return time.perf_counter()

    def has_come(self, mark: float) -> bool:
        """It was now when it was marked."""
        return True

    def wait_for(self, mark: float) -> None:
        """Nothing to wait for."""

    def seconds_between(self, start: float, end: float) -> float:
        """The difference."""
        return end - start

    def give_back(self, mark: float) -> None:
        """Nothing to keep."""


class CudaClock:
    """Events on this process's current stream: moments of the GPU's work, at which the host does not wait.

    A part lasts until the stream has done what was asked of it in that part; a host too slow to keep the GPU busy
    lengthens the part in which the GPU waits.
    """

    def __init__(self) -> None:
        self.spare: list[torch.cuda.Event] = []

    def mark(self) -> torch.cuda.Event:
        """Record an event."""
        event = self.spare.pop() if self.spare else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def has_come(self, mark: torch.cuda.Event) -> bool:
        """Ask the driver, without waiting."""
        return bool(mark.query())  # type: ignore[no-untyped-call]

    def wait_for(self, mark: torch.cuda.Event) -> None:
        """Wait."""
        mark.synchronize()  # syncs the host

    def seconds_between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """The driver's milliseconds, of half a microsecond's resolution."""
        return float(start.elapsed_time(end)) / 1e3

    def give_back(self, mark: torch.cuda.Event) -> None:
        """Keep the event for a later mark: making one costs more than recording it."""
        self.spare.append(mark)


class StepTimer(Generic[Mark]):
    """Sums, by part, the time since it was made or last read.

    Parts may lie within each other: time belongs to the innermost. Within `paused` all of it is paused.

    It is also what Megatron-core calls `timers`, see `watch`; without that, Megatron measures nothing. One thread.

    Args:
        clock: `HostClock` for a model on a CPU, `CudaClock` on a GPU; see `start_timer`.
    """

    def __init__(self, clock: Clock[Mark]) -> None:
        self.clock = clock
        self._inside = ["other"]
        self._unread: list[tuple[Mark, str]] = []
        """Moments, and to what the time after each belongs."""
        self._seconds = dict.fromkeys((*PARTS, PAUSED), 0.0)
        self._switches = {part: _Switch(self, part) for part in (*PARTS, PAUSED)}
        self._mark()

    def watch(self, model: DataParallel, optimizer: MegatronOptimizer) -> None:
        """Have Megatron's schedules and optimizers say when they begin and end what they do."""
        model.config.timers = self
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            part.config.timers = self

    def __call__(self, name: str, log_level: int | None = None) -> "_Switch | _NoSwitch":
        """Megatron's way to ask for a timer."""
        part = PART_OF_MEGATRON_TIMER.get(name)
        return _NO_SWITCH if part is None else self._switches[part]

    def part(self, name: str) -> "_Switch":
        """A context in which time belongs to a part; one of `PARTS`, or `PAUSED`."""
        return self._switches[name]

    def read(self) -> dict[str, float]:
        """Seconds of each of `PARTS` since the last reading, then start over; waits for the device.

        Their sum is the time that passed, pauses left out.
        """
        self._mark()
        last, _ = self._unread[-1]
        self.clock.wait_for(last)
        self._settle()
        seconds = {part: self._seconds[part] for part in PARTS}
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        return seconds

    def begin(self, part: str) -> None:
        """Enter a part."""
        self._inside.append(PAUSED if self._inside[-1] == PAUSED else part)
        self._mark()

    def end(self) -> None:
        """Leave the part entered last."""
        self._inside.pop()
        self._mark()

    def _mark(self) -> None:
        self._unread.append((self.clock.mark(), self._inside[-1]))
        if len(self._unread) >= MAX_UNREAD:
            self._settle()

    def _settle(self) -> None:
        """Add up what lies before the newest mark that has come."""
        num_done = 0
        for (start, part), (end, _) in zip(self._unread, self._unread[1:], strict=False):
            if not self.clock.has_come(end):
                break
            self._seconds[part] += self.clock.seconds_between(start, end)
            self.clock.give_back(start)
            num_done += 1
        del self._unread[:num_done]


class _Switch:
    """Enters and leaves a part, as a context or as a timer of Megatron's; its barriers are not made."""

    def __init__(self, timer: StepTimer[Any], part: str) -> None:
        self.timer = timer
        self.part = part

    def start(self, barrier: bool = False) -> None:
        self.timer.begin(self.part)

    def stop(self, barrier: bool = False) -> None:
        self.timer.end()

    def __enter__(self) -> None:
        self.timer.begin(self.part)

    def __exit__(self, *unused: object) -> None:
        self.timer.end()


class _NoSwitch:
    """A timer that Megatron keeps and nobody reads."""

    def start(self, barrier: bool = False) -> None:
        """Do nothing."""

    def stop(self, barrier: bool = False) -> None:
        """Do nothing."""


_NO_SWITCH = _NoSwitch()


def start_timer(device: torch.device) -> StepTimer[Any]:
    """The timer of a model on this device, its first part `other`."""
    return StepTimer(CudaClock()) if device.type == "cuda" else StepTimer(HostClock())


def as_fractions(seconds: dict[str, float]) -> dict[str, float]:
    """What `StepTimer.read` gives, as shares of the time that passed, under the names of metrics.jsonl.

    >>> as_fractions({"data_wait": 1.0, "forward": 3.0, "other": 4.0})
    {'data_wait_fraction': 0.125, 'forward_fraction': 0.375}
    """
    total = sum(seconds.values()) or 1.0
    return {f"{part}_fraction": value / total for part, value in seconds.items() if part != "other"}
