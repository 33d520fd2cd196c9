"""The benchmarks run from the command line on very little, and write their results."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from celltron.cells import NO_LABEL
from celltron.core import InputError
from celltron.models.geneformer import GeneformerConfig
from celltron.recipes.benchmarks import bench_embed, bench_fit, embed, saving, scaling, train_step
from celltron.recipes.benchmarks.bench_compare import measure
from celltron.recipes.shared import pretrain_batches

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
    ended = run("train_step.py", *SMALL_STEP, "--cells-of-length", "48", *once)
    assert ended.returncode == 0, ended.stderr
    results = json.loads((tmp_path / "train_step.json").read_text())
    systems = ["ours_packed", "ours_padded", "hf_grouped", "hf_padded"]
    for name in systems:
        row = results[name]
        assert row["real_tokens_per_second"] > row["cells_per_second"] > 0 and row["seconds"]["steps"] == 1
    assert [results[name]["cells"] for name in systems] == [8, 8, 8, 4]
    assert results["ours_packed"]["tokens"] == results["hf_grouped"]["tokens"] == 8 * 48
    assert set(results["ratios"]) == {f"{ours} / {theirs}" for ours in systems[:2] for theirs in systems[2:]}
    # The same operations of the same cells: rates are as 1 / seconds, and their share is of one peak.
    flops = {name: results[name]["flops_per_second"] * results[name]["seconds"]["median"] for name in systems}
    assert flops["ours_packed"] == pytest.approx(flops["ours_padded"]) == pytest.approx(flops["hf_grouped"])
    # Two layers 128 wide, 8 cells of 48 tokens; then the head, on fewer than 30 % of the tokens.
    no_head = 3 * 2 * 384 * (8 * 128 * 128 + 4 * 128 * 256 + 4 * 128 * 48)
    assert no_head < flops["ours_packed"] < no_head + 3 * 2 * 0.3 * 384 * 128 * (128 + 25_426)
    for name in systems:
        row = results[name]
        assert row["model_flops_utilization"] == pytest.approx(row["flops_per_second"] / results["peak_flops"])
    assert results["layers"]["layers"] == "torch" and results["layers"]["reason"] == "the device is a CPU"
    text, markdown = (tmp_path / "train_step.txt").read_text(), (tmp_path / "train_step.md").read_text()
    assert "ours_packed / hf_padded" in text and "each of 48 different genes" in text and "TFLOP/s   of peak" in text
    assert "torch (the device is a CPU), not compiled" in text
    assert "| ours_packed |" in markdown and "| TFLOP/s | of peak |" in markdown
    assert (tmp_path / "train_step.png").read_bytes().startswith(b"\x89PNG")


def test_made_up_cells_have_one_length_and_follow_from_the_seed() -> None:
    batch, facts = train_step.make_cells(16, 512, seed=3)
    assert batch.lengths.tolist() == [512] * 16 and facts["median_length"] == facts["longest"] == 512
    is_masked = batch.labels != NO_LABEL
    genes = np.where(is_masked, batch.labels, batch.tokens).reshape(16, 512)
    assert all(len(set(row)) == 512 for row in genes.tolist()) and genes.min() >= 2 and genes.max() < 25_426
    assert is_masked.mean() == pytest.approx(0.15, abs=0.02)  # 4 sigma
    again, other = (train_step.make_cells(16, 512, seed=seed)[0] for seed in (3, 4))
    assert np.array_equal(batch.tokens, again.tokens) and np.array_equal(batch.labels, again.labels)
    assert not np.array_equal(batch.tokens, other.tokens)


def test_operations_are_those_of_the_cells_with_their_masks() -> None:
    batch, facts = train_step.make_cells(2, 64, seed=0)
    shape = GeneformerConfig(num_layers=1, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2)
    num_masked = int((batch.labels != NO_LABEL).sum())
    layer = 128 * (8 * 8 * 8 + 4 * 8 * 16) + 4 * 8 * 2 * 64 * 64
    head = 2 * num_masked * 8 * (8 + 25_426)
    assert train_step.count_flops(shape, facts["vocabulary"], batch) == pytest.approx(3 * (layer + head))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--layers", "te"], "engine.layers is te, but the device is a CPU"),
        (["--cells-of-length", "4096"], "wanted at most max_length"),
        (["--cells-of-length", "64", "--data", "cells.h5ad"], "leave one out"),
    ],
)
def test_what_cannot_be_is_refused_at_once(arguments: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        train_step.main(arguments)


def test_cells_that_do_not_fill_batches_are_refused() -> None:
    with pytest.raises(InputError, match="cells is 12: wanted a multiple of"):
        train_step.main(["--cells", "12"])


@pytest.mark.parametrize("program", [train_step, embed, saving, scaling])
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--device", "cuda"], "device is cuda, but PyTorch .* sees no GPU"),
        (["--cells", "1024"], "has 97 cells: wanted 1,024|has 97 cells: wanted 2,048"),
    ],
)
def test_what_is_refused_leaves_no_folder(
    program: ModuleType,
    arguments: list[str],
    words: str,
    tiny_h5ad: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module in (bench_embed, train_step):
        monkeypatch.setattr(module, "require_transformers", lambda: None)
    with pytest.raises(InputError, match=words):
        program.main([*arguments, "--data", str(tiny_h5ad), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def refuse(job: dict[str, Any]) -> dict[str, Any]:
    raise InputError(f"no {job['wanted']} here; take another")


def test_what_another_process_refuses_is_one_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="^no bf16 here; take another$"):
        measure(refuse, {"device": "cpu", "system": "ours_packed", "wanted": "bf16"})
    assert capfd.readouterr().err == ""


def test_batches_are_made_ahead_in_a_thread_and_put_by_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a run; what processes have to agree on is part of the step, and so of what is counted."""
    batch, facts = train_step.make_cells(32, 8, seed=0)
    config = train_step.make_run(train_step.Config(shape="tiny", cells=32, max_length=64, steps=2), is_packed=True)
    made: list[str] = []
    put: list[str] = []

    def prepare(*arguments: Any) -> Any:
        made.append(threading.current_thread().name)
        return pretrain_batches.prepare_step_batch(*arguments)

    def put_where_counted(*arguments: Any) -> Any:
        put.append(threading.current_thread().name)
        return pretrain_batches.put_step_batch(*arguments)

    def fit(loop: Any, job: Any) -> None:
        batches = [next(job.train) for _ in range(loop.max_steps)]
        assert [(one.num_cells, one.num_tokens) for one in batches] == [(32, 256)] * 3
        job.validation()

    for name, fake in {
        "make_model": lambda *arguments, **more: (None, None),
        "data_parallel_place": lambda: (0, 1),
        "prepare_step_batch": prepare,
        "put_step_batch": put_where_counted,
        "fit": fit,
    }.items():
        monkeypatch.setattr(bench_fit, name, fake)
    monkeypatch.setattr(pretrain_batches, "context_parallel_place", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    steps = bench_fit.fit_steps(config, batch, num_tokens=facts["vocabulary"], pad_id=facts["pad_id"])
    assert len(steps.seconds) == 2
    assert put == [threading.main_thread().name] * 3
    assert len(made) >= 3 and all(name.startswith("celltron-batches") for name in made)
