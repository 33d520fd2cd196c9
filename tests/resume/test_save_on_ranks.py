"""Saving beside the training with several processes: each tells the others, and all end a save at the same step."""

from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).with_name("save_on_ranks.py")
RANKS = Path(__file__).parents[1] / "equivalence" / "ranks.py"
CHECKS = ["replicated", "distributed", "kinds in float32", "kinds in bfloat16"]
CHECKS += ["full disk on 0", "full disk on 1", "full disk on 0 at the end"]


def test_two_ranks_save_together(warm_python: Any, tmp_path: Path) -> None:
    ended = warm_python.run(RANKS, 2, tmp_path / "rendezvous", PROGRAM, tmp_path)
    assert ended.code == 0 and not ended.left_running, ended.stderr
    assert sorted(ended.stdout.splitlines()) == sorted(f"{check}: {rank}" for check in CHECKS for rank in (0, 1))
