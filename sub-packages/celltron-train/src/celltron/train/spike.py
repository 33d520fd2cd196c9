"""Notes steps whose loss is far above those before."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

NORMAL_DEVIATIONS_OF_MAD = 1.4826
"""Standard deviations of a normal distribution in its median absolute deviation (Rousseeuw and Croux 1993)."""
FIRST_STEPS = 20
"""Losses that must be known before one can be judged."""
MAX_WINDOW = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class SpikeConfig:
    """What counts as a spike of the loss; it is noted, and changes nothing in the training."""

    window: int = 100
    """Steps before, with whose losses a step's is compared; 0 notes nothing."""
    deviations: float = 6.0
    """Standard deviations that a spike lies above the median of the window, at least."""
    rise: float = 0.05
    """Share of the median that a spike lies above it, at least: a loss that hardly varies has no spikes else."""

    def __post_init__(self) -> None:
        if self.window and not FIRST_STEPS <= self.window <= MAX_WINDOW:
            raise ValueError(f"spike.window is {self.window}, but must be 0, or from {FIRST_STEPS} to {MAX_WINDOW:,}")
        for name in ("deviations", "rise"):
            if getattr(self, name) < 0:
                raise ValueError(f"spike.{name} is {getattr(self, name)}, but must not be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class SpikeState:
    """What the next loss is judged by; it travels in checkpoints."""

    losses: tuple[float, ...] = ()
    """Those of the window, oldest first."""
    is_high: bool = False
    """Whether the last one was a spike."""

    def __post_init__(self) -> None:
        if len(self.losses) > MAX_WINDOW or not all(map(math.isfinite, self.losses)):
            raise ValueError(f"losses must be finite numbers, and at most {MAX_WINDOW:,}")


@dataclass(frozen=True, slots=True)
class Spike:
    """A step's loss, the median of the losses before, and what it would have had to stay below."""

    loss: float
    median: float
    limit: float

    def record(self, step: int, cells: Sequence[int]) -> dict[str, Any]:
        """The note for `metrics.jsonl`; `cells` are those of the step's batch."""
        return {
            "step": step,
            "note": "loss spike",
            "spike_loss": self.loss,
            "median_loss": self.median,
            "spike_limit": self.limit,
            "cells": [int(cell) for cell in cells],
        }


class SpikeDetector:
    """Compares each step's loss with those of the steps before.

    A loss is a spike where it lies above

        median + max(deviations x 1.4826 MAD, rise x |median|)

    of the last `window` losses, MAD being the median of their distances from the median. Spikes enter the window too,
    so that a loss which stays high becomes the new median; until then only the first of such steps is noted. It is a
    function of the losses alone, which all processes know.

    Args:
        config: What counts as a spike.
        state: That of an earlier detector, to go on from.
    """

    def __init__(self, config: SpikeConfig, state: SpikeState | None = None) -> None:
        state = state or SpikeState()
        self.config = config
        self._window: deque[float] = deque(state.losses, maxlen=config.window)
        self._is_high = state.is_high

    @property
    def state(self) -> SpikeState:
        """What the next loss is judged by."""
        return SpikeState(losses=tuple(self._window), is_high=self._is_high)

    def see(self, loss: float) -> Spike | None:
        """Take the next step's loss; returns what there is to note. A loss that is no number is passed over."""
        if self.config.window == 0 or not math.isfinite(loss):
            return None
        spike = self._judge(loss) if len(self._window) >= FIRST_STEPS else None
        self._window.append(loss)
        is_new = spike is not None and not self._is_high
        self._is_high = spike is not None
        return spike if is_new else None

    def _judge(self, loss: float) -> Spike | None:
        middle = median(self._window)
        deviation = NORMAL_DEVIATIONS_OF_MAD * median(abs(value - middle) for value in self._window)
        limit = middle + max(self.config.deviations * deviation, self.config.rise * abs(middle))
        return Spike(loss, middle, limit) if loss > limit else None
