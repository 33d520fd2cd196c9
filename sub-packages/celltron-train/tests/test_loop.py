"""The loop on a small regression. Axes: M places, D width of the input, E of the output."""

import json
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch.nn.functional import layer_norm, linear

from celltron.core import InputError
from celltron.train.checkpoint import Checkpoints, RunState, load_training, read_run_state
from celltron.train.launch import Launch
from celltron.train.loop import Job, LossFunction, StepBatch, fit
from celltron.train.loop_config import LoopConfig
from celltron.train.metrics import MetricsWriter
from celltron.train.optimizer import OptimizerConfig, wrap_model
from celltron.train.schedule import ScheduleConfig
from celltron.train.spike import SpikeState
from celltron.train.step_timer import PARTS

MicroBatch = tuple[torch.Tensor, torch.Tensor]
# Of every line of metrics.jsonl, which others read by these names: new keys may be added, none renamed.
KEYS = {
    "step",
    "loss",
    "learning_rate",
    "grad_norm",
    "real_tokens_per_second",
    "cells_per_second",
    "real_token_fraction",
    "data_wait_fraction",
}
CONFIG = LoopConfig(max_steps=4, global_batch_size=4, micro_batch_size=2, log_every=1)


def forward_step(micro_batch: MicroBatch, model: torch.nn.Module) -> tuple[torch.Tensor, LossFunction]:
    x_MD, y_ME = micro_batch

    def sum_and_count(output_ME: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (output_ME - y_ME).square().sum(), torch.tensor(len(y_ME), dtype=torch.int32)

    return model(x_MD), sum_and_count


def make_batch(number: int, sizes: tuple[int, ...] = (3, 5)) -> StepBatch:
    generator = torch.Generator().manual_seed(number)
    micro_batches = [
        tuple(torch.randn(size, width, generator=generator, dtype=torch.float64) for width in (4, 3)) for size in sizes
    ]
    return StepBatch(micro_batches=micro_batches, num_cells=4, num_tokens=30, num_places=40, flops=1000.0)


@dataclass
class Stream:
    """Batches 1, 2, ...; calls what is asked for before it hands one out."""

    before: dict[int, Callable[[], object]] = field(default_factory=dict)
    number: int = 0
    handed_out: list[StepBatch] = field(default_factory=list)

    def __next__(self) -> StepBatch:
        self.number += 1
        self.before.get(self.number, lambda: None)()
        self.handed_out.append(make_batch(self.number))
        return self.handed_out[-1]

    def state(self) -> dict[str, int]:
        return {"number": self.number}

    def cells(self) -> list[int]:
        return [10 * self.number + place for place in range(4)]


class CheckpointsInMemory(Checkpoints):
    """Notes what would be saved."""

    def __init__(self) -> None:
        self.states: list[RunState] = []

    def begin(self, state: RunState, model: Any, optimizer: Any) -> None:
        self.states.append(state)

    def poll(self) -> None:
        """Complete at once."""

    def wait(self) -> Path | None:
        return Path(f"step {self.states[-1].step}") if self.states else None

    def close(self) -> None:
        """Nothing is open."""


def state_after(step: int) -> RunState:
    return RunState(step=step, seed=0, loader={"number": step}, distributed_optimizer=False, dtype="float64")


def validation() -> Iterator[StepBatch]:
    """Two batches, and one of which this process has no part."""
    yield make_batch(1001)
    yield make_batch(1002, sizes=(1,))
    yield StepBatch(micro_batches=(), num_cells=0, num_tokens=0, num_places=0)


@pytest.fixture
def make_job(make_model: Callable[..., Any], tmp_path: Path) -> Callable[..., Job]:
    def make(**changes: Any) -> Job:
        model, optimizer = wrap_model(
            make_model(), OptimizerConfig(), dtype=torch.float64, distributed_optimizer=False
        )
        job = Job(
            model=model,
            optimizer=optimizer,
            weight_decay=0.01,
            schedule=ScheduleConfig(learning_rate=0.05, warmup_steps=2),
            forward_step=forward_step,
            train=Stream(),
            validation=validation,
            checkpoints=CheckpointsInMemory(),
            metrics=MetricsWriter(tmp_path, is_main=True, first_step=1),
        )
        return replace(job, **changes)

    return make


def read(job: Job, key: str) -> list[dict[str, float]]:
    """The records with a key."""
    records = [json.loads(line) for line in job.metrics.path.read_text().splitlines()]
    return [record for record in records if key in record]


def parameters_of(job: Job) -> list[float]:
    return torch.cat([parameter.detach().flatten() for parameter in job.model.parameters()]).tolist()


def mean_loss(job: Job, batches: list[StepBatch]) -> float:
    """Sum over count, by hand."""
    model = job.model.module
    loss = count = 0.0
    for batch in batches:
        for x_MD, y_ME in batch.micro_batches:
            normed_MD = layer_norm(x_MD, (4,), model.norm.weight, model.norm.bias)
            output_ME = linear(normed_MD, model.linear.weight, model.linear.bias)
            loss, count = loss + float((output_ME - y_ME).detach().square().sum()), count + len(y_ME)
    return loss / count


def test_records_have_the_keys_of_the_design(make_job: Callable[..., Job]) -> None:
    job = make_job(validation_facts={"unigram_loss": 2.5})
    fit(CONFIG, job)
    records = read(job, "loss")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(record.keys() >= KEYS for record in records)
    (record,) = read(job, "validation_loss")
    assert record.keys() == {"step", "validation_loss", "unigram_loss"}
    assert (record["step"], record["unigram_loss"]) == (4, 2.5)


def test_the_loss_is_divided_once_by_the_whole_count(make_job: Callable[..., Job]) -> None:
    job = make_job()
    expected = mean_loss(job, [make_batch(1)])
    fit(CONFIG, job)
    assert read(job, "loss")[0]["loss"] == pytest.approx(expected, rel=1e-12)


def test_steps_are_those_of_adamw(make_job: Callable[..., Job], make_model: Callable[..., Any]) -> None:
    job, model = make_job(), make_model()
    fit(CONFIG, job)
    groups = [
        {"params": [parameter for parameter in model.parameters() if parameter.dim() > 1], "weight_decay": 0.01},
        {"params": [parameter for parameter in model.parameters() if parameter.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    norms = []
    for step, record in enumerate(read(job, "loss"), start=1):
        optimizer.zero_grad()
        micro_batches = make_batch(step).micro_batches
        total = sum((model(x_MD) - y_ME).square().sum() for x_MD, y_ME in micro_batches)
        (total / sum(len(y_ME) for _, y_ME in micro_batches)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = record["learning_rate"]
        optimizer.step()
    assert [record["grad_norm"] for record in read(job, "loss")] == pytest.approx(norms, rel=1e-6)
    assert max(norms) > 1.0
    # Megatron clips by a float32 norm.
    expected = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert parameters_of(job) == pytest.approx(expected.tolist(), abs=1e-6)


def test_the_learning_rate_is_that_of_the_schedule(make_job: Callable[..., Job]) -> None:
    job = make_job()
    fit(CONFIG, job)
    assert [record["learning_rate"] for record in read(job, "loss")] == pytest.approx([0.025, 0.05, 0.05, 0.025])


def test_throughput_counts_what_the_batches_say(make_job: Callable[..., Job]) -> None:
    job = make_job(train=Stream({4: lambda: time.sleep(0.3)}))
    fit(replace(CONFIG, log_every=2), job)
    first, second = read(job, "loss")
    assert (first["step"], second["step"]) == (2, 4)
    assert first["real_token_fraction"] == pytest.approx(0.75)
    assert first["real_tokens_per_second"] / first["cells_per_second"] == pytest.approx(30 / 4)
    # Two steps of four cells each.
    seconds = [8 / record["cells_per_second"] for record in (first, second)]
    waited = [record["data_wait_fraction"] * time for record, time in zip((first, second), seconds, strict=True)]
    assert 0.0 <= waited[0] < 0.3 <= waited[1] < seconds[1]
    assert first["seconds_left"] == pytest.approx(seconds[0])
    assert second["seconds_left"] == 0.0


def test_the_first_context_parallel_process_counts_the_cells_and_each_its_loss(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job()
    expected = mean_loss(job, [make_batch(1)])
    monkeypatch.setattr(parallel_state, "get_context_parallel_rank", lambda: 1)
    fit(CONFIG, job)
    records = read(job, "loss")
    assert records[0]["loss"] == pytest.approx(expected, rel=1e-12)
    for record in records:
        assert record["cells_per_second"] == record["real_tokens_per_second"] == record["real_token_fraction"] == 0.0
        assert "flops_per_second" not in record


def test_validation_and_saving_do_not_count_as_training(make_job: Callable[..., Job]) -> None:
    def slow_validation() -> Iterator[StepBatch]:
        time.sleep(0.5)
        yield from validation()

    job = make_job(validation=slow_validation)
    start = time.perf_counter()
    fit(replace(CONFIG, validate_every=1, log_every=4), job)
    elapsed_seconds = time.perf_counter() - start
    (record,) = read(job, "loss")
    # Four steps of four cells, and three validations before the line, one after it.
    assert 16 / record["cells_per_second"] < elapsed_seconds - 4 * 0.5


def test_the_validation_loss_is_sum_over_count_and_changes_nothing(make_job: Callable[..., Job]) -> None:
    often, once = make_job(), make_job()
    returned = fit(replace(CONFIG, validate_every=2), often)
    records = read(often, "validation_loss")
    assert [record["step"] for record in records] == [2, 4]
    batches = [make_batch(1001), make_batch(1002, sizes=(1,))]
    assert records[-1]["validation_loss"] == returned == pytest.approx(mean_loss(often, batches), rel=1e-12)
    fit(CONFIG, once)
    assert parameters_of(once) == parameters_of(often)


def test_without_validation_places_the_loss_is_zero(make_job: Callable[..., Job]) -> None:
    assert fit(CONFIG, make_job(validation=lambda: [])) == 0.0


def test_the_last_step_is_saved(make_job: Callable[..., Job]) -> None:
    job = make_job()
    validation_loss = fit(CONFIG, job)
    spike = SpikeState(losses=tuple(record["loss"] for record in read(job, "loss")))
    assert job.checkpoints.states == [replace(state_after(4), validation_loss=validation_loss, spike=spike)]
    job = make_job()
    fit(replace(CONFIG, save_every=3), job)
    assert [state.step for state in job.checkpoints.states] == [3, 4]
    assert [state.loader for state in job.checkpoints.states] == [{"number": 3}, {"number": 4}]
    assert [state.validation_loss is None for state in job.checkpoints.states] == [True, False]


class SlowCheckpoints(CheckpointsInMemory):
    """A checkpoint is complete, or cannot be written, two steps after it was begun."""

    def __init__(self, failure: Exception | None = None) -> None:
        super().__init__()
        self.failure = failure
        self.polls: list[int] = []
        self.is_closed = False

    def poll(self) -> Path | None:
        if not self.states:
            return None
        self.polls.append(self.states[-1].step)
        if self.polls.count(self.states[-1].step) != 2:
            return None
        if self.failure:
            raise self.failure
        return Path(f"step_{self.states[-1].step}")

    def close(self) -> None:
        self.is_closed = True


def test_training_goes_on_while_a_checkpoint_is_written(
    make_job: Callable[..., Job], capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(checkpoints=SlowCheckpoints())
    fit(replace(CONFIG, max_steps=6, save_every=3), job)
    assert job.checkpoints.polls == [3, 3, 3]
    lines = capsys.readouterr().err.splitlines()
    place = lines.index("saved step_3")
    assert lines[place - 1].startswith("step       5") and lines[place + 1].startswith("step       6")
    assert job.checkpoints.is_closed


def test_a_checkpoint_that_cannot_be_written_ends_the_run(make_job: Callable[..., Job]) -> None:
    job = make_job(checkpoints=SlowCheckpoints(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        fit(replace(CONFIG, max_steps=9, save_every=3), job)
    assert [record["step"] for record in read(job, "loss")] == [1, 2, 3, 4, 5]
    assert job.checkpoints.is_closed


def multiply_targets(factor: float, *, batches: set[int]) -> Callable[..., tuple[torch.Tensor, LossFunction]]:
    """A forward step whose loss is far higher in those batches."""
    inputs = [x_MD for number in batches for x_MD, _ in make_batch(number).micro_batches]

    def forward(micro_batch: MicroBatch, model: torch.nn.Module) -> tuple[torch.Tensor, LossFunction]:
        x_MD, y_ME = micro_batch
        is_meant = any(torch.equal(x_MD, meant) for meant in inputs)
        return forward_step((x_MD, y_ME * factor if is_meant else y_ME), model)

    return forward


def test_a_loss_far_above_those_before_is_noted(make_job: Callable[..., Job]) -> None:
    job = make_job(forward_step=multiply_targets(40.0, batches={25}))
    fit(replace(CONFIG, max_steps=30), job)
    (note,) = read(job, "note")
    assert (note["step"], note["note"], note["cells"]) == (25, "loss spike", [250, 251, 252, 253])
    assert note["spike_loss"] == read(job, "loss")[24]["loss"] > 10 * note["median_loss"]


def test_time_and_arithmetic_are_accounted_for(make_job: Callable[..., Job]) -> None:
    job = make_job(peak_flops=2e9)
    fit(CONFIG, job)
    for record in read(job, "loss"):
        parts = [record[f"{part}_fraction"] for part in PARTS if part != "other"]
        assert all(0.0 <= part < 1.0 for part in parts) and sum(parts) < 1.0
        assert min(parts[1], parts[2], parts[4]) > 0.0
        # Four cells a step, of 1000 operations in all.
        assert record["flops_per_second"] == pytest.approx(record["cells_per_second"] * 250)
        assert record["flops_per_real_token"] == pytest.approx(1000 / 30)
        assert record["model_flops_utilization"] == pytest.approx(record["flops_per_second"] / 2e9)
        assert record["memory_bytes"] > 1e7


def test_a_run_goes_on_where_it_is_told(make_job: Callable[..., Job]) -> None:
    job = make_job()
    fit(CONFIG, job, resumed=state_after(2))
    assert [record["step"] for record in read(job, "loss")] == [3, 4]
    assert job.train.number == 2


def test_no_steps_left_is_said(make_job: Callable[..., Job]) -> None:
    job = make_job()
    with pytest.raises(InputError, match="step 4 of loop.max_steps 4 is done already"):
        fit(CONFIG, job, resumed=state_after(4))
    assert job.train.number == 0 and job.checkpoints.states == []


def test_a_resumed_run_is_the_run_that_was_not_interrupted(make_job: Callable[..., Job], tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", launch=Launch())
    whole = make_job(checkpoints=checkpoints)
    fit(replace(CONFIG, save_every=2), whole)
    losses = tuple(record["loss"] for record in read(whole, "loss"))
    resumed = make_job(train=Stream(number=2), metrics=MetricsWriter(tmp_path, is_main=False, first_step=3))
    load_training(checkpoints.path(2), resumed.model, resumed.optimizer)
    fit(CONFIG, resumed, resumed=read_run_state(checkpoints.path(2)))
    assert parameters_of(resumed) == parameters_of(whole)
    assert [read_run_state(checkpoints.path(step)).spike.losses for step in (2, 4)] == [losses[:2], losses]


def test_a_resumed_run_notes_the_same_spikes(make_job: Callable[..., Job], tmp_path: Path) -> None:
    """Also where a checkpoint lies within a spike that lasts, of which the first step alone is noted."""
    forward = multiply_targets(40.0, batches={25, 26, 29})
    checkpoints = Checkpoints(tmp_path / "checkpoints", launch=Launch())
    config = replace(CONFIG, max_steps=30, save_every=5)
    whole = make_job(forward_step=forward, checkpoints=checkpoints)
    fit(config, whole)
    notes = read(whole, "note")
    assert [note["step"] for note in notes] == [25, 29]
    for step, num_left in ((20, 2), (25, 1)):
        folder = tmp_path / f"from {step}"
        folder.mkdir()
        metrics = MetricsWriter(folder, is_main=True, first_step=step + 1)
        resumed = make_job(forward_step=forward, train=Stream(number=step), metrics=metrics)
        load_training(checkpoints.path(step), resumed.model, resumed.optimizer)
        fit(config, resumed, resumed=read_run_state(checkpoints.path(step)))
        assert read(resumed, "note") == notes[-num_left:]


def test_steps_skipped_before_an_interruption_count(make_job: Callable[..., Job]) -> None:
    forward = spoil("loss", math.nan, batches={3, 4, 5})
    config = replace(CONFIG, max_steps=6, max_skipped_steps=2)
    job = make_job(forward_step=forward)
    fit(replace(config, max_steps=4), job)
    (state,) = job.checkpoints.states
    assert state.skipped_in_a_row == 2
    with pytest.raises(InputError, match=r"in step 5, the 3\. skipped step in a row"):
        fit(config, make_job(forward_step=forward, train=Stream(number=4)), resumed=state)


class SpoiltGradient(torch.autograd.Function):
    """The identity, but for its gradient, which is multiplied."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor, factor: float) -> torch.Tensor:
        context.factor = factor
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * context.factor, None


def spoil(what: str, value: float, *, batches: set[int]) -> Callable[..., tuple[torch.Tensor, LossFunction]]:
    """A forward step whose loss or gradient is no finite number in the second micro-batch of those batches."""
    inputs = [make_batch(number).micro_batches[1][0] for number in batches]

    def forward(micro_batch: MicroBatch, model: torch.nn.Module) -> tuple[torch.Tensor, LossFunction]:
        output, loss_function = forward_step(micro_batch, model)
        factor = value if any(torch.equal(micro_batch[0], spoilt) for spoilt in inputs) else 1.0
        return (output * factor if what == "loss" else SpoiltGradient.apply(output, factor)), loss_function

    return forward


@pytest.mark.parametrize(
    ("what", "value", "reason"),
    [
        ("loss", math.nan, "the loss is nan"),
        ("loss", math.inf, "the loss is inf"),
        ("gradient", math.nan, "the gradient norm is nan"),
        ("gradient", math.inf, "the gradient norm is (nan|inf)"),
    ],
)
def test_a_step_that_is_no_number_is_skipped(
    make_job: Callable[..., Job], what: str, value: float, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = make_job(forward_step=spoil(what, value, batches={3}))
    fit(replace(CONFIG, save_every=1), spoilt)
    (note,) = read(spoilt, "note")
    assert re.fullmatch(f"skipped, since {reason}", note["note"])
    assert (note["step"], note["cells"]) == (3, [30, 31, 32, 33])
    records = read(spoilt, "loss")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [record["grad_norm"] is None for record in records] == [False, False, True, False]
    assert (records[2]["loss"] is None) == (what == "loss")
    printed = capsys.readouterr().err
    assert re.search(r"step       3  note: skipped, since the .*; skipped in a row 1, cells 30, 31, 32, 33\n", printed)
    # Neither parameters nor moments know of it: as if the step had not been.
    without = make_job()
    fit(replace(CONFIG, max_steps=2), without)
    without.train.number = 3
    fit(CONFIG, without, resumed=state_after(3))
    assert parameters_of(spoilt) == parameters_of(without)
    assert [state.step for state in spoilt.checkpoints.states] == [1, 2, 3, 4]


def test_too_many_skipped_steps_in_a_row_end_the_run(make_job: Callable[..., Job]) -> None:
    config = replace(CONFIG, max_steps=8, max_skipped_steps=2)
    scattered = make_job(forward_step=spoil("loss", math.nan, batches={1, 2, 4, 5, 7, 8}))
    fit(config, scattered)
    assert len(read(scattered, "note")) == 6
    scattered.metrics.path.unlink()
    job = make_job(forward_step=spoil("gradient", math.nan, batches={3, 4, 5}))
    with pytest.raises(InputError, match=r"is nan in step 5, the 3\. skipped step in a row \(cells 50, 51"):
        fit(config, job)
    assert [note["step"] for note in read(job, "note")] == [3, 4, 5]
    assert job.checkpoints.states == []


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_and_ends_the_run(
    make_job: Callable[..., Job], number: int, exit_code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(train=Stream({2: lambda: os.kill(os.getpid(), number)}))
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as ended:
        fit(replace(CONFIG, log_every=3, validate_every=2), job)
    assert ended.value.code == exit_code
    assert [state.step for state in job.checkpoints.states] == [2]
    assert job.checkpoints.states[0].loader == {"number": 2}
    # The step is logged though it was not its turn, and nobody waits for a validation.
    assert [record["step"] for record in read(job, "loss")] == [2]
    assert read(job, "validation_loss") == []
    assert "step 2 is saved, continue with --resume auto" in capsys.readouterr().err
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_signal_in_the_last_step_lets_it_end_well(make_job: Callable[..., Job]) -> None:
    job = make_job(train=Stream({4: lambda: os.kill(os.getpid(), signal.SIGTERM)}))
    assert fit(CONFIG, job) > 0.0
    assert [state.step for state in job.checkpoints.states] == [4]
