import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from celltron.core import InputError
from celltron.train import async_save, checkpoint
from celltron.train.checkpoint import Checkpoints, load_model, load_training, save_model
from celltron.train.checkpoint_folder import RunState, read_run_state, verify_checkpoint
from celltron.train.launch import Launch
from celltron.train.optimizer import OptimizerConfig, wrap_model

pytestmark = pytest.mark.usefixtures("engine")
STATE = RunState(
    step=1,
    seed=3,
    loader={"seed": 3, "epoch": 2, "position": 5},
    distributed_optimizer=False,
    dtype="float64",
    validation_loss=0.25,
)
FILES = {"config.yaml": "out: a\n", "vocabulary.json": '{"tokens": ["\u00e4"]}'}
Trained = tuple[Any, Any]
Train = Callable[..., Trained]


def values(wrapped: Any) -> dict[str, list[float]]:
    return {name: parameter.detach().flatten().tolist() for name, parameter in wrapped.module.named_parameters()}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", launch=Launch(), files=FILES)


@pytest.fixture
def saved(checkpoints: Checkpoints, train: Train) -> Path:
    """A checkpoint of step 1."""
    return checkpoints.save(STATE, *train(1))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While it is not set, no tensor is written."""
    is_open = threading.Event()
    write_item = async_save._write_item

    def write_when_open(*arguments: Any) -> Any:
        is_open.wait(timeout=30)
        return write_item(*arguments)

    monkeypatch.setattr(async_save, "_write_item", write_when_open)
    yield is_open
    is_open.set()


def poll_until_complete(checkpoints: Checkpoints) -> Path:
    for _ in range(3000):
        path = checkpoints.poll()
        if path is not None:
            return path
        time.sleep(0.01)
    raise AssertionError("the save does not end")


def list_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_checkpoint_is_complete_and_explains_itself(checkpoints: Checkpoints, saved: Path) -> None:
    assert saved == checkpoints.folder / "step_00000001"
    verify_checkpoint(saved)
    assert read_run_state(saved) == STATE
    assert {name: (saved / name).read_text() for name in FILES} == FILES
    manifest = json.loads((saved / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"], manifest["step"]) == ("celltron-checkpoint", 1, 1)
    assert sorted(manifest["files"]) == [name for name in list_files(saved) if name != "manifest.json"]
    assert (checkpoints.folder / "latest").read_text() == "step_00000001\n"
    assert sorted(os.listdir(checkpoints.folder)) == ["latest", "step_00000001"]


# Megatron writes the distributed optimizer in float32, so float64 runs go on exactly without it only.
@pytest.mark.parametrize(
    ("dtype", "is_distributed"),
    [
        (torch.float64, False),
        (torch.float32, False),
        (torch.float32, True),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
    ],
)
def test_a_loaded_run_goes_on_as_the_saved_one(
    tmp_path: Path, train: Train, take_steps: Any, gate: threading.Event, dtype: torch.dtype, is_distributed: bool
) -> None:
    """Of a second save too, whose plan and memory are the first one's, and though training went on meanwhile."""
    state = replace(STATE, distributed_optimizer=is_distributed, dtype=str(dtype).removeprefix("torch."))
    model, optimizer = train(3, is_distributed=is_distributed, dtype=dtype)
    checkpoints = Checkpoints(tmp_path, launch=Launch())
    gate.set()
    checkpoints.save(state, model, optimizer)
    take_steps(model, optimizer, 2)
    gate.clear()
    assert checkpoints.begin(replace(state, step=2), model, optimizer) is None
    expected = values(model)
    take_steps(model, optimizer, 1)
    then = values(model)
    assert then != expected and checkpoints.poll() is None
    gate.set()
    path = checkpoints.wait()
    assert path == checkpoints.path(2)

    other_model, other_optimizer = train(0, seed=9, is_distributed=is_distributed, dtype=dtype)
    load_training(path, other_model, other_optimizer)
    assert values(other_model) == expected
    take_steps(other_model, other_optimizer, 1)
    assert values(other_model) == then
    # With bfloat16, what was lost of the float32 copies shows after some steps only.
    for trained in ((model, optimizer), (other_model, other_optimizer)):
        take_steps(*trained, 20)
    assert values(other_model) == values(model)


