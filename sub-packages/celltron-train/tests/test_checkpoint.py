import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from megatron.core.dist_checkpointing.strategies import common, filesystem_async

from celltron.core import InputError, finish_artefact
from celltron.train import checkpoint
from celltron.train.checkpoint import (
    STATE_FOLDER,
    Checkpoints,
    RunState,
    describe_checkpoint,
    find_checkpoint,
    load_model,
    load_training,
    read_run_state,
    save_model,
    verify_checkpoint,
)
from celltron.train.launch import Launch
from celltron.train.optimizer import OptimizerConfig, set_learning_rate, wrap_model

pytestmark = pytest.mark.usefixtures("engine")
STATE = RunState(
    step=1,
    seed=3,
    loader={"seed": 3, "epoch": 2, "position": 5},
    distributed_optimizer=False,
    dtype="float64",
)
FILES = {"config.yaml": "out: a\n", "vocabulary.json": '{"tokens": ["\u00e4"]}'}
Trained = tuple[Any, Any]


@pytest.fixture
def train(make_model: Callable[..., Any]) -> Callable[..., Trained]:
    """`train(num_steps, seed=..., ...)`: a wrapped model and its optimizer after some steps on invented gradients."""

    def make(
        num_steps: int, *, seed: int = 0, is_distributed: bool = False, dtype: torch.dtype = torch.float64
    ) -> Trained:
        wrapped, optimizer = wrap_model(
            make_model(seed=seed, dtype=dtype),
            OptimizerConfig(),
            dtype=dtype,
            distributed_optimizer=is_distributed,
        )
        take_steps(wrapped, optimizer, num_steps)
        return wrapped, optimizer

    return make


def take_steps(wrapped: Any, optimizer: Any, num_steps: int) -> None:
    for step in range(num_steps):
        wrapped.zero_grad_buffer()
        generator = torch.Generator().manual_seed(step)
        for parameter in wrapped.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        set_learning_rate(optimizer, 0.1, 0.01)
        optimizer.step()


def values(wrapped: Any) -> dict[str, list[float]]:
    return {name: parameter.detach().flatten().tolist() for name, parameter in wrapped.module.named_parameters()}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", launch=Launch(), files=FILES)


@pytest.fixture
def saved(checkpoints: Checkpoints, train: Callable[..., Trained]) -> Path:
    """A checkpoint of step 1."""
    return checkpoints.save(STATE, *train(1))


def list_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


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
    assert describe_checkpoint(saved).startswith(f"{saved}: checkpoint of step 1, float64 parameters")


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
    tmp_path: Path, train: Callable[..., Trained], dtype: torch.dtype, is_distributed: bool
) -> None:
    state = replace(STATE, distributed_optimizer=is_distributed, dtype=str(dtype).removeprefix("torch."))
    model, optimizer = train(3, is_distributed=is_distributed, dtype=dtype)
    path = Checkpoints(tmp_path, launch=Launch()).save(state, model, optimizer)

    other_model, other_optimizer = train(0, seed=9, is_distributed=is_distributed, dtype=dtype)
    assert values(other_model) != values(model)
    load_training(path, other_model, other_optimizer)
    # With bfloat16, what was lost of the float32 copies shows after some steps only.
    for num_steps in (1, 20):
        take_steps(model, optimizer, num_steps)
        take_steps(other_model, other_optimizer, num_steps)
        assert values(other_model) == values(model)


def test_a_model_is_loaded_alone(saved: Path, train: Callable[..., Trained], make_model: Callable[..., Any]) -> None:
    model = make_model(seed=5)
    load_model(saved, model)
    expected, _ = train(1)
    assert {name: value.flatten().tolist() for name, value in model.state_dict().items()} == values(expected)


def test_a_model_is_saved_alone(tmp_path: Path, train: Callable[..., Trained], make_model: Callable[..., Any]) -> None:
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


