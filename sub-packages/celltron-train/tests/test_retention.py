import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from celltron.train import checkpoint, checkpoint_folder
from celltron.train.checkpoint import Checkpoints
from celltron.train.checkpoint_folder import (
    RunState,
    clear_leftovers,
    find_checkpoint,
    list_checkpoints,
    step_of,
    verify_checkpoint,
)
from celltron.train.launch import Launch
from celltron.train.retention import RetentionConfig, choose_removed, remove_outdated

STATE = RunState(step=1, seed=3, loader={}, distributed_optimizer=False, dtype="float64")
Train = Callable[..., tuple[Any, Any]]
STEPS = [10, 20, 30, 40, 50]
LOSSES = {10: 0.9, 20: 0.3, 30: 0.5, 40: 0.3, 50: math.nan}


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"keep_last": 0}, STEPS),
        ({"keep_last": 0, "keep_best": 1}, STEPS),
        ({"keep_last": 1}, [50]),
        ({"keep_last": 2}, [40, 50]),
        ({"keep_last": 9}, STEPS),
        ({"keep_last": 1, "keep_best": 1}, [40, 50]),
        ({"keep_last": 1, "keep_best": 2}, [20, 40, 50]),
        ({"keep_last": 1, "keep_best": 9}, [10, 20, 30, 40, 50]),
        ({"keep_last": 1, "keep_every": 20}, [20, 40, 50]),
        ({"keep_last": 2, "keep_best": 1, "keep_every": 30}, [30, 40, 50]),
    ],
)
def test_what_is_kept(settings: dict[str, int], kept: list[int]) -> None:
    removed = choose_removed(RetentionConfig(**settings), STEPS, LOSSES, current=50)
    assert removed == [step for step in STEPS if step not in kept]


def test_the_current_one_stays_though_later_and_better_ones_are_there() -> None:
    for keep_best in (0, 1):
        config = RetentionConfig(keep_last=1, keep_best=keep_best)
        assert 10 not in choose_removed(config, STEPS, LOSSES, current=10)
    assert choose_removed(RetentionConfig(keep_last=2), STEPS, {}, current=10) == [20, 30, 40]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"keep_last": 0}, [100, 150, 200, 300, 400, 500]),
        ({"keep_last": 3}, [100, 150, 300]),
        ({"keep_last": 2}, [150, 300]),
        ({"keep_last": 1, "keep_best": 1}, [150, 300]),
        ({"keep_last": 1, "keep_best": 2}, [100, 150, 300]),
        ({"keep_last": 1, "keep_every": 100}, [100, 300]),
    ],
)
def test_checkpoints_that_the_run_went_back_behind_count_for_nothing(settings: dict[str, int], kept: list[int]) -> None:
    """The run went on from 150, its own best, and wrote 300; those given up are the better ones."""
    steps, losses = [100, 150, 200, 300, 400, 500], {100: 0.9, 150: 0.5, 200: 0.1, 400: 0.2}
    removed = choose_removed(RetentionConfig(**settings), steps, losses, current=300, given_up=[200, 400, 500])
    assert removed == [step for step in steps if step not in kept]


@pytest.mark.parametrize("name", ["keep_last", "keep_best", "keep_every"])
def test_negative_numbers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"retention.{name} is -1"):
        RetentionConfig(**{name: -1})


def write_folder(folder: Path, step: int, validation_loss: float | None) -> Path:
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True, exist_ok=True)
    state = replace(STATE, step=step, validation_loss=validation_loss)
    (path / "run.json").write_text(json.dumps(asdict(state)))
    return path


def steps_in(folder: Path) -> list[int]:
    return [step_of(path) for path in list_checkpoints(folder)]


def test_losses_are_read_from_the_checkpoints(tmp_path: Path) -> None:
    for step, loss in LOSSES.items():
        write_folder(tmp_path, step, None if math.isnan(loss) else loss)
    (tmp_path / "step_00000040" / "run.json").write_text("{")  # as good as 20, but damaged
    remove_outdated(RetentionConfig(keep_last=2, keep_best=2), tmp_path, written=[50], first_step=41)
    assert steps_in(tmp_path) == [20, 30, 40, 50]
    remove_outdated(RetentionConfig(keep_last=1, keep_best=2), tmp_path, written=[50], first_step=41)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"step_{step:08d}" for step in (20, 30, 50)]


def test_a_run_that_went_back_keeps_its_own_and_says_what_it_removes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (100, 200, 300, 400, 500):
        write_folder(tmp_path, step, None)
    config = RetentionConfig(keep_last=3)
    for written, steps in (([250], [100, 250]), ([250, 300], [100, 250, 300]), ([250, 300, 400], [250, 300, 400])):
        write_folder(tmp_path, written[-1], None)
        remove_outdated(config, tmp_path, written=written, first_step=101)
        assert steps_in(tmp_path) == steps
    (line,) = capsys.readouterr().err.splitlines()
    names = "step_00000200, step_00000300, step_00000400, step_00000500"
    assert line == f"removed {names}, written before the run went back to an earlier checkpoint"


def test_those_given_up_are_removed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (100, 200, 300, 500):
        write_folder(tmp_path, step, None)
    removed = []
    monkeypatch.setattr("celltron.train.retention.remove_checkpoint", lambda path: removed.append(step_of(path)))
    remove_outdated(RetentionConfig(keep_last=1), tmp_path, written=[300], first_step=101)
    assert removed == [200, 500, 100]


