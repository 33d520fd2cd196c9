"""The benchmark of scaling on very little: bytes counted are those of the formulas, and results are written."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from celltron.core import InputError
from celltron.recipes.benchmarks import bench_scaling, scaling
from celltron.recipes.benchmarks.bench_scaling_report import compare_rates

PROGRAM = Path(__file__).parents[2] / "recipes" / "benchmarks" / "scaling.py"
LAYOUTS = ["data", "data_distributed", "tensor", "sequence", "context", "pipeline"]
SCALARS = 100
"""Bytes that a step sends besides what the formulas count: sums of losses and counts, norms, flags."""


@pytest.mark.slow
def test_layouts_are_measured_and_their_bytes_are_those_of_the_formulas(warm_python: Any, tmp_path: Path) -> None:
    small = ["--shape", "tiny", "--cells", "2", "max_length=32", "pack_cells=1", "--steps", "1"]
    two = ["--processes", "2", "--modes", "weak", "--threads", "1"]
    ended = warm_python.run(PROGRAM, *small, *two, "--out", tmp_path, timeout_seconds=300)
    assert ended.code == 0 and not ended.left_running, ended.stderr
    results = json.loads((tmp_path / "scaling.json").read_text())
    runs = results["runs"]
    assert [run["layout"] for run in runs] == LAYOUTS
    for run in runs:
        assert run["mode"] == "weak" and run["num_cells"] == 4 and run["processes"] == 2
        assert run["real_tokens_per_second"] > run["cells_per_second"] > 0 and run["efficiency"] == 1.0
        assert run["formula_bytes"] > 10_000, run
        for part in run["sent"]:
            assert abs(part["counted"] - part["formula"]) <= SCALARS, (run["layout"], part)
    kinds = {run["layout"]: {(part["group"], part["kind"]) for part in run["sent"]} for run in runs}
    assert ("data", "reduce_scatter") in kinds["data_distributed"] and ("pipeline", "send") in kinds["pipeline"]
    assert ("context", "all_gather") in kinds["context"]
    assert ("tensor", "all_gather") in kinds["sequence"] and ("tensor", "all_gather") not in kinds["tensor"]
    assert "tensor" in (tmp_path / "scaling.txt").read_text()
    assert "| weak | pipeline | 2 |" in (tmp_path / "scaling.md").read_text()
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_rates_are_compared_with_the_fewest_processes() -> None:
    def run(mode: str, layout: str, processes: int, rate: float) -> dict[str, Any]:
        return {"mode": mode, "layout": layout, "processes": processes, "real_tokens_per_second": rate}

    runs = [run("strong", "one", 1, 100.0), run("strong", "data", 4, 300.0), run("weak", "tensor", 2, 120.0)]
    compare_rates(runs)
    assert [each["efficiency"] for each in runs] == [1.0, 0.75, 0.6]
    runs = [run("strong", "data", 2, 100.0), run("strong", "data", 4, 300.0), run("strong", "tensor", 4, 120.0)]
    compare_rates(runs)
    # Two processes were not measured under that layout.
    assert [each["efficiency"] for each in runs] == [1.0, 1.5, None]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layouts", "data,ring"], ["'data,ring'", "data_distributed"]),
        (["--modes", "fixed"], ["'fixed'", "strong, weak"]),
        (["--processes", "one"], ["'one'", "1,2"]),
        (["--processes", "0,2"], ["'0,2'"]),
    ],
)
def test_what_cannot_be_measured_is_refused(warm_python: Any, arguments: list[str], words: list[str]) -> None:
    ended = warm_python.run(PROGRAM, *arguments)
    assert ended.code == 2 and len(ended.stderr.splitlines()) == 1, ended.stderr
    assert all(word in ended.stderr for word in words)


def test_fewer_gpus_than_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="no GPU, PyTorch sees 2"):
        scaling.main(["--device", "cuda", "--processes", "1,2,3", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_what_a_process_refuses_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_one(command: list[str], **unused: Any) -> SimpleNamespace:
        """As torchrun starts the program on its last argument, which ends with a code."""
        return SimpleNamespace(returncode=bench_scaling.main(command[-1:]), stderr="ChildFailedError")

    def refuse(*unused: Any) -> None:
        raise InputError("no bf16 here; take another")

    monkeypatch.setattr(bench_scaling, "choose_device", refuse)
    monkeypatch.setattr(subprocess, "run", run_one)
    facts = {"vocabulary": 8, "pad_id": 0}
    config = scaling.Config(threads=torch.get_num_threads())
    with pytest.raises(InputError, match="^no bf16 here; take another$"):
        scaling.launch(config, 1, [], facts, tmp_path)
    assert capsys.readouterr().err == ""
    assert bench_scaling.main([str(tmp_path / "job.1")]) == 2
