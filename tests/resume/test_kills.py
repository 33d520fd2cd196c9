"""A run of two ranks, killed again and again and restarted, is the run that was not killed; none hangs or lives on."""

import json
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import anndata
import pytest

from celltron.cells import convert
from celltron.recipes.benchmarks.compare_runs import compare_runs, find_litter, read_metrics
from celltron.recipes.benchmarks.kills import (
    Kill,
    Pace,
    Watch,
    family_of,
    kill_processes,
    plan_kills,
    run_under_fire,
    run_undisturbed,
    start_torchrun,
    wait_until_gone,
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

PROGRAM = Path(__file__).with_name("run_recipe.py")
RANKS = Path(__file__).parents[1] / "equivalence" / "ranks.py"
NUM_KILLS = 10
SAVE_EVERY = 5
KEEP = 2
MAX_STEPS = SAVE_EVERY * (NUM_KILLS + 2)


@dataclass
class Fork:
    """A launcher that does not restart its ranks: ranks.py in a fork of the warm Python."""

    process: Any
    code: int | None = None

    @property
    def pid(self) -> int:
        pid: int = self.process.pid
        return pid

    def poll(self) -> int | None:
        return self.wait(0.001)

    def wait(self, timeout: float) -> int | None:
        if self.code is None:
            self.code = self.process.ask({"pid": self.pid, "timeout_seconds": timeout})
        return self.code


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_cells: anndata.AnnData) -> Path:
    """Where this file's runs lie, with their store."""
    path = tmp_path_factory.mktemp("kills")
    tiny_cells[:41].write_h5ad(path / "cells.h5ad")
    convert([path / "cells.h5ad"], path / "cells.store")
    return path


@pytest.fixture(scope="module")
def arguments(folder: Path, tiny_config: Path) -> Callable[[str], list[str]]:
    """`arguments(name)`: the command line of the run of that name, new or continued."""
    settings = [f"--max-steps={MAX_STEPS}", f"loop.save_every={SAVE_EVERY}", f"loop.keep_checkpoints={KEEP}"]
    data = ["--config", str(tiny_config), "--data", str(folder / "cells.store"), "--global-batch-size=4"]
    return lambda name: [*data, *settings, "--out", str(folder / name), "--resume=auto"]


@pytest.fixture(scope="module")
def start(folder: Path, warm_python: Any, arguments: Callable[[str], list[str]]) -> Callable[..., Fork]:
    """`start(name)`: two ranks of that run; every start notes its batches in a file of its own."""
    lives = count()

    def start_ranks(name: str) -> Fork:
        life = next(lives)
        record = folder / f"{name}.batches.{life:03}"
        return Fork(warm_python.start(RANKS, 2, folder / f"meet{life}", PROGRAM, record, "-", *arguments(name)))

    return start_ranks


@pytest.fixture(scope="module")
def undisturbed(folder: Path, start: Callable[..., Fork]) -> Pace:
    """The run that nothing disturbed, and its pace."""
    return run_undisturbed(folder / "undisturbed", partial(start, "undisturbed"), world_size=2)[1]


def read_lives(folder: Path, name: str, rank: int) -> list[list[dict[str, Any]]]:
    """What a rank trained on, from every start of a run; a kill may have cut the last line short."""
    files = sorted(folder.glob(f"{name}.batches.*.{rank}"))
    return [[json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] for file in files]


def test_ten_kills_change_nothing(folder: Path, start: Callable[..., Fork], undisturbed: Pace) -> None:
    kills = plan_kills(NUM_KILLS, world_size=2, save_every=SAVE_EVERY, seed=4, victims=["rank", "rank", "all"])
    story = run_under_fire(folder / "killed", partial(start, "killed"), kills, undisturbed, world_size=2)
    assert [kill for kill, *_ in story.kills] == kills and story.num_launches == NUM_KILLS + 1
    assert compare_runs(folder / "killed", folder / "undisturbed") == []
    assert find_litter(folder / "killed", keep=KEEP) == []
    steps = [record["step"] for record in read_metrics(folder / "killed") if "loss" in record]
    assert steps == list(range(1, MAX_STEPS + 1))
    for rank in range(2):
        (batches,) = read_lives(folder, "undisturbed", rank)
        assert len(batches) == MAX_STEPS
        lives = [life for life in read_lives(folder, "killed", rank) if life]
        assert lives[0] == batches[: len(lives[0])] and lives[-1] == batches[-len(lives[-1]) :]
        for life in lives:
            # It goes on from a checkpoint with the very cells and masks of the steps that follow it.
            assert life in [batches[first:][: len(life)] for first in range(0, MAX_STEPS, SAVE_EVERY)]


def test_torchrun_restarts_and_stops_and_takes_its_ranks_along(
    folder: Path, start: Callable[..., Fork], undisturbed: Pace, arguments: Callable[[str], list[str]]
) -> None:
    run, log = folder / "torchrun", folder / "torchrun.log"
    begin = partial(start_torchrun, arguments("torchrun"), world_size=2, log=log)
    launcher = begin(max_restarts=1)
    at_step = Kill(moment="step", after_steps=SAVE_EVERY + 1, fraction=0.5, victim="rank", rank=1)
    watch = Watch(run, launcher, world_size=2)
    ranks = watch.wait_for_ranks(unlike=[])
    assert watch.wait_for_moment(at_step, undisturbed), log.read_text()
    kill_processes({ranks[1]})
    watch = Watch(run, launcher, world_size=2)
    assert watch.wait_for_ranks(unlike=ranks) and watch.wait_for_moment(at_step, undisturbed), log.read_text()
    family = family_of(launcher.pid)
    os.kill(launcher.pid, signal.SIGTERM)
    assert launcher.wait(60) != 0 and not wait_until_gone(family)
    stopped_at = read_metrics(run)[-1]["step"]
    assert (run / "checkpoints" / "latest").read_text() == f"step_{stopped_at:08d}\n"
    assert "continuing with step 6" in log.read_text() and "continue with --resume auto" in log.read_text()

    launcher = begin(max_restarts=1, fork=True)
    assert Watch(run, launcher, world_size=2).wait_for_moment(at_step, undisturbed), log.read_text()
    family = family_of(launcher.pid)
    kill_processes({launcher.pid})
    launcher.wait(60)
    assert not wait_until_gone(family), "ranks outlived torchrun"

    assert start("torchrun").wait(60) == 0
    assert compare_runs(run, folder / "undisturbed") == []


@pytest.mark.parametrize("failure", ["RAISE@7", "KILL"])
def test_a_rank_that_dies_ends_the_others_with_its_reason(
    folder: Path, warm_python: Any, arguments: Callable[[str], list[str]], failure: str
) -> None:
    """Without a launcher that would end them, as srun starts ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [PROGRAM, "-", "-" if failure == "KILL" else failure, *arguments(f"dies of {failure}")]
    ranks = [
        warm_python.start(*command, "--max-steps=100000", environment=meeting | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]
    if failure == "KILL":
        metrics = folder / f"dies of {failure}" / "metrics.jsonl"
        while not metrics.exists():
            assert Fork(ranks[0]).poll() is None
        ranks[1].kill()
    survivor, victim = (rank.wait(30) for rank in ranks)
    assert survivor.code == 2 and not survivor.left_running
    assert survivor.stderr.endswith(
        "celltron: error: another process of this run ended; its own message, or the launcher, says why\n"
    )
    assert "Traceback" not in survivor.stderr
    if failure != "KILL":
        assert victim.code == 2
        assert victim.stderr.endswith("celltron: error: shard 3 of a.store cannot be read; restore it\n")
