"""What goes wrong around a command, not in its input: full disks, a launcher gone missing, a bare process."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from celltron.core.durable import lock_folder
from celltron.train.checkpoint import verify_checkpoint
from celltron.train.run_folder import RUN_MARK_NAME

BREAK_WRITES = Path(__file__).with_name("break_writes.py")
LOSE_READER = Path(__file__).with_name("lose_reader.py")
RANKS = Path(__file__).parents[1] / "equivalence" / "ranks.py"
Celltron = Callable[..., Any]


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def sentence_of(ended: Any) -> str:
    """The one sentence of a command that failed: the last line of what it said, and no traceback."""
    assert ended.code == 2, ended.stderr
    assert not ended.left_running
    assert "Traceback" not in ended.stderr and ended.stderr.count("celltron: error: ") == 1, ended.stderr
    (*_, last) = ended.stderr.splitlines()
    assert last.startswith("celltron: error: ")
    return str(last)


@pytest.mark.parametrize("name", ["counts.bin", "indices.bin", "manifest.json"])
def test_full_disk_in_a_conversion(warm_python: Any, tiny_h5ad: Path, tmp_path: Path, name: str) -> None:
    ended = warm_python.run(BREAK_WRITES, 100, name, "convert", tiny_h5ad, "--out", tmp_path / "new.store")
    sentence = sentence_of(ended)
    assert "No space left on device" in sentence and "free some space" in sentence
    assert str(tmp_path) in sentence
    assert listing(tmp_path) == {}


def test_file_limit_in_a_conversion(celltron: Celltron, tiny_h5ad: Path, tmp_path: Path) -> None:
    """The system itself refuses to write on, whoever writes: the shards here."""
    ended = celltron("convert", tiny_h5ad, "--out", tmp_path / "new.store", max_file_bytes=4000)
    assert "File too large" in sentence_of(ended) and str(tmp_path) in sentence_of(ended)
    assert listing(tmp_path) == {}


def test_full_disk_leaves_the_store_that_was_to_be_replaced(
    warm_python: Any, tiny_store: Path, tiny_h5ad: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(tiny_store, tmp_path / "a.store"))
    before = listing(tmp_path)
    ended = warm_python.run(BREAK_WRITES, 100, "indices.bin", "convert", tiny_h5ad, "--out", store, "--replace")
    assert "No space left" in sentence_of(ended)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", ["__0_", ".metadata", "run.json", "manifest.json", "latest"])
def test_full_disk_in_a_checkpoint(
    warm_python: Any, celltron: Celltron, tiny_config: Path, tiny_store: Path, tmp_path: Path, name: str
) -> None:
    """The last checkpoint stays, nothing else of the new one, and the run goes on once there is room."""
    arguments = ["--config", tiny_config, "--data", tiny_store, "--out", tmp_path / "run"]
    assert celltron("train", *arguments, "--max-steps=2", "--warmup-steps=0").code == 0
    more = ["train", *arguments, "--resume=auto"]
    ended = warm_python.run(BREAK_WRITES, 5, name, *more)
    sentence = sentence_of(ended)
    assert "No space left on device" in sentence and "free some space" in sentence and str(tmp_path) in sentence
    checkpoints = tmp_path / "run" / "checkpoints"
    complete = {"step_00000002", "step_00000004"} if name == "latest" else {"step_00000002"}
    assert {path.name for path in checkpoints.iterdir()} == complete | {"latest"}
    assert (checkpoints / "latest").read_text() == "step_00000002\n"
    for step in complete:
        verify_checkpoint(checkpoints / step)
    if name != "latest":
        assert celltron(*more).code == 0


@pytest.mark.parametrize("num_bytes", [1_800, 12_000])
def test_file_limit_in_a_checkpoint(
    warm_python: Any, tiny_config: Path, tiny_store: Path, tmp_path: Path, num_bytes: int
) -> None:
    """The small files, then those of tensors, meet the limit, and what they met is told."""
    arguments = ["--config", tiny_config, "--data", tiny_store, "--out", tmp_path / "run"]
    ended = warm_python.run(BREAK_WRITES, num_bytes, "checkpoint", "train", *arguments)
    assert "File too large" in sentence_of(ended) and "step_00000004" in sentence_of(ended)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_run_that_nobody_listens_to_goes_on_to_its_end(
    warm_python: Any, tiny_config: Path, tiny_store: Path, tmp_path: Path
) -> None:
    """As when Ctrl-C, on which a run saves its last step, has ended the `tee` that its words went to."""
    arguments = ["--config", tiny_config, "--data", tiny_store, "--out", tmp_path / "run"]
    ended = warm_python.run(RANKS, 2, tmp_path / "rendezvous", LOSE_READER, "train", *arguments)
    assert (ended.code, ended.left_running, ended.stdout + ended.stderr) == (0, False, "")
    verify_checkpoint(tmp_path / "run" / "checkpoints" / "step_00000004")


@pytest.mark.parametrize("name", ["__1_", "run.json"])
def test_full_disk_on_one_of_two_processes(
    warm_python: Any, tiny_config: Path, tiny_store: Path, tmp_path: Path, name: str
) -> None:
    """Neither waits for the other; whichever ends first says why."""
    arguments = ["--config", tiny_config, "--data", tiny_store, "--out", tmp_path / "run", "--tensor-parallel=2"]
    ended = warm_python.run(RANKS, 2, tmp_path / "rendezvous", BREAK_WRITES, 5, name, "train", *arguments)
    assert ended.code == 2 and not ended.left_running and "Traceback" not in ended.stderr, ended.stderr
    assert "No space left on device" in ended.stderr or "another process" in ended.stderr
    # The main process may be ended before it has cleaned up; the next start does.
    assert not list((tmp_path / "run" / "checkpoints").glob("[!.]*"))


def test_a_second_run_in_a_folder_leaves_the_first_as_it_was(
    celltron: Celltron, tiny_config: Path, tiny_store: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    lock = lock_folder(out)
    assert lock
    (out / RUN_MARK_NAME).write_text("process 7 on node8, since 2026-01-01 10:00 UTC\n")
    before = listing(tmp_path)
    arguments = ["--config", tiny_config, "--data", tiny_store, "--out", out, "--resume=auto"]
    sentence = sentence_of(celltron("train", *arguments))
    os.close(lock)
    assert f"{out} is in use by another run (process 7 on node8, since 2026-01-01 10:00 UTC); stop" in sentence
    assert listing(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write where nobody may")
def test_folder_that_may_not_be_written(celltron: Celltron, tiny_h5ad: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    ended = celltron("convert", tiny_h5ad, "--out", tmp_path / "locked" / "new.store")
    assert "Permission denied" in sentence_of(ended) and "locked" in sentence_of(ended)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "0", "LOCAL_RANK": "0"}, ["RANK, LOCAL_RANK but not WORLD_SIZE", "torchrun"]),
        ({"RANK": "first", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ["'first'", "torchrun"]),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ["RANK", "2", "torchrun"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ["MASTER_ADDR", "torchrun"]),
    ],
    ids=["incomplete", "no number", "rank outside", "no master"],
)
def test_environment_of_no_launcher(
    celltron: Celltron,
    tiny_config: Path,
    tiny_store: Path,
    tmp_path: Path,
    environment: dict[str, str],
    words: list[str],
) -> None:
    arguments = ["--config", tiny_config, "--data", tiny_store, "--out", tmp_path / "run"]
    sentence = sentence_of(celltron("train", *arguments, environment=environment, timeout_seconds=30))
    assert all(word in sentence for word in words), sentence
    assert listing(tmp_path) == {}


def run_bare(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "celltron.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_bare_process_says_one_sentence(tmp_path: Path) -> None:
    ended = run_bare("train", "--data", tmp_path / "a.store", "--out", tmp_path / "run", "model.hidden_sise=3")
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("celltron: error: ") and "model.hidden_size" in line


def test_debugging_shows_where(celltron: Celltron, tmp_path: Path) -> None:
    ended = celltron("info", tmp_path, environment={"CELLTRON_DEBUG": "1"})
    assert ended.code == 2 and "Traceback" in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("celltron: error: ")
