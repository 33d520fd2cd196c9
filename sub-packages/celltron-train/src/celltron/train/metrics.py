"""What a run says of itself: one JSON line a logged step in `metrics.jsonl`, and a line on the terminal."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from celltron.core import describe_seconds, write_atomically

METRICS_NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends records to `metrics.jsonl` and prints them; on other processes than the main one it does nothing.

    Args:
        folder: The run's folder.
        is_main: Whether this process speaks for the run.
        first_step: The step that the run starts or continues with: records from it on, left by a run that went
            further than the checkpoint it is continued from, are dropped.
    """

    def __init__(self, folder: Path, *, is_main: bool, first_step: int) -> None:
        self.path = folder / METRICS_NAME
        self.is_main = is_main
        if is_main and self.path.exists():
            write_atomically(self.path, "".join(_lines_before(self.path, first_step)))

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record and print it."""
        self.note(record, describe(record))

    def note(self, record: Mapping[str, Any], text: str) -> None:
        """Append one record and print a text on it."""
        if not self.is_main:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(record)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.say(text)

    def say(self, text: str) -> None:
        """Print a line from the main process."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)


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


def describe(record: Mapping[str, Any]) -> str:
    """One short line for people."""
    if "validation_loss" in record:
        text = f"step {record['step']:>7,}  validation loss {record['validation_loss']:.4f}"
        if "unigram_loss" in record:
            text += (
                f"  (unigram {record['unigram_loss']:.4f}: "
                f"{record['unigram_loss'] - record['validation_loss']:+.4f} nats better)"
            )
        return text
    loss, grad_norm = ("nan" if value is None else f"{value:.4f}" for value in (record["loss"], record["grad_norm"]))
    text = (
        f"step {record['step']:>7,}  loss {loss}  lr {record['learning_rate']:.2e}  "
        f"grad norm {grad_norm}  {record['real_tokens_per_second']:,.0f} tokens/s  "
        f"{record['cells_per_second']:,.1f} cells/s  {record['real_token_fraction']:.0%} real  "
        f"{record['data_wait_fraction']:.1%} waiting"
    )
    left = record.get("seconds_left")
    return text if left is None else f"{text}  {describe_seconds(left)} left"
