"""Steps of celltron's training loop over the same cells, timed, for benchmarks; on one process or on several."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from celltron.cells import Batch
from celltron.cells.sampler import rank_part
from celltron.recipes.geneformer_pretrain import Config, forward_step, make_model
from celltron.recipes.shared.pretrain_batches import MadeAhead, prepare_step_batch, put_step_batch
from celltron.train.count_bytes import CountBytes
from celltron.train.loop import Job, StepBatch, fit
from celltron.train.metrics import MetricsWriter
from celltron.train.parallel import data_parallel_place

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel

    from celltron.train.checkpoint import Checkpoints


@dataclass(frozen=True, slots=True)
class Steps:
    """What was measured."""

    seconds: list[float]
    """Of each step but the first, on this process."""
    bytes: CountBytes
    """Of one more step, which is not timed; empty where none was asked for."""
    model: "DistributedDataParallel"
    """This process's part, trained."""
    batch: StepBatch
    """This process's part of every step."""


class _Repeated:
    """The same cells at every step, as micro-batches made anew; notes when it is asked, and counts the last step."""

    def __init__(self, make: Callable[[], StepBatch], *, counted_step: int | None) -> None:
        self.make = make
        self.counted_step = counted_step
        self.bytes = CountBytes()
        self.counting = ExitStack()
        self.times: list[float] = []

    def __next__(self) -> StepBatch:
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        if len(self.times) == self.counted_step:
            self.counting.enter_context(self.bytes)
        self.batch = self.make()
        return self.batch

    def end(self) -> Iterator[StepBatch]:
        """Called after the last step, as validation, of which there is none."""
        self.counting.close()
        if self.counted_step is None:
            torch.cuda.synchronize()
            self.times.append(time.perf_counter())
        return iter(())

    def state(self) -> dict[str, int]:
        """Nothing is resumed."""
        return {}

    def cells(self) -> list[int]:
        """Nobody asks."""
        return []


def fit_steps(
    config: Config,
    batch: Batch,
    *,
    num_tokens: int,
    pad_id: int,
    count_bytes: bool = False,
    checkpoints: "Checkpoints | None" = None,
) -> Steps:
    """Train on a global batch for `config.loop.max_steps` steps, the last of which is counted where that is asked for.

    A step is everything: the batch is taken, run forward and backward, and AdamW updates the parameters; meanwhile a
    thread makes the next one, as in a run. Process group and layout must have been started.

    Args:
        config: The run; it must not validate before the end.
        batch: The global batch, of which this process takes its part.
        num_tokens: The vocabulary's size.
        pad_id: The vocabulary's id of padding.
        count_bytes: Whether the last step is counted instead of timed.
        checkpoints: Where the run saves; None saves nothing. The one at the end is not timed.
    """
    device = torch.device(torch.cuda.current_device())
    wrapped, optimizer = make_model(config, num_tokens=num_tokens)
    own = batch.take(np.arange(len(batch))[rank_part(len(batch), *data_parallel_place())])
    corpus: Any = SimpleNamespace(tokenizer=SimpleNamespace(vocabulary=SimpleNamespace(pad_id=pad_id)))
    ahead = MadeAhead(lambda: prepare_step_batch(config, corpus, own, device))
    stream = _Repeated(
        lambda: put_step_batch(config, corpus, ahead.take(), device),
        counted_step=config.loop.max_steps if count_bytes else None,
    )
    calls = ("begin", "poll", "wait", "close")
    nowhere: Any = SimpleNamespace(**dict.fromkeys(calls, lambda *unused: None))
    with TemporaryDirectory() as folder:
        job = Job(
            model=wrapped,
            optimizer=optimizer,
            weight_decay=config.optimizer.weight_decay,
            schedule=config.schedule,
            forward_step=forward_step,
            train=stream,
            validation=stream.end,
            checkpoints=checkpoints or nowhere,
            metrics=MetricsWriter(Path(folder), is_main=False, first_step=1),
        )
        fit(config.loop, job)
    return Steps(np.diff(stream.times).tolist()[1:], stream.bytes, wrapped, stream.batch)
