"""The benchmark of saving on very little: both kinds of run are timed, and the one of them writes checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[2] / "recipes" / "benchmarks" / "saving.py"


@pytest.mark.slow
def test_runs_with_and_without_saves_are_timed(warm_python: Any, tmp_path: Path) -> None:
    small = ["--shape", "tiny", "--cells", "2", "max_length=32", "--save-every", "4", "--repeats", "2"]
    ended = warm_python.run(PROGRAM, *small, "--threads", "1", "--out", tmp_path, timeout_seconds=300)
    assert ended.code == 0 and not ended.left_running, ended.stderr
    results = json.loads((tmp_path / "saving.json").read_text())
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in results["seconds"].values())
    with_one, without = results["seconds"]["saving"], results["seconds"]["without"]
    assert results["cost"] == pytest.approx(sum(with_one) / sum(without) - 1)
    # Parameters and AdamW's two moments in float32, which those of the embedding alone are most of.
    assert results["bytes"] > 3 * 4 * 128 * results["cells"]["vocabulary"]
    assert "| with a save in 4 |" in (tmp_path / "saving.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saving.json", "saving.md"]


def test_what_cannot_be_measured_is_refused(warm_python: Any) -> None:
    ended = warm_python.run(PROGRAM, "--save-every", "1")
    assert ended.code == 2 and len(ended.stderr.splitlines()) == 1, ended.stderr
    assert "save_every is 1: wanted 2 or more" in ended.stderr