def test_a_checkpoint_of_the_same_step_is_replaced(checkpoints: Checkpoints, train: Callable[..., Trained]) -> None:
    checkpoints.save(STATE, *train(1))
    path = checkpoints.save(replace(STATE, seed=4), *train(2))
    verify_checkpoint(path)
    assert read_run_state(path).seed == 4


def test_saving_leaves_no_process_behind(checkpoints: Checkpoints, train: Callable[..., Trained]) -> None:
    # One that answers later saves would die of a signal to the whole run, and outlive a run that is killed.
    before = set(psutil.Process().children(recursive=True))
    checkpoints.save(STATE, *train(1))
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.mark.parametrize(("keep", "kept"), [(0, [1, 2, 3, 4]), (1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_the_newest_are_kept(tmp_path: Path, train: Callable[..., Trained], keep: int, kept: list[int]) -> None:
    checkpoints = Checkpoints(tmp_path, launch=Launch(), keep=keep)
    trained = train(1)
    for step in range(1, 5):
        checkpoints.save(replace(STATE, step=step), *trained)
    assert sorted(os.listdir(tmp_path)) == ["latest", *(f"step_{step:08d}" for step in kept)]
    assert checkpoints.newest() == checkpoints.path(4)


def test_the_one_just_written_is_kept_though_later_ones_are_there(
    tmp_path: Path, train: Callable[..., Trained]
) -> None:
    trained = train(1)
    for step in (30, 40):
        Checkpoints(tmp_path, launch=Launch()).save(replace(STATE, step=step), *trained)
    Checkpoints(tmp_path, launch=Launch(), keep=2).save(replace(STATE, step=20), *trained)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000020", "step_00000040"]
    assert find_checkpoint(tmp_path) == tmp_path / "step_00000020"
    assert Checkpoints(tmp_path, launch=Launch()).newest() == tmp_path / "step_00000020"


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "missing", "no manifest"])
def test_a_damaged_newest_one_is_named_and_the_one_before_it_used(
    checkpoints: Checkpoints, train: Callable[..., Trained], damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = train(1)
    first, second = (checkpoints.save(replace(STATE, step=step), *trained) for step in (1, 2))
    assert checkpoints.newest() == second
    assert capsys.readouterr().err == ""
    shard = next((second / STATE_FOLDER).glob("*.distcp"))
    spoilt = second / "manifest.json" if damage == "no manifest" else shard
    if damage == "flipped byte":
        flip_byte(spoilt)
    elif damage == "truncated":
        os.truncate(spoilt, spoilt.stat().st_size - 1)
    else:
        spoilt.unlink()
    assert checkpoints.newest() == first
    (line,) = capsys.readouterr().err.splitlines()
    assert str(second) in line and spoilt.name in line
    assert line.endswith("using the older step_00000001 instead")


def test_when_all_are_damaged_that_is_said(checkpoints: Checkpoints, saved: Path) -> None:
    (saved / "manifest.json").unlink()
    with pytest.raises(InputError, match="no checkpoint in .* is complete: .*manifest.json"):
        checkpoints.newest()


def test_a_new_run_has_no_newest(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest() is None
    (checkpoints.folder / ".step_00000001.partial").mkdir(parents=True)
    assert checkpoints.newest() is None


def test_any_one_file_that_is_altered_or_truncated_is_named(saved: Path, tmp_path: Path) -> None:
    names = list_files(saved)
    assert len(names) >= 8
    for name in names:
        for number, spoil in enumerate((flip_byte, lambda path: os.truncate(path, path.stat().st_size // 2))):
            copy = shutil.copytree(saved, tmp_path / f"{name.replace('/', '_')}.{number}")
            spoil(copy / name)
            with pytest.raises(InputError) as error:
                verify_checkpoint(copy)
            assert str(copy / name) in str(error.value)


def test_any_one_file_that_is_missing_is_named(saved: Path, tmp_path: Path) -> None:
    for name in list_files(saved):
        copy = shutil.copytree(saved, tmp_path / name.replace("/", "_"))
        (copy / name).unlink()
        with pytest.raises(InputError, match=name.rsplit("/", 1)[-1]):
            verify_checkpoint(copy)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no checkpoint folder"):
        verify_checkpoint(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"manifest\.json"):
        verify_checkpoint(tmp_path)


def test_crafted_shards_with_true_checksums_are_refused(saved: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".crafted.partial"
    shutil.copytree(saved, partial)
    (partial / "manifest.json").unlink()
    # A pickle that names posix.system.
    (partial / STATE_FOLDER / ".metadata").write_bytes(b"\x80\x04\x8c\x05posix\x8c\x06system\x93.")
    finish_artefact(partial, tmp_path / "crafted", format="celltron-checkpoint", version=1)
    with pytest.raises(InputError, match="it names posix.system"):
        verify_checkpoint(tmp_path / "crafted")


def test_latest_is_followed(checkpoints: Checkpoints, saved: Path) -> None:
    assert find_checkpoint(checkpoints.folder) == saved
    assert find_checkpoint(checkpoints.folder.parent) == saved
    assert find_checkpoint(saved) == saved
    for name in ("", "../elsewhere", "/etc"):
        (checkpoints.folder / "latest").write_text(name)
        with pytest.raises(InputError, match="no checkpoint's name"):
            find_checkpoint(checkpoints.folder)


def fail_with_full_disk(*unused: Any, **unused_keywords: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FULL_DISKS = {
    "while the shards are written": (filesystem_async, "_write_item"),
    "while common.pt is written": (common.torch, "save"),
    "while the manifest is written": (checkpoint, "finish_artefact"),
}


@pytest.mark.parametrize("moment", FULL_DISKS)
def test_a_full_disk_leaves_nothing_half_written(
    checkpoints: Checkpoints,
    saved: Path,
    train: Callable[..., Trained],
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    trained = train(2)
    with monkeypatch.context() as patch:
        patch.setattr(*FULL_DISKS[moment], fail_with_full_disk)
        with pytest.raises(OSError) as error:
            checkpoints.save(replace(STATE, step=2), *trained)
    assert error.value.errno == errno.ENOSPC
    assert sorted(os.listdir(checkpoints.folder)) == ["latest", "step_00000001"]
    assert checkpoints.newest() == saved
    # And there is nothing left in this process that would spoil the next one.
    verify_checkpoint(checkpoints.save(replace(STATE, step=2), *trained))


def test_a_full_disk_leaves_the_checkpoint_that_was_to_be_replaced(
    checkpoints: Checkpoints, saved: Path, train: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem_async, "_write_item", fail_with_full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        checkpoints.save(replace(STATE, seed=8), *train(2))
    verify_checkpoint(saved)
    assert read_run_state(saved) == STATE


def test_another_shape_is_refused(saved: Path, make_model: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="do not fit this model .*use the config in the checkpoint"):
        load_model(saved, make_model(hidden_size=8))


def test_another_kind_of_optimizer_or_precision_is_refused(saved: Path, train: Callable[..., Trained]) -> None:
    with pytest.raises(InputError, match="parallel.distributed_optimizer is true, but .* was written with false"):
        load_training(saved, *train(0, is_distributed=True))
    with pytest.raises(InputError, match="makes float32 parameters, but .* holds float64"):
        load_training(saved, *train(0, dtype=torch.float32))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"step": "one"}, "'step'"),
        ({"loader": [1]}, "'loader'"),
        ({"surprise": 1}, "'surprise'"),
        ({"distributed_optimizer": 1}, "'distributed_optimizer'"),
        (None, "JSON|Expecting"),
    ],
)
def test_a_strange_run_state_is_refused(tmp_path: Path, change: dict[str, Any] | None, named: str) -> None:
    text = "{" if change is None else json.dumps(asdict(STATE) | change)
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(InputError, match=named):
        read_run_state(tmp_path)
