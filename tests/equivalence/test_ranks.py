"""The launcher of the other tests: a rank that dies fails the run and leaves nobody waiting."""

import time
from pathlib import Path
from typing import Any

import pytest

RANKS = Path(__file__).with_name("ranks.py")
BARRIER = "torch.distributed.barrier()"
DEATHS = {
    "an exception": ("raise ValueError('of rank 1')", 1),
    "an exit code": ("sys.exit(3)", 3),
    "a kill": ("os.kill(os.getpid(), signal.SIGKILL)", 247),
}


def write_program(path: Path, last_rank_does: str) -> Path:
    path.write_text(
        "import os, signal, sys, torch\n"
        "rank = torch.distributed.get_rank()\n"
        "words = f'rank {rank} of', str(torch.distributed.get_world_size()), os.environ['RANK'], *sys.argv[1:]\n"
        "os.write(1, f'{\" \".join(words)}\\n'.encode())  # at once, or ranks' words mix\n"
        f"if rank == 1:\n    {last_rank_does}\n{BARRIER}\n"
    )
    return path


def test_every_rank_runs_the_program(tmp_path: Path, warm_python: Any) -> None:
    program = write_program(tmp_path / "program.py", "pass")
    ended = warm_python.run(RANKS, 3, tmp_path / "rendezvous", program, "an argument")
    assert ended.code == 0 and not ended.left_running, ended.stderr
    assert sorted(ended.stdout.splitlines()) == [f"rank {rank} of 3 {rank} an argument" for rank in range(3)]


@pytest.mark.parametrize("death", DEATHS)
def test_a_rank_that_dies_ends_the_run(tmp_path: Path, warm_python: Any, death: str) -> None:
    dies, code = DEATHS[death]
    program = write_program(tmp_path / "program.py", dies)
    start = time.monotonic()
    ended = warm_python.run(RANKS, 2, tmp_path / "rendezvous", program, timeout_seconds=60)
    assert ended.code == code and not ended.left_running
    assert "rank 1 ended with" in ended.stderr
    assert time.monotonic() - start < 30
