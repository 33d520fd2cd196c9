"""How much a run did, and how fast, between two lines of metrics."""

from typing import Any

import torch

from celltron.train.peak import read_memory
from celltron.train.step_timer import StepTimer, as_fractions


class Meter:
    """Adds up steps until it is read.

    Args:
        timer: Knows where the time went; what it calls paused is no training.
        peak_flops: Floating-point operations a second that all processes' devices reach together; 0 if it is not known.
    """

    def __init__(self, timer: StepTimer[Any], peak_flops: float) -> None:
        self.timer = timer
        self.peak_flops = peak_flops
        self._start_over()

    def _start_over(self) -> None:
        self.steps = 0
        self.cells = self.tokens = self.places = self.flops = 0.0

    def count(self, *, cells: float, tokens: float, places: float, flops: float) -> None:
        """Add a step of the whole run."""
        self.steps += 1
        self.cells += cells
        self.tokens += tokens
        self.places += places
        self.flops += flops

    def read(self, *, steps_left: int) -> dict[str, float]:
        """Rates and shares under the names of metrics.jsonl, then start over; waits for the device."""
        parts = self.timer.read()
        seconds = sum(parts.values())
        record = {
            "real_tokens_per_second": self.tokens / seconds,
            "cells_per_second": self.cells / seconds,
            "real_token_fraction": self.tokens / max(1.0, self.places),
            **as_fractions(parts),
            "memory_bytes": read_memory(torch.device(torch.cuda.current_device())),
            "seconds_left": steps_left * seconds / self.steps,
        }
        if self.flops:
            record["flops_per_real_token"] = self.flops / self.tokens
            record["flops_per_second"] = self.flops / seconds
            if self.peak_flops:
                record["model_flops_utilization"] = self.flops / seconds / self.peak_flops
        self._start_over()
        return record
