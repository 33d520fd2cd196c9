"""The `celltron` command: what each verb prints and makes, and that a run explains itself."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import yaml

from celltron.cells import CellStore
from celltron.core import MedianTable, __version__

Celltron = Callable[..., Any]
STEP_KEYS = (
    "step loss learning_rate grad_norm real_tokens_per_second cells_per_second real_token_fraction data_wait_fraction"
)


def succeed(ended: Any) -> str:
    assert ended.code == 0, ended.stderr
    assert not ended.left_running
    return str(ended.stdout)


def test_help_and_version(celltron: Celltron) -> None:
    printed = succeed(celltron("--help"))
    for verb in ("convert", "info", "verify", "medians", "train", "export", "plan", "launch"):
        assert f"\n    {verb} " in printed
        assert succeed(celltron(verb, "--help"))
    assert succeed(celltron("--version")) == f"celltron {__version__}\n"


def test_convert_reports_what_it_made(celltron: Celltron, tiny_h5ad: Path, tmp_path: Path) -> None:
    printed = succeed(celltron("convert", tiny_h5ad, "--out", tmp_path / "a.store", "--shard-cells", 50))
    assert "97 cells x 120 genes" in printed and "tiny.h5ad" in printed
    store = CellStore.open(tmp_path / "a.store")
    assert (len(store), store.num_genes, store.num_shards) == (97, 120, 2)
    adata = anndata.read_h5ad(tiny_h5ad)
    for cell in (0, 60, 96):
        gene_index, counts = store[cell]
        assert np.array_equal(gene_index, adata.X[cell].indices) and np.array_equal(counts, adata.X[cell].data)
    assert [path.name for path in tmp_path.iterdir()] == ["a.store"]


def test_convert_options(celltron: Celltron, tiny_cells: anndata.AnnData, tmp_path: Path) -> None:
    adata = tiny_cells.copy()
    adata.layers["counts"] = adata.X.copy()
    adata.raw = adata.copy()
    adata.X = adata.X * 0.5
    adata.obs["batch"] = "one"
    adata.write_h5ad(tmp_path / "a.h5ad")
    source, out = tmp_path / "a.h5ad", tmp_path / "a.store"
    succeed(celltron("convert", source, "--out", out, "--layer", "counts", "--obs-columns", "donor"))
    assert set(CellStore.open(out).obs.columns) == {"cell_id", "source", "total_counts", "donor"}
    assert celltron("convert", source, "--out", out, "--use-raw").code == 2
    succeed(celltron("convert", source, "--out", out, "--use-raw", "--replace"))
    from_raw = CellStore.open(out)
    assert from_raw.dtypes["counts"] == "uint8" and from_raw.total_counts.sum() == tiny_cells.X.sum()
    succeed(celltron("convert", source, "--out", out, "--allow-floats", "--replace"))
    assert CellStore.open(out).dtypes["counts"] == "float32"
    succeed(celltron("convert", source, "--out", out, "--replace", "--layer", "counts", "--keep-unmapped"))


def test_info_verify_medians_of_a_store(celltron: Celltron, tiny_store: Path, tmp_path: Path) -> None:
    assert "97 cells x 120 genes (human)" in succeed(celltron("info", tiny_store))
    assert "matches its checksum" in succeed(celltron("verify", tiny_store))
    assert "medians of 116 genes over 97 cells" in succeed(
        celltron("medians", tiny_store, "--out", tmp_path / "medians.json")
    )
    assert len(MedianTable.from_json(tmp_path / "medians.json")) == 116


def test_a_run_explains_itself(
    celltron: Celltron, tiny_run: Path, read_metrics: Callable[[Path], list[dict[str, Any]]]
) -> None:
    records = read_metrics(tiny_run)
    steps = [record for record in records if "loss" in record]
    validations = [record for record in records if "validation_loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert [record["step"] for record in validations] == [2, 4]
    assert all(set(STEP_KEYS.split()) <= set(record) for record in steps)
    assert all({"step", "validation_loss", "unigram_loss"} <= set(record) for record in validations)
    assert (tiny_run / "checkpoints" / "latest").read_text() == "step_00000004\n"
    checkpoint = tiny_run / "checkpoints" / "step_00000004"
    travelling = {"config.yaml", "vocabulary.json", "medians.json", "split.json", "run.json", "manifest.json"}
    assert travelling <= {path.name for path in checkpoint.iterdir()}
    split = json.loads((checkpoint / "split.json").read_text())
    assert split["groups"] == {
        "donor 0": {"cells": 33, "side": "train"},
        "donor 1": {"cells": 32, "side": "validation"},
        "donor 2": {"cells": 32, "side": "train"},
    }
    assert "checkpoint of step 4" in succeed(celltron("info", checkpoint))
    assert "matches its checksum" in succeed(celltron("verify", checkpoint))
    assert "97 cells" in succeed(celltron("info", tiny_run / "cells.store"))


def test_its_config_reruns_the_job_alone(
    celltron: Celltron,
    tiny_run: Path,
    tmp_path: Path,
    read_metrics: Callable[[Path], list[dict[str, Any]]],
) -> None:
    config = shutil.copy(tiny_run / "checkpoints" / "step_00000004" / "config.yaml", tmp_path / "config.yaml")
    succeed(celltron("train", "--config", config, "--out", tmp_path / "again"))
    exact = ["step", "loss", "grad_norm", "learning_rate", "validation_loss", "unigram_loss"]
    first, again = (
        [{key: record[key] for key in exact if key in record} for record in read_metrics(run)]
        for run in (tiny_run, tmp_path / "again")
    )
    assert first == again and len(first) == 6
    settings = [yaml.safe_load((run / "config.yaml").read_text()) for run in (tiny_run, tmp_path / "again")]
    assert settings[0] | {"out": ""} == settings[1] | {"out": ""}


def test_export_of_a_run(celltron: Celltron, tiny_run: Path, tmp_path: Path) -> None:
    succeed(celltron("export", "--checkpoint", tiny_run, "--out", tmp_path / "hf"))
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {"config.json", "model.safetensors", "token_dictionary.json"} <= names
    assert "matches its checksum" in succeed(celltron("verify", tmp_path / "hf"))


def test_another_run_is_not_continued_into_a_run_in_use(
    celltron: Celltron, tiny_run: Path, tmp_path: Path
) -> None:
    used = Path(shutil.copytree(tiny_run, tmp_path / "used"))
    arguments = ["--config", tiny_run / "config.yaml", "--out", used, "--max-steps=8"]
    ended = celltron("train", *arguments, "--resume", tiny_run / "checkpoints" / "step_00000002")
    assert ended.code == 2 and "holds a run already" in ended.stderr
    ended = celltron("train", *arguments, "--resume", used / "checkpoints" / "step_00000004")
    assert "continuing with step 5 of 8" in ended.stderr
    succeed(ended)


def test_ctrl_c_saves_and_continues(
    warm_python: Any, celltron: Celltron, tiny_config: Path, tiny_store: Path, tmp_path: Path
) -> None:
    arguments = ["--config", tiny_config, "--data", tiny_store, "--out", tmp_path / "run"]
    process = warm_python.start("-m", "celltron.cli.main", "train", *arguments, "--max-steps=100000")
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists(), process)
    os.kill(process.pid, signal.SIGINT)
    ended = process.wait()
    assert ended.code == 130 and not ended.left_running
    assert "continue with --resume auto" in ended.stderr.splitlines()[-1]
    step = int((tmp_path / "run" / "checkpoints" / "latest").read_text()[5:])
    ended = celltron("train", *arguments, f"--max-steps={step + 1}", "--resume=auto")
    assert f"continuing with step {step + 1:,}" in ended.stderr
    succeed(ended)


def test_ctrl_c_in_a_conversion_and_how_it_goes_on(
    warm_python: Any, tiny_cells: anndata.AnnData, tmp_path: Path
) -> None:
    anndata.concat([tiny_cells] * 200, index_unique="-").write_h5ad(tmp_path / "many.h5ad")
    out = tmp_path / "many.store"
    process = warm_python.start("-m", "celltron.cli.main", "convert", tmp_path / "many.h5ad", "--out", out)
    wait_for(lambda: (tmp_path / ".many.store.partial" / "shards").exists(), process)
    os.kill(process.pid, signal.SIGINT)
    ended = process.wait()
    assert ended.code == 130
    sentence = f"interrupted; the same command goes on with {out} from the shards that are complete"
    assert ended.stderr.endswith(f"celltron: error: {sentence}\n")
    assert {path.name for path in tmp_path.iterdir()} == {"many.h5ad", ".many.store.partial"}
    succeed(warm_python.run("-m", "celltron.cli.main", "convert", tmp_path / "many.h5ad", "--out", out))
    assert {path.name for path in tmp_path.iterdir()} == {"many.h5ad", "many.store"}
    assert len(CellStore.open(out)) == 97 * 200


def wait_for(is_there: Callable[[], bool], process: Any, timeout_seconds: float = 60) -> None:
    end = time.monotonic() + timeout_seconds
    while not is_there():
        assert time.monotonic() < end, process.stderr.read_text()
        time.sleep(0.002)