@pytest.mark.parametrize("is_distributed", [False, True], ids=["to whole", "to split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_goes_on_with_the_other_kind_of_optimizer(
    tmp_path: Path, train: Train, take_steps: Any, dtype: torch.dtype, is_distributed: bool
) -> None:
    dtype_name = str(dtype).removeprefix("torch.")
    state = replace(STATE, distributed_optimizer=not is_distributed, dtype=dtype_name)
    model, optimizer = train(3, is_distributed=not is_distributed, dtype=dtype)
    path = Checkpoints(tmp_path, launch=Launch()).save(state, model, optimizer)

    other_model, other_optimizer = train(0, seed=9, is_distributed=is_distributed, dtype=dtype)
    load_training(path, other_model, other_optimizer)
    assert values(other_model) == values(model)
    for num_steps in (1, 20):
        take_steps(model, optimizer, num_steps)
        take_steps(other_model, other_optimizer, num_steps)
        for name, wanted in values(model).items():
            # The two sum the gradient's norm, by which it is clipped, in another order.
            rel = 1e-5 if dtype is torch.float32 else 2.0**-7
            assert values(other_model)[name] == pytest.approx(wanted, rel=rel, abs=1e-6)


def test_a_model_is_loaded_alone(saved: Path, train: Train, make_model: Callable[..., Any]) -> None:
    model = make_model(seed=5)
    load_model(saved, model)
    expected, _ = train(1)
    assert {name: value.flatten().tolist() for name, value in model.state_dict().items()} == values(expected)


def test_a_model_is_saved_alone(tmp_path: Path, train: Train, make_model: Callable[..., Any]) -> None:
    path = tmp_path / "imported"
    state = replace(STATE, has_optimizer=False)
    save_model(path, state, make_model(seed=5), files=FILES, launch=Launch())
    verify_checkpoint(path)
    assert os.listdir(tmp_path) == ["imported"]
    model = make_model(seed=6)
    load_model(path, model)
    assert torch.equal(model.linear.weight, make_model(seed=5).linear.weight)
    with pytest.raises(InputError, match="holds a model without an optimizer's state"):
        load_training(path, *train(0))
    with pytest.raises(InputError, match="exists already"):
        save_model(path, state, make_model(), files=FILES, launch=Launch())


def test_a_checkpoint_of_the_same_step_is_replaced(checkpoints: Checkpoints, train: Train) -> None:
    checkpoints.save(STATE, *train(1))
    path = checkpoints.save(replace(STATE, seed=4), *train(2))
    verify_checkpoint(path)
    assert read_run_state(path).seed == 4


def test_a_checkpoint_in_the_making_is_not_seen(
    checkpoints: Checkpoints, train: Train, saved: Path, gate: threading.Event
) -> None:
    checkpoints.begin(replace(STATE, step=2), *train(1))
    assert sorted(os.listdir(checkpoints.folder)) == [".step_00000002.partial", "latest", saved.name]
    assert checkpoints.poll() is None
    # As a run does that starts meanwhile: it does not clear away what is being written either.
    assert Checkpoints(checkpoints.folder, launch=Launch()).newest() == saved
    gate.set()
    assert poll_until_complete(checkpoints) == checkpoints.path(2)
    assert checkpoints.poll() is None and checkpoints.wait() is None
    assert sorted(os.listdir(checkpoints.folder)) == ["latest", saved.name, "step_00000002"]
    assert checkpoints.newest() == checkpoints.path(2)


def test_a_save_waits_for_the_one_before_it_and_says_so(
    checkpoints: Checkpoints, train: Train, gate: threading.Event, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = train(1)
    assert checkpoints.begin(STATE, *trained) is None
    threading.Timer(0.2, gate.set).start()
    assert checkpoints.begin(replace(STATE, step=2), *trained) == checkpoints.path(1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("step_00000001 is still being written; step 2 waits")
    assert checkpoints.wait() == checkpoints.path(2)
    for step in (1, 2):
        verify_checkpoint(checkpoints.path(step))


def test_saving_leaves_neither_process_nor_thread_behind(checkpoints: Checkpoints, train: Train) -> None:
    # A process would die of a signal to the whole run, and outlive a run that is killed.
    before = set(psutil.Process().children(recursive=True)), threading.active_count()
    checkpoints.begin(STATE, *train(1))
    assert set(psutil.Process().children(recursive=True)) <= before[0]
    checkpoints.wait()
    assert threading.active_count() <= before[1]


def test_a_run_that_fails_gives_up_its_save(
    checkpoints: Checkpoints, train: Train, saved: Path, gate: threading.Event
) -> None:
    trained = train(1)
    checkpoints.begin(replace(STATE, step=2), *trained)
    threading.Timer(0.2, gate.set).start()
    checkpoints.close()
    assert sorted(os.listdir(checkpoints.folder)) == ["latest", saved.name]
    assert checkpoints.poll() is None
    checkpoints.close()
    verify_checkpoint(checkpoints.save(replace(STATE, step=2), *trained))


def fail_with_full_disk(*unused: Any, **unused_keywords: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_from(num_bytes: int, suffix: str) -> type[async_save.HashedFile]:
    """A disk that has so many bytes for a file of that kind."""

    class FullDisk(async_save.HashedFile):
        def write(self, data: Any) -> int:
            if self.path.suffix == suffix and self.tell() + memoryview(data).nbytes > num_bytes:
                fail_with_full_disk()
            return super().write(data)

    return FullDisk


FULL_DISKS: dict[str, tuple[Any, str, Any]] = {
    "before the shards are written": (async_save, "HashedFile", full_from(0, ".distcp")),
    "within the first shard's archive": (async_save, "HashedFile", full_from(400, ".distcp")),
    "between two shards": (async_save, "HashedFile", full_from(3000, ".distcp")),
    "within common.pt": (async_save, "HashedFile", full_from(400, ".pt")),
    "while the index is written": (async_save._Writer, "finish", fail_with_full_disk),
    "while the manifest is written": (checkpoint, "finish_artefact", fail_with_full_disk),
}


@pytest.mark.parametrize("moment", FULL_DISKS)
def test_a_full_disk_leaves_nothing_half_written(
    checkpoints: Checkpoints, saved: Path, train: Train, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    trained = train(2)
    with monkeypatch.context() as patch:
        patch.setattr(*FULL_DISKS[moment])
        checkpoints.begin(replace(STATE, step=2), *trained)
        with pytest.raises(OSError) as error:
            poll_until_complete(checkpoints)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(checkpoints.path(2)))
    assert sorted(os.listdir(checkpoints.folder)) == ["latest", "step_00000001"]
    assert checkpoints.newest() == saved
    # And there is nothing left in this process that would spoil the next one.
    verify_checkpoint(checkpoints.save(replace(STATE, step=2), *trained))


def test_a_full_disk_leaves_the_checkpoint_that_was_to_be_replaced(
    checkpoints: Checkpoints, saved: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_save, "_write_item", fail_with_full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        checkpoints.save(replace(STATE, seed=8), *train(2))
    verify_checkpoint(saved)
    assert read_run_state(saved) == STATE


def test_a_full_disk_before_latest_leaves_the_old_one_named(
    checkpoints: Checkpoints, saved: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_atomically", fail_with_full_disk)
        with pytest.raises(OSError, match="No space left on device"):
            checkpoints.save(replace(STATE, step=2), *train(2))
    assert checkpoints.newest() == saved
    verify_checkpoint(checkpoints.path(2))


def test_another_shape_is_refused(saved: Path, make_model: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="do not fit this model .*use the config in the checkpoint"):
        load_model(saved, make_model(hidden_size=8))


def test_another_precision_is_refused(saved: Path, train: Train) -> None:
    # A split optimizer is written in float32.
    with pytest.raises(InputError, match="parallel.distributed_optimizer is true, but .* was written with false"):
        load_training(saved, *train(0, is_distributed=True))
    with pytest.raises(InputError, match="makes float32 parameters, but .* holds float64"):
        load_training(saved, *train(0, dtype=torch.float32))


class WithExtraState(torch.nn.Linear):
    """As Transformer Engine's modules are: besides its parameters it has a state, which is empty."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Empty."""


def test_states_besides_the_parameters_are_neither_saved_nor_missed(
    checkpoints: Checkpoints, make_model: Any, take_steps: Any
) -> None:
    def train_such(seed: int, num_steps: int) -> Trained:
        model = make_model(seed=seed)
        model.linear.__class__ = WithExtraState
        assert "linear._extra_state" in model.sharded_state_dict()
        wrapped, optimizer = wrap_model(model, OptimizerConfig(), dtype=torch.float64, distributed_optimizer=False)
        take_steps(wrapped, optimizer, num_steps)
        return wrapped, optimizer

    trained = train_such(0, 2)
    path = checkpoints.save(STATE, *trained)
    index = (path / "state" / ".metadata").read_bytes()
    assert b"linear.weight" in index and b"_extra_state" not in index
    other = train_such(1, 1)
    load_training(path, *other)
    assert values(other[0]) == values(trained[0])
    third = train_such(2, 0)
    load_model(path, third[0].module)
    assert values(third[0]) == values(trained[0])
