"""What a run says of itself: one JSON line a logged step in `metrics.jsonl`, a line on the terminal, and more reports.

A record holds `step` and numbers: those of training steps `loss` and others, of validations `validation_loss`; null is
one that is not finite. A record with `note` says in words what happened at a step, and may name its `cells`.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from celltron.core import describe_seconds, tell, write_atomically

METRICS_NAME = "metrics.jsonl"
MAX_SHOWN_CELLS = 8


class Report(Protocol):
    """Shows numbers by step somewhere."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Show the numbers of a step; called several times for some steps, with other names."""

    def close(self) -> None:
        """Show what is not shown yet."""


class MetricsWriter:
    """Appends records to `metrics.jsonl` and prints them; on other processes than the main one it does nothing.

    The numbers go to each of `reports`, too, which `celltron.train.report.open_reports` adds.

    Args:
        folder: The run's folder.
        is_main: Whether this process speaks for the run.
        first_step: The step that the run starts or continues with: records from it on, left by a run that went
            further than the checkpoint it is continued from, are dropped.
    """

    def __init__(self, folder: Path, *, is_main: bool, first_step: int) -> None:
        self.folder = folder
        self.path = folder / METRICS_NAME
        self.is_main = is_main
        self.first_step = first_step
        self.reports: list[Report] = []
        if is_main and self.path.exists():
            write_atomically(self.path, "".join(_lines_before(self.path, first_step)))

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record and print it."""
        if not self.is_main:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(record)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.say(describe(record))
        for report in self.reports:
            report.write(record["step"], numbers_of(record))

    def read(self) -> list[dict[str, Any]]:
        """The records written up to now, those of earlier starts of the run among them."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def close(self) -> None:
        """Close the reports; the run says nothing more."""
        for report in self.reports:
            report.close()
        self.reports.clear()

    def say(self, text: str) -> None:
        """Print a line from the main process."""
        if self.is_main:
            tell(text)


def _lines_before(path: Path, first_step: int) -> list[str]:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            # A line that a kill cut short.
            continue
        if step < first_step:
            kept.append(line)
    return kept


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """What of a record can be drawn as curves over the steps.

    >>> numbers_of({"step": 7, "note": "loss spike", "spike_loss": 9.5, "cells": [3, 14]})
    {'spike_loss': 9.5}
    """
    return {
        name: value
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def describe(record: Mapping[str, Any]) -> str:
    """One short line for people."""
    if "note" in record:
        return f"step {record['step']:>7,}  note: {record['note']}{_describe_details(record)}"
    if "validation_loss" in record:
        loss = _format_loss(record["validation_loss"])
        text = f"step {record['step']:>7,}  validation loss {loss}"
        if "unigram_loss" in record and record["validation_loss"] is not None:
            text += (
                f"  (unigram {record['unigram_loss']:.4f}: "
                f"{record['unigram_loss'] - record['validation_loss']:+.4f} nats better)"
            )
        return text
    loss = _format_loss(record["loss"])
    grad_norm = "no number" if record["grad_norm"] is None else f"{record['grad_norm']:.3f}"
    text = (
        f"step {record['step']:>7,}  loss {loss}  lr {record['learning_rate']:.2e}  "
        f"grad norm {grad_norm}  {record['real_tokens_per_second']:,.0f} tokens/s  "
        f"{record['cells_per_second']:,.1f} cells/s  {record['real_token_fraction']:.0%} real  "
        f"{record['data_wait_fraction']:.1%} waiting"
    )
    if "model_flops_utilization" in record:
        text += f"  {record['model_flops_utilization']:.1%} of peak"
    left = record.get("seconds_left")
    return text if left is None else f"{text}  {describe_seconds(left)} left"


def _format_loss(loss: float | None) -> str:
    return "no number" if loss is None else f"{loss:.4f}"


def _describe_details(record: Mapping[str, Any]) -> str:
    """Numbers of a note, and as many of its cells as a line holds."""
    words = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers_of(record).items()]
    cells = record.get("cells", [])
    if cells:
        more = f" and {len(cells) - MAX_SHOWN_CELLS:,} more" if len(cells) > MAX_SHOWN_CELLS else ""
        words.append(f"cells {', '.join(map(str, cells[:MAX_SHOWN_CELLS]))}{more}")
    return f"; {', '.join(words)}" if words else ""
