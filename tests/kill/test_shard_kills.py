"""Writing tar shards is killed at random moments: nothing half-done opens, and the same call ends in the same bytes."""

import filecmp
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from celltron.cells import CellStore
from celltron.cells.tar_store import TarStore
from celltron.cells.tar_writer import shard_store
from celltron.core import InputError

NUM_KILLS, NUM_KILLS_REPLACING = 36, 15


def shard(store: CellStore, out: Path, *, replace: bool) -> None:
    """17 tars of six cells each."""
    shard_store(store, out, block_cells=6, shard_bytes=1, workers=2, replace=replace)


def start(store: CellStore, out: Path, *, replace: bool) -> int:
    """Fork a process that writes the shards."""
    pid = os.fork()
    if pid == 0:
        try:
            shard(store, out, replace=replace)
        finally:
            os._exit(0)
    return pid


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def is_same(first: Path, second: Path) -> bool:
    return files_of(first) == files_of(second) == filecmp.cmpfiles(first, second, files_of(first), shallow=False)[0]


@pytest.fixture(scope="module")
def store(tiny_store: Path) -> CellStore:
    return CellStore.open(tiny_store)


@pytest.fixture(scope="module")
def whole(store: CellStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run writes."""
    out = tmp_path_factory.mktemp("whole") / "a.tars"
    shard(store, out, replace=False)
    return out


@pytest.fixture(scope="module")
def seconds(store: CellStore, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """How long a run takes that nobody kills."""
    began = time.monotonic()
    os.waitpid(start(store, tmp_path_factory.mktemp("timed") / "a.tars", replace=False), 0)
    return time.monotonic() - began


def delays(seconds: float, number: int) -> list[float]:
    moments = random.Random(7)
    return [moments.uniform(0, 1.05 * seconds) for _ in range(number)]


def kill_after(delay: float, pid: int) -> None:
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_killed_and_called_again(store: CellStore, whole: Path, seconds: float, tmp_path: Path) -> None:
    out, partial = tmp_path / "a.tars", tmp_path / ".a.tars.partial"
    done: list[int] = []
    for number, delay in enumerate(delays(seconds, NUM_KILLS)):
        kill_after(delay, start(store, out, replace=False))
        done.append(len(list((partial / "done").glob("0*.json"))))
        if out.exists():  # the moment came after the end
            assert is_same(out, whole)
            shutil.rmtree(out)
            continue
        with pytest.raises(InputError, match="does not exist"):
            TarStore.open(out)
        if number % 3:  # what is left is now and then killed again before it is complete
            shard(store, out, replace=False)
            assert is_same(out, whole)
            assert not partial.exists()
            shutil.rmtree(out)
    assert len(set(done)) >= 5, done


def test_killed_while_replacing(store: CellStore, whole: Path, seconds: float, tmp_path: Path) -> None:
    old, out = tmp_path / "old.tars", tmp_path / "a.tars"
    shard_store(store, old, block_cells=50)
    shutil.copytree(old, out)
    for delay in delays(seconds, NUM_KILLS_REPLACING):
        kill_after(delay, start(store, out, replace=True))
        with TarStore.open(out) as shards:
            shards.verify()
        assert is_same(out, old) or is_same(out, whole)
        if is_same(out, whole):
            shutil.rmtree(out)
            shutil.copytree(old, out)
    shard(store, out, replace=True)
    assert is_same(out, whole)
