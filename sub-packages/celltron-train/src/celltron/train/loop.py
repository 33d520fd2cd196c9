"""The training loop. It knows a callable that runs one micro-batch, and no model."""

import math
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from celltron.core import InputError
from celltron.train.checkpoint import Checkpoints, RunState
from celltron.train.engine import whole_parameters
from celltron.train.fully_sharded import DataParallel
from celltron.train.interrupt import Interruption
from celltron.train.loop_config import LoopConfig
from celltron.train.meter import Meter
from celltron.train.metrics import MetricsWriter
from celltron.train.optimizer import set_learning_rate, take_step
from celltron.train.precision import name_dtype
from celltron.train.randomness import seed_step
from celltron.train.schedule import ScheduleConfig, learning_rate
from celltron.train.spike import SpikeConfig, SpikeDetector
from celltron.train.step_timer import PAUSED, HostClock, StepTimer

LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Output of the last stage to (sum of losses, count), both scalars on the model's device."""
ForwardStep = Callable[[Any, torch.nn.Module], tuple[torch.Tensor, LossFunction]]
"""Runs one micro-batch on this process's part of the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatch:
    """This data-parallel rank's part of one global batch."""

    micro_batches: Sequence[Any]
    """What the forward step takes, one by one."""
    num_cells: int
    """Cells in this part."""
    num_tokens: int
    """Real tokens in this part."""
    num_places: int
    """Places computed on, padding included."""
    flops: float = 0.0
    """Floating-point operations of a training step on this part, as the model counts them."""


class BatchStream(Protocol):
    """Training batches without end."""

    def __next__(self) -> StepBatch:
        """The next batch."""

    def state(self) -> dict[str, int]:
        """Where the stream stands after the last batch handed out; the same on every process."""

    def cells(self) -> Sequence[int]:
        """Ids of the last global batch's cells, those of all processes."""


@dataclass(kw_only=True, slots=True)
class Job:
    """Everything that a run is made of, put together by a recipe."""

    model: DataParallel
    optimizer: MegatronOptimizer
    weight_decay: float
    schedule: ScheduleConfig
    forward_step: ForwardStep
    train: BatchStream
    validation: Callable[[], Iterable[StepBatch]]
    """Starts one pass over this process's part of the validation cells."""
    checkpoints: Checkpoints
    metrics: MetricsWriter
    timer: StepTimer[Any] = field(default_factory=lambda: StepTimer(HostClock()))
    peak_flops: float = 0.0
    """Floating-point operations a second of all processes' devices together; 0 if they are not known."""
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    validation_facts: dict[str, float] = field(default_factory=dict)
    """Written beside every validation loss: what it must beat."""


@dataclass(frozen=True, slots=True)
class _Totals:
    """Sums over the whole run's processes."""

    loss: float
    count: float
    cells: float
    tokens: float
    places: float
    flops: float
    interruptions: float


def fit(config: LoopConfig, job: Job, *, resumed: RunState | None = None) -> float:
    """Train to `config.max_steps`; every process calls this.

    A step whose loss or gradient is no finite number changes nothing; its cells are noted.

    Args:
        config: How long, and what to do on the way.
        job: What the run is made of.
        resumed: What the checkpoint says that model, optimizer and batches go on from; None begins with step 1.

    Returns:
        The validation loss in nats at the end.

    Raises:
        InputError: too many steps in a row were skipped so, or there are no steps left.
        SystemExit: after SIGTERM or SIGINT, once a checkpoint of the step that was being taken is written.
    """
    first_step = 1 if resumed is None else resumed.step + 1
    config.check_first_step(first_step)
    job.timer.watch(job.model, job.optimizer)
    job.timer.read()  # what came before is no step's
    run = _Run(config, job, resumed)
    try:
        with Interruption(config.stop_seconds) as interruption:
            for step in range(first_step, config.max_steps + 1):
                run.take_step(step, interruption)
    finally:
        job.checkpoints.close()
    return run.validation_loss


