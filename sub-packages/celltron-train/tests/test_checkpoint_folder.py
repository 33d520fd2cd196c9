import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from celltron.core import InputError, begin_artefact, discard_artefact, finish_artefact
from celltron.train.checkpoint import Checkpoints
from celltron.train.checkpoint_folder import (
    STATE_FOLDER,
    RunState,
    clear_leftovers,
    describe_checkpoint,
    find_checkpoint,
    list_checkpoints,
    read_run_state,
    verify_checkpoint,
)
from celltron.train.launch import Launch
from celltron.train.spike import SpikeState

pytestmark = pytest.mark.usefixtures("engine")
STATE = RunState(step=1, seed=3, loader={"epoch": 2, "position": 5}, distributed_optimizer=False, dtype="float64")
# Every file of a checkpoint of one process.
NAMES = [
    "config.yaml",
    "manifest.json",
    "run.json",
    "state/.metadata",
    "state/__0_0.distcp",
    "state/common.pt",
    "state/metadata.json",
    "vocabulary.json",
]


@pytest.fixture
def checkpoints(tmp_path: Path, train: Callable[..., Any]) -> Checkpoints:
    """Of steps 1 and 2, in `run/checkpoints`."""
    files = {"config.yaml": "out: a\n", "vocabulary.json": '{"tokens": ["\u00e4"]}'}
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", launch=Launch(), files=files)
    for step in (1, 2):
        # One byte more, so that no file of the one is a file of the other.
        checkpoints.files["config.yaml"] = f"out: {step}\n" + "#" * step
        checkpoints.save(replace(STATE, step=step, seed=step), *train(step))
    return checkpoints


@pytest.fixture
def saved(checkpoints: Checkpoints) -> Path:
    """The checkpoint of step 2."""
    return checkpoints.path(2)


def list_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def take_from_other_step(path: Path) -> None:
    """Put the file of that name there that the other checkpoint holds; where they are alike, an empty one."""
    other = Path(str(path).replace("step_00000002", "step_00000001"))
    path.write_bytes(b"" if other.read_bytes() == path.read_bytes() else other.read_bytes())


def swap(path: Path) -> None:
    """Swap it with the file before it in the folder."""
    names = sorted(other for other in path.parent.iterdir() if other.is_file())
    other = names[names.index(path) - 1]
    content, other_content = path.read_bytes(), other.read_bytes()
    path.write_bytes(other_content)
    other.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "altered": flip_byte,
    # The manifest ends with a line break, which is no part of what it says.
    "cut by two bytes": lambda path: os.truncate(path, path.stat().st_size - 2),
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": lambda path: path.unlink(),
    "a link": lambda path: (path.rename(path.parents[2] / "elsewhere"), path.symlink_to(path.parents[2] / "elsewhere")),
    "another checkpoint's": take_from_other_step,
    "swapped": swap,
    "added": lambda path: path.with_name(f"{path.name}.added").write_bytes(b"x"),
}


def test_the_list_of_files_is_the_true_one(saved: Path) -> None:
    assert list_files(saved) == NAMES


def names_of(damage: str, name: str) -> list[str]:
    """The files that may be named: both of a swap, and of another manifest, which is true to itself, the first."""
    if damage == "swapped":
        return NAMES
    return ["config.yaml"] if (damage, name) == ("another checkpoint's", "manifest.json") else [name]


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_file_is_damaged_is_named_and_the_checkpoint_before_it_used(
    checkpoints: Checkpoints,
    saved: Path,
    tmp_path: Path,
    damage: str,
    capsys: pytest.CaptureFixture[str],
    train: Callable[..., Any],
) -> None:
    """And the run that goes on from that one writes the damaged one anew."""
    whole, trained = shutil.copytree(saved, tmp_path / "whole"), train(2)
    for name in NAMES:
        assert checkpoints.newest() == saved
        assert capsys.readouterr().err == ""
        DAMAGES[damage](saved / name)
        assert checkpoints.newest() == checkpoints.path(1), name
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith("using the older step_00000001 instead")
        assert line.startswith(str(saved)) and any(Path(named).name in line for named in names_of(damage, name)), line
        resumed = Checkpoints(checkpoints.folder, launch=Launch(), first_step=2)
        assert resumed.save(replace(STATE, step=2), *trained) == resumed.newest() == saved
        said = capsys.readouterr().err
        if (damage, name) == ("missing", "manifest.json"):
            assert said == f"{saved} has no manifest.json; it is removed to make way for this step's checkpoint\n"
        else:
            assert said == ""
        shutil.rmtree(saved)
        shutil.copytree(whole, saved)


