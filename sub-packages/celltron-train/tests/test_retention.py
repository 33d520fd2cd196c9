import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest

from celltron.train import checkpoint_folder
from celltron.train.checkpoint_folder import RunState, clear_leftovers, list_checkpoints
from celltron.train.retention import RetentionConfig, choose_removed, remove_outdated

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


@pytest.mark.parametrize("name", ["keep_last", "keep_best", "keep_every"])
def test_negative_numbers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"retention.{name} is -1"):
        RetentionConfig(**{name: -1})


def write_folder(folder: Path, step: int, validation_loss: float | None) -> Path:
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    state = RunState(
        step=step, seed=0, loader={}, distributed_optimizer=False, dtype="float32", validation_loss=validation_loss
    )
    (path / "run.json").write_text(json.dumps(asdict(state)))
    return path


def test_losses_are_read_from_the_checkpoints(tmp_path: Path) -> None:
    for step, loss in LOSSES.items():
        write_folder(tmp_path, step, None if math.isnan(loss) else loss)
    (tmp_path / "step_00000040" / "run.json").write_text("{")  # as good as 20, but damaged
    remove_outdated(RetentionConfig(keep_last=2, keep_best=2), tmp_path, current=50)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step_{step:08d}" for step in (20, 30, 40, 50)]
    remove_outdated(RetentionConfig(keep_last=1, keep_best=2), tmp_path, current=50)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"step_{step:08d}" for step in (20, 30, 50)]


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
            remove_outdated(RetentionConfig(keep_last=1), tmp_path, current=20)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000020"]
    assert (tmp_path / ".step_00000010.removed" / "run.json").is_file()
    # The same step may be written and removed again before the next start.
    write_folder(tmp_path, 10, None)
    remove_outdated(RetentionConfig(keep_last=1), tmp_path, current=20)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000020"]
    (tmp_path / ".step_00000010.removed").mkdir()
    clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000020"]