class _Run:
    """What is known from step to step."""

    def __init__(self, config: LoopConfig, job: Job, resumed: RunState | None) -> None:
        self.config = config
        self.job = job
        self.meter = Meter(job.timer, job.peak_flops)
        self.spikes = SpikeDetector(job.spikes, resumed.spike if resumed else None)
        self.skipped_in_a_row = resumed.skipped_in_a_row if resumed else 0
        self.validation_loss = 0.0

    def take_step(self, step: int, interruption: Interruption) -> None:
        """One step, and what is due after it."""
        config, job = self.config, self.job
        with job.timer.part("data_wait"):
            batch = next(job.train)
        totals, grad_norm = _train_step(config, job, batch, step, interruption)
        self.meter.count(cells=totals.cells, tokens=totals.tokens, places=totals.places, flops=totals.flops)
        self._look_at(step, totals.loss, grad_norm)
        is_last = step == config.max_steps
        stop = totals.interruptions > 0 and not is_last
        if step % config.log_every == 0 or is_last or stop:
            self._log(step, totals.loss, grad_norm)
        with job.timer.part(PAUSED):
            self._say_saved(job.checkpoints.poll())
            is_validated = is_last or bool(config.validate_every and step % config.validate_every == 0 and not stop)
            if is_validated:
                with whole_parameters(job.model):
                    self.validation_loss = _validate(job, step)
            if is_last or stop or (config.save_every and step % config.save_every == 0):
                self._save(step, is_validated=is_validated, is_end=is_last or stop)
        if stop:
            job.metrics.say(f"stopped by a signal; step {step:,} is saved, continue with --resume auto")
            raise SystemExit(128 + (interruption.signal_number or signal.SIGTERM))

    def _look_at(self, step: int, loss: float, grad_norm: float) -> None:
        """Note a step that was skipped, or whose loss is far above those before.

        Raises:
            InputError: too many steps in a row were skipped.
        """
        reason = _why_skipped(loss, grad_norm)
        if reason:
            self.skipped_in_a_row += 1
            _note_skipped(self.config, self.job, step, reason, self.skipped_in_a_row)
            return
        self.skipped_in_a_row = 0
        spike = self.spikes.see(loss)
        if spike is not None:
            self.job.metrics.write(spike.record(step, self.job.train.cells()))

    def _log(self, step: int, loss: float, grad_norm: float) -> None:
        rate = learning_rate(self.job.schedule, step, self.config.max_steps)
        record = {"step": step, "loss": _finite(loss), "learning_rate": rate, "grad_norm": _finite(grad_norm)}
        self.job.metrics.write(record | self.meter.read(steps_left=self.config.max_steps - step))

    def _save(self, step: int, *, is_validated: bool, is_end: bool) -> None:
        """Begin a checkpoint, which is written while training goes on; at the end of the run, wait for it."""
        checkpoints = self.job.checkpoints
        state = self._state(step, _finite(self.validation_loss) if is_validated else None)
        with whole_parameters(self.job.model):
            self._say_saved(checkpoints.begin(state, self.job.model, self.job.optimizer))
        if is_end:
            self._say_saved(checkpoints.wait())

    def _state(self, step: int, validation_loss: float | None) -> RunState:
        return RunState(
            step=step,
            seed=self.config.seed,
            loader=self.job.train.state(),
            distributed_optimizer=self.job.model.ddp_config.use_distributed_optimizer,
            dtype=name_dtype(self.job.model.module.config.params_dtype),
            validation_loss=validation_loss,
            spike=self.spikes.state,
            skipped_in_a_row=self.skipped_in_a_row,
        )

    def _say_saved(self, path: Path | None) -> None:
        if path is not None:
            self.job.metrics.say(f"saved {path}")


def _train_step(
    config: LoopConfig, job: Job, batch: StepBatch, step: int, interruption: Interruption
) -> tuple[_Totals, float]:
    seed_step(config.seed, step)
    job.model.train()
    job.model.zero_grad_buffer()
    job.optimizer.zero_grad()
    loss, count = _run_micro_batches(job, batch, forward_only=False)
    set_learning_rate(job.optimizer, learning_rate(job.schedule, step, config.max_steps), job.weight_decay)
    with job.timer.part("communication"):
        totals = _sum_over_run(loss, count, batch, is_interrupted=interruption.signal_number is not None)
    with job.timer.part("optimizer"):
        grad_norm = take_step(job.optimizer) if math.isfinite(totals.loss) else math.nan
    return totals, grad_norm