def test_a_folder_under_another_step_is_not_used(
    checkpoints: Checkpoints, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved.rename(checkpoints.path(3))
    assert checkpoints.newest() == checkpoints.path(1)
    assert "run.json is of step 2, so step_00000003 was moved or renamed" in capsys.readouterr().err


def test_when_all_are_damaged_that_is_said(checkpoints: Checkpoints) -> None:
    for path in list_checkpoints(checkpoints.folder):
        (path / "manifest.json").unlink()
    with pytest.raises(InputError, match="no checkpoint in .* is complete: .*manifest.json"):
        checkpoints.newest()


def test_a_new_run_has_no_newest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", launch=Launch())
    assert checkpoints.newest() is None
    (checkpoints.folder / "step_of_mine").mkdir(parents=True)
    assert checkpoints.newest() is None


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


def test_a_checkpoint_is_described(saved: Path, checkpoints: Checkpoints, train: Callable[..., Any]) -> None:
    text = describe_checkpoint(saved)
    assert text.startswith(f"{saved}: checkpoint of step 2, float64 parameters, ")
    assert "in 7 files" in text and text.endswith("; next cell: place 5 of epoch 2")
    path = checkpoints.save(replace(STATE, step=3, validation_loss=1.25), *train(1))
    assert "validation loss 1.2500 nats; next cell" in describe_checkpoint(path)


@pytest.fixture
def being_written(tmp_path: Path) -> Iterator[Path]:
    """The partial folder of a save that goes on."""
    partial = begin_artefact(tmp_path / "run" / "checkpoints" / "step_00000009")
    yield partial
    discard_artefact(partial)


def test_what_killed_saves_left_is_removed_at_the_next_start(
    checkpoints: Checkpoints, saved: Path, being_written: Path, train: Callable[..., Any]
) -> None:
    stay = ["latest", "step_00000001", "step_00000002"]

    def litter() -> None:
        # A save killed before and one after its manifest, one that replaced a checkpoint, a removal, a pointer.
        for name in (".step_00000003.partial", ".step_00000004.partial", ".step_00000001.removed"):
            shutil.copytree(saved, checkpoints.folder / name)
        (checkpoints.folder / ".step_00000003.partial" / "manifest.json").unlink()
        (checkpoints.folder / ".latest.0123abcd.tmp").touch()

    litter()
    clear_leftovers(checkpoints.folder)
    assert sorted(os.listdir(checkpoints.folder)) == [being_written.name, *stay]
    litter()
    assert checkpoints.newest() == saved
    assert sorted(os.listdir(checkpoints.folder)) == [being_written.name, *stay]
    litter()
    Checkpoints(checkpoints.folder, launch=Launch()).save(replace(STATE, step=5), *train(1))
    assert sorted(os.listdir(checkpoints.folder)) == [being_written.name, *stay, "step_00000005"]


@pytest.mark.parametrize("kind", ["file", "link", "empty folder"])
def test_what_else_has_a_checkpoint_s_name_makes_way_for_it(
    checkpoints: Checkpoints, saved: Path, kind: str, train: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoints.path(3)
    {"file": path.touch, "empty folder": path.mkdir, "link": lambda: path.symlink_to(saved)}[kind]()
    assert checkpoints.save(replace(STATE, step=3), *train(1)) == path
    assert not path.is_symlink() and sorted(os.listdir(checkpoints.folder))[2:] == ["step_00000002", "step_00000003"]
    verify_checkpoint(saved)
    verify_checkpoint(path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path} {'is a link' if kind == 'link' else 'has no manifest.json'}; it is removed")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"step": "one"}, "'step'"),
        ({"loader": [1]}, "'loader'"),
        ({"surprise": 1}, "'surprise'"),
        ({"distributed_optimizer": 1}, "'distributed_optimizer'"),
        ({"validation_loss": "low"}, "'validation_loss'"),
        ({"spike": {"losses": "high"}}, "'spike.losses'"),
        ({"spike": {"losses": [1.0, math.nan]}}, "losses must be finite numbers"),
        ({"spike": {"losses": [1.0] * 10_001}}, "at most 10,000"),
        ({"spike": {"is_high": 1}}, "'spike.is_high'"),
        ({"skipped_in_a_row": 1.5}, "'skipped_in_a_row'"),
        ({"skipped_in_a_row": -1}, "skipped_in_a_row is -1"),
        (None, "JSON|Expecting"),
    ],
)
def test_a_strange_run_state_is_refused(tmp_path: Path, change: dict[str, Any] | None, named: str) -> None:
    text = "{" if change is None else json.dumps(asdict(STATE) | change)
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(InputError, match=named):
        read_run_state(tmp_path)


def test_a_run_state_comes_back_to_the_bit(tmp_path: Path) -> None:
    state = replace(STATE, spike=SpikeState(losses=(0.1, 1 / 3, 1e-300), is_high=True), skipped_in_a_row=2)
    (tmp_path / "run.json").write_text(json.dumps(asdict(state)))
    assert read_run_state(tmp_path) == state


def test_a_run_state_of_an_earlier_celltron_is_read(tmp_path: Path) -> None:
    values = asdict(STATE)
    del values["validation_loss"], values["has_optimizer"], values["spike"], values["skipped_in_a_row"]
    (tmp_path / "run.json").write_text(json.dumps(values))
    assert read_run_state(tmp_path) == STATE
