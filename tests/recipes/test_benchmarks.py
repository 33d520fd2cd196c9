"""The benchmarks run from the command line on very little, and write their results."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "recipes" / "benchmarks"


def run(program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(PROGRAMS / program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of conversion, ranked cache and both readers on 400 made cells; there is no environment of peers."""
    folder = tmp_path_factory.mktemp("bench")
    nowhere = str(folder / "none" / "python")
    only = "celltron_cache,celltron_fly,scdl"
    chosen = ["--only", only, "--peers-python", nowhere, "--out", str(folder)]
    ended = run("data_loading.py", "--tiny", *chosen, "cores=1", "threads=1")
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((out / "data_loading.json").read_text())
    return loaded


@pytest.mark.slow
def test_celltron_is_measured_and_missing_peers_are_named(results: dict[str, Any]) -> None:
    (data,) = results["datasets"]
    assert data["about"]["cells"] == 400 and data["about"]["genes"] == 20_000
    rows = {row["label"]: row for row in [*data["conversions"], *data["readers"]]}
    ours = {label for label in rows if rows[label]["system"].startswith("celltron")}
    assert ours == {"celltron", "celltron, tokens", "celltron, ranked cache", "celltron, from counts"}
    for label in ours:
        row = rows[label]
        assert row["status"] == "measured" and row["cells_per_second"]["median"] > 100, row
        assert row["cells"] >= 64 and row["peak_bytes"] > 0 and "numba" in row["versions"]
    assert {rows[label]["status"] for label in rows.keys() - ours} == {"not installed"}
    assert rows["celltron"]["bytes_per_non_zero"] < 4.0
    assert results["machine"]["cores"] >= 1 and results["commit"]


@pytest.mark.slow
def test_tables_and_plot_are_written(out: Path, results: dict[str, Any]) -> None:
    table, markdown = (out / "data_loading.txt").read_text(), (out / "data_loading.md").read_text()
    assert "made cells: 400 cells x 20,000 genes" in table and "make bench-env" in table
    assert results["command"] in markdown and markdown.startswith(f"## {results['date']}: data loading")
    assert (out / "data_loading.png").read_bytes().startswith(b"\x89PNG")


def test_a_system_that_is_not_measured_is_refused() -> None:
    ended = run("data_loading.py", "--tiny", "--only", "celltron_fly,scbig")
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1
    assert "'scbig'" in ended.stderr and "scdataset" in ended.stderr


SMALL_STEP = ["--shape", "tiny", "--cells", "8", "batch_size=2", "padded_share=2", "max_length=64"]


@pytest.mark.slow
def test_training_steps_are_compared(tmp_path: Path) -> None:
    once = ["--steps", "1", "--repeats", "1", "--threads", "1", "--out", str(tmp_path)]
    ended = run("train_step.py", *SMALL_STEP, *once)
    assert ended.returncode == 0, ended.stderr
    results = json.loads((tmp_path / "train_step.json").read_text())
    systems = ["ours_packed", "ours_padded", "hf_grouped", "hf_padded"]
    for name in systems:
        row = results[name]
        assert row["real_tokens_per_second"] > row["cells_per_second"] > 0 and row["seconds"]["steps"] == 1
    assert [results[name]["cells"] for name in systems] == [8, 8, 8, 4]
    assert results["ours_packed"]["tokens"] == results["hf_grouped"]["tokens"] <= 8 * 64
    assert set(results["ratios"]) == {f"{ours} / {theirs}" for ours in systems[:2] for theirs in systems[2:]}
    assert "ours_packed / hf_padded" in (tmp_path / "train_step.txt").read_text()
    assert "| ours_packed |" in (tmp_path / "train_step.md").read_text()
    assert (tmp_path / "train_step.png").read_bytes().startswith(b"\x89PNG")


def test_cells_that_do_not_fill_batches_are_refused() -> None:
    ended = run("train_step.py", "--cells", "12")
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1 and "multiple of" in ended.stderr