def _why_skipped(loss: float, grad_norm: float) -> str:
    """What is no finite number; empty where the step was taken."""
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            return f"the {name} is {value}"
    return ""


def _note_skipped(config: LoopConfig, job: Job, step: int, reason: str, skipped_in_a_row: int) -> None:
    cells = [int(cell) for cell in job.train.cells()]
    note = {"step": step, "note": f"skipped, since {reason}", "skipped_in_a_row": skipped_in_a_row, "cells": cells}
    job.metrics.write(note)
    if skipped_in_a_row > config.max_skipped_steps:
        job.checkpoints.wait()  # one that was begun before is still of use
        shown = ", ".join(map(str, cells[:8])) + (", ..." if len(cells) > 8 else "")
        raise InputError(
            f"{reason} in step {step:,}, the {skipped_in_a_row}. skipped step in a row (cells {shown}; all are in "
            f"{job.metrics.path}); continue from the last checkpoint with a lower schedule.learning_rate or a longer "
            "warm-up, or look at those cells"
        )


def _run_micro_batches(job: Job, batch: StepBatch, *, forward_only: bool) -> tuple[float, float]:
    """Run Megatron's schedule; returns this process's sums of loss and count, 0 but on the last stage."""
    if not batch.micro_batches:
        return 0.0, 0.0

    def run_next(micro_batches: Iterator[Any], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        output, loss_function = job.forward_step(next(micro_batches), model)

        def with_report(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            loss, count = loss_function(output)
            return loss, count, torch.stack([loss.detach().double(), count.double()])

        return output, with_report

    reports = get_forward_backward_func()(
        forward_step_func=run_next,
        data_iterator=iter(batch.micro_batches),
        model=[job.model],
        num_microbatches=len(batch.micro_batches),
        # Stages tell each other every micro-batch's true shape.
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    if not reports:
        return 0.0, 0.0
    loss, count = torch.stack(reports).sum(dim=0).tolist()  # syncs the host
    return loss, count


def _sum_over_run(loss: float, count: float, batch: StepBatch, *, is_interrupted: bool) -> _Totals:
    """Sum over data-parallel replicas, each replica's batch counted once; the loss lies in its context's parts."""
    is_tensor_head = parallel_state.get_tensor_model_parallel_rank() == 0
    is_context_head = parallel_state.get_context_parallel_rank() == 0
    of_last_stage = float(is_tensor_head and parallel_state.is_pipeline_last_stage())
    of_first_stage = float(is_tensor_head and is_context_head and parallel_state.is_pipeline_first_stage())
    sums = torch.tensor(
        [
            loss * of_last_stage,
            count * of_last_stage,
            batch.num_cells * of_first_stage,
            batch.num_tokens * of_first_stage,
            batch.num_places * of_first_stage,
            batch.flops * of_first_stage,
            float(is_interrupted),
        ],
        dtype=torch.float64,
        device=torch.cuda.current_device(),
    )
    torch.distributed.all_reduce(sums)
    total_loss, total_count, *rest = sums.tolist()  # syncs the host
    return _Totals(total_loss / total_count if total_count else 0.0, total_count, *rest)


@torch.no_grad()
def _validate(job: Job, step: int) -> float:
    job.model.eval()
    loss = count = 0.0
    empty = StepBatch(micro_batches=(), num_cells=0, num_tokens=0, num_places=0)
    for batch in job.validation():
        batch_loss, batch_count = _run_micro_batches(job, batch, forward_only=True)
        loss, count = loss + batch_loss, count + batch_count
    totals = _sum_over_run(loss, count, empty, is_interrupted=False)
    job.metrics.write({"step": step, "validation_loss": _finite(totals.loss), **job.validation_facts})
    return totals.loss


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
