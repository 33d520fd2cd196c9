"""Pretrain as the recipe does, note what it trains on, and stop it with a signal at a chosen moment.

`run_recipe.py RECORD MOMENT ARGUMENT ...`: RECORD is `-` or a file (this process's rank is added to its name) for one
JSON line a training batch with its cells and digests of their tokens and labels. MOMENT is `-` or `SIGNAL@WHERE`:

    KILL@25+0.01          0.01 s after the line of step 25 stands in metrics.jsonl, wherever the process is by then
    KILL@save 30+0.01     0.01 s after the checkpoint of step 30 was begun
    KILL@finish 30        the shards of step 30 are written, the manifest is not
    KILL@latest 30        the checkpoint of step 30 is complete, `latest` does not name it
    RAISE@12              no signal: the last rank fails to read its cells after the line of step 12

KILL hits every rank at once, any other signal only the last one: the others must hear of it.
"""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from celltron.cells import Batch
from celltron.core import InputError, run_command
from celltron.recipes import geneformer_pretrain
from celltron.train import checkpoint
from celltron.train.metrics import MetricsWriter

RANK = int(os.environ.get("RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
SECONDS_UNTIL_TOO_LATE = 30


def record_batches(path: Path) -> None:
    """Have every training batch noted that the recipe takes a step with."""
    take = geneformer_pretrain.TrainStream.__next__

    def record(stream: Any) -> Any:
        step_batch = take(stream)
        with path.with_name(f"{path.name}.{RANK}").open("a") as file:
            file.write(json.dumps(describe(stream.made.batch)) + "\n")
        return step_batch

    geneformer_pretrain.TrainStream.__next__ = record


def describe(batch: Batch) -> dict[str, list[Any]]:
    ends = np.cumsum(batch.lengths)
    tokens, labels = (np.split(array, ends[:-1]) for array in (batch.tokens, batch.labels))
    return {
        "cells": batch.cells.tolist(),
        "epochs": batch.epochs.tolist(),
        "tokens": [digest(array) for array in tokens],
        "labels": [digest(array) for array in labels],
    }


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, dtype="<i4").tobytes()).hexdigest()


def stop_at(moment: str) -> None:
    """Arrange for the signal."""
    name, _, where = moment.partition("@")
    if name == "RAISE":
        call_at(MetricsWriter, "write", lambda writer, record: record["step"] == int(where), after=fail_to_read)
        return
    where, _, delay = where.partition("+")
    number = signal.Signals[f"SIG{name}"]

    def strike() -> None:
        if number == signal.SIGKILL and WORLD_SIZE > 1:
            os.killpg(0, number)
        elif RANK == WORLD_SIZE - 1:
            os.kill(os.getpid(), number)

    def strike_soon() -> None:
        threading.Timer(float(delay or 0), strike).start()

    if where.isdigit():
        call_at(MetricsWriter, "write", lambda writer, record: record["step"] == int(where), after=strike_soon)
    elif where.startswith("save"):
        step = int(where.removeprefix("save "))
        call_at(checkpoint.Checkpoints, "begin", lambda saver, state, *rest: state.step == step, before=strike_soon)
    else:
        function, step = {"finish": "finish_artefact", "latest": "write_atomically"}[where.split()[0]], where.split()[1]
        call_at(checkpoint, function, lambda *words, **more: step in str(words), before=strike)


def fail_to_read() -> None:
    """Have the next training batch of the last rank raise."""

    def fail(stream: Any) -> Any:
        raise InputError("shard 3 of a.store cannot be read; restore it")

    if RANK == WORLD_SIZE - 1:
        geneformer_pretrain.TrainStream.__next__ = fail


def call_at(
    owner: Any,
    name: str,
    is_moment: Callable[..., bool],
    *,
    before: Callable[[], None] = lambda: None,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Have something called before or after the call of a function that meets a condition."""
    function = getattr(owner, name)

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        is_now = is_moment(*arguments, **keywords)
        if is_now:
            before()
        result = function(*arguments, **keywords)
        if is_now:
            after()
        return result

    setattr(owner, name, wrapped)


def main() -> int:
    """Run the recipe; a run that was to be killed waits for it."""
    record, moment, *arguments = sys.argv[1:]
    if record != "-":
        record_batches(Path(record))
    if moment != "-":
        stop_at(moment)
    code = run_command(geneformer_pretrain.main, arguments)
    if moment.startswith("KILL"):
        time.sleep(SECONDS_UNTIL_TOO_LATE)
    return code


if __name__ == "__main__":
    sys.exit(main())