def test_a_removal_that_is_killed_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20):
        write_folder(tmp_path, step, None)

    def is_killed(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folder.shutil, "rmtree", is_killed)
        with pytest.raises(KeyboardInterrupt):
            remove_outdated(RetentionConfig(keep_last=1), tmp_path, written=[20], first_step=11)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000020"]
    assert (tmp_path / ".step_00000010.removed" / "run.json").is_file()
    # The same step may be written and removed again before the next start.
    write_folder(tmp_path, 10, None)
    remove_outdated(RetentionConfig(keep_last=1), tmp_path, written=[20], first_step=11)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000020"]
    (tmp_path / ".step_00000010.removed").mkdir()
    clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000020"]


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (None, [1, 2, 3, 4]),
        (RetentionConfig(keep_last=2), [3, 4]),
        (RetentionConfig(keep_last=1, keep_best=1), [2, 4]),
    ],
)
@pytest.mark.usefixtures("engine")
def test_outdated_ones_are_removed(
    tmp_path: Path, train: Train, retention: RetentionConfig | None, kept: list[int]
) -> None:
    """Also by a resumed run, which reads the losses of the run before it."""
    trained = train(1)
    for step, loss in enumerate((0.5, 0.3, 0.4, None), start=1):
        checkpoints = Checkpoints(tmp_path, launch=Launch(), retention=retention)
        checkpoints.save(replace(STATE, step=step, validation_loss=loss), *trained)
    assert sorted(os.listdir(tmp_path)) == ["latest", *(f"step_{step:08d}" for step in kept)]
    assert checkpoints.newest() == checkpoints.path(4)


def fail_with_full_disk(*unused: Any, **unused_keywords: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.usefixtures("engine")
def test_a_run_that_went_back_has_as_many_to_fall_back_on_as_it_is_to_keep(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = train(1)
    for step in (10, 20, 30, 40, 50):
        Checkpoints(tmp_path, launch=Launch()).save(replace(STATE, step=step), *trained)
    checkpoints = Checkpoints(tmp_path, launch=Launch(), retention=RetentionConfig(keep_last=3), first_step=11)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "finish_artefact", fail_with_full_disk)
        with pytest.raises(OSError, match="No space left on device"):
            checkpoints.save(replace(STATE, step=25), *trained)
    assert steps_in(tmp_path) == [10, 20, 30, 40, 50]
    for step in (25, 40):
        checkpoints.save(replace(STATE, step=step), *trained)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000010", "step_00000025", "step_00000040"]
    for step, before in ((40, 25), (25, 10)):
        (checkpoints.path(step) / "run.json").unlink()
        assert checkpoints.newest() == checkpoints.path(before)


def fail_on(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, failing on what has that name, as a file system does where somebody has a file open."""

    def call(path: Any, *arguments: Any, **keywords: Any) -> Any:
        if Path(path).name == name:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), ".nfs0123")
        return function(path, *arguments, **keywords)

    return call


@pytest.mark.parametrize(
    ("module", "function", "name"),
    [(shutil, "rmtree", ".step_00000001.removed"), (os, "rename", "step_00000001")],
)
@pytest.mark.usefixtures("engine")
def test_a_run_goes_on_though_an_old_one_cannot_be_removed(
    tmp_path: Path,
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: Any,
    function: str,
    name: str,
) -> None:
    trained, keep_one = train(1), RetentionConfig(keep_last=1)
    with monkeypatch.context() as patch:
        patch.setattr(module, function, fail_on(name, getattr(module, function)))
        for steps in ((1, 2, 3), (4,)):
            checkpoints = Checkpoints(tmp_path, launch=Launch(), retention=keep_one, first_step=steps[0])
            assert checkpoints.newest() == (checkpoints.path(3) if steps == (4,) else None)
            for step in steps:
                assert checkpoints.save(replace(STATE, step=step), *trained) == checkpoints.path(step)
    assert sorted(os.listdir(tmp_path)) == sorted([name, "latest", "step_00000004"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path / name} cannot be removed (") and "Device or resource busy)" in line
    checkpoints.save(replace(STATE, step=5), *trained)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000005"]


@pytest.mark.usefixtures("engine")
def test_one_that_was_made_read_only_is_kept_whole(
    tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = train(1)
    checkpoints = Checkpoints(tmp_path, launch=Launch(), retention=RetentionConfig(keep_last=1))
    checkpoints.save(STATE, *trained)
    checkpoints.path(1).chmod(0o555)
    for step in (2, 3):
        checkpoints.save(replace(STATE, step=step), *trained)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000001", "step_00000003"]
    verify_checkpoint(checkpoints.path(1))
    said = f"{checkpoints.path(1)} cannot be removed (its folder is read-only); every save tries again\n"
    assert capsys.readouterr().err == said
    checkpoints.path(1).chmod(0o755)
    checkpoints.save(replace(STATE, step=4), *trained)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000004"]


@pytest.mark.usefixtures("engine")
def test_the_one_just_written_is_kept_though_later_ones_were_there(tmp_path: Path, train: Train) -> None:
    trained = train(1)
    for step in (30, 40):
        Checkpoints(tmp_path, launch=Launch()).save(replace(STATE, step=step), *trained)
    keep_two = RetentionConfig(keep_last=2)
    Checkpoints(tmp_path, launch=Launch(), retention=keep_two).save(replace(STATE, step=20), *trained)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000020"]
    assert find_checkpoint(tmp_path) == tmp_path / "step_00000020"
    assert Checkpoints(tmp_path, launch=Launch()).newest() == tmp_path / "step_00000020"
