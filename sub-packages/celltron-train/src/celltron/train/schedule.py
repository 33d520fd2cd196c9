"""The learning rate as a function of the step."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Linear warm-up, then a decay to a floor, then the floor."""

    learning_rate: float = 1e-3
    """The highest learning rate, reached at the end of the warm-up."""
    minimum_learning_rate: float = 0.0
    """What the decay ends at."""
    warmup_steps: int = 0
    """Steps from 0 to the highest learning rate."""
    hold_steps: int = 0
    """Steps at the end of the run at the minimum learning rate; the decay ends before them."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up; constant does not fall."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"schedule.learning_rate is {self.learning_rate}, but must be above 0")
        if not 0 <= self.minimum_learning_rate <= self.learning_rate:
            raise ValueError(
                f"schedule.minimum_learning_rate is {self.minimum_learning_rate}, but must lie between 0 and "
                f"schedule.learning_rate ({self.learning_rate})"
            )
        if self.decay == "constant" and (self.hold_steps or self.minimum_learning_rate):
            raise ValueError(
                "schedule.decay is constant, so schedule.hold_steps and schedule.minimum_learning_rate mean nothing; "
                "leave them out, or choose cosine or linear"
            )
        for name in ("warmup_steps", "hold_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"schedule.{name} is {getattr(self, name)}, but must not be negative")

    def check_length(self, max_steps: int) -> None:
        """Raise ValueError where warm-up and hold do not fit into a run of `max_steps`."""
        if self.warmup_steps + self.hold_steps > max_steps:
            raise ValueError(
                f"schedule.warmup_steps {self.warmup_steps} + schedule.hold_steps {self.hold_steps} is more than "
                f"loop.max_steps ({max_steps}); lower them or train longer"
            )


def learning_rate(config: ScheduleConfig, step: int, max_steps: int) -> float:
    """Learning rate of step `step` (the first is 1) of `max_steps`."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.decay == "constant":
        return config.learning_rate
    decay_steps = max_steps - config.hold_steps - config.warmup_steps
    # The first step of the decay has the highest rate, and the last one not yet the lowest, which might be 0.
    done = min(1.0, (step - 1 - config.warmup_steps) / decay_steps) if decay_steps > 0 else 1.0
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if config.decay == "cosine" else 1.0 - done
    return config.minimum_learning_rate + (config.learning_rate - config.minimum_learning_rate) * left
