"""The quickstart on tiny cells: what it prints, makes, replaces and leaves alone; what it bundles; what make calls."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from celltron.core import load_config
from celltron.recipes import quickstart
from celltron.recipes.geneformer_pretrain import Config

PROGRAM = Path(__file__).with_name("run_quickstart.py")
ROOT = Path(__file__).parents[2]
SUMMARY_KEYS = ["validation_loss", "unigram_loss", "train_seconds", "checkpoint", "huggingface_folder"]


@pytest.fixture(scope="module")
def run(warm_python: Any, tiny_h5ad: Path, tiny_config: Path) -> Callable[..., Any]:
    return lambda *words, **more: warm_python.run(PROGRAM, tiny_h5ad, tiny_config, *words, **more)


def test_quickstart_and_its_repetition(
    run: Callable[..., Any], tmp_path: Path, read_metrics: Callable[[Path], list[dict[str, Any]]]
) -> None:
    for _ in range(2):
        ended = run(cwd=tmp_path)
        assert ended.code == 0, ended.stderr
        commands = [line for line in ended.stdout.splitlines() if line.startswith("$ ")]
        assert [line.split()[:3] for line in commands] == [
            ["$", "celltron", verb] for verb in ("convert", "train", "verify", "export")
        ]
        out = tmp_path / "quickstart"
        summary = json.loads((out / "summary.json").read_text())
        assert list(summary) == SUMMARY_KEYS
        validation = read_metrics(out / "run")[-1]
        assert summary["validation_loss"] == validation["validation_loss"]
        assert summary["unigram_loss"] == validation["unigram_loss"]
        assert summary["train_seconds"] > 0
        assert (tmp_path / summary["checkpoint"] / "manifest.json").is_file()
        assert (tmp_path / summary["huggingface_folder"] / "model.safetensors").is_file()
        for path in (summary["checkpoint"], summary["huggingface_folder"], "quickstart/summary.json"):
            assert f"  {path}\n" in f"{ended.stdout}\n"
        assert f"{summary['validation_loss']:.3f} nats" in ended.stdout
        (out / "notes.txt").write_text("kept")
    assert (out / "notes.txt").read_text() == "kept"
    assert len(list((out / "run" / "checkpoints").glob("step_*"))) == 1


def test_quickstart_removes_nothing_of_another(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("two years of work")
    ended = run("--out", tmp_path)
    assert ended.code == 2
    assert ended.stderr.startswith("celltron: error: ") and str(tmp_path) in ended.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "thesis.txt"]


def test_quickstart_says_which_command_failed(run: Callable[..., Any], tmp_path: Path) -> None:
    ended = run("--device=cuda", cwd=tmp_path, environment={"CUDA_VISIBLE_DEVICES": ""})
    assert ended.code == 2
    device, train = [line for line in ended.stderr.splitlines() if line.startswith("celltron: error: ")]
    assert "sees no GPU" in device and "celltron train failed with exit code 2" in train
    assert not (tmp_path / "quickstart" / "summary.json").exists()


def test_what_it_bundles() -> None:
    assert quickstart.CELLS.stat().st_size <= 5e6
    about = (quickstart.CELLS.parent / "README.md").read_text()
    assert "CC BY" in about or "MIT" in about
    load_config(Config, quickstart.CONFIG, ["data.paths=a.store", "out=a"])


def test_make_calls_it() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "recipes/quickstart.py --device $(DEVICE)" in makefile and "DEVICE ?= cpu" in makefile
