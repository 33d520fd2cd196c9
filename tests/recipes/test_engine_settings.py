"""What the engine is asked for, and what a run says of it."""

from pathlib import Path
from typing import Any

import pytest

from celltron.cells.corpus import DataConfig
from celltron.models.geneformer import GeneformerConfig
from celltron.recipes.geneformer_pretrain import Config
from celltron.train.engine import EngineConfig
from celltron.train.parallel import ParallelConfig

SHAPE = {"hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4}


def make(engine: dict[str, Any], *, precision: Any = "bf16", parallel: Any = None, **shape: int) -> Config:
    return Config(
        out="a",
        precision=precision,
        data=DataConfig(paths="a.store", max_length=40),
        model=GeneformerConfig(**SHAPE | shape),
        engine=EngineConfig(**engine),
        parallel=ParallelConfig(**parallel or {}),
    )


@pytest.mark.parametrize(
    ("fp8", "parallel", "multiple"),
    [
        ("none", {}, 1),
        ("tensorwise", {}, 16),
        ("blockwise", {"tensor": 2}, 16),
        ("tensorwise", {"tensor": 2, "sequence_parallel": True}, 32),
        ("mxfp8", {"context": 2}, 64),
        ("tensorwise", {"tensor": 2, "sequence_parallel": True, "context": 2}, 64),
    ],
)
def test_every_process_has_rows_of_the_multiple_that_eight_bits_want(
    fp8: str, parallel: dict[str, Any], multiple: int
) -> None:
    assert make({"fp8": fp8}, parallel=parallel).padding_multiple == multiple


def test_eight_bits_want_widths_of_a_multiple() -> None:
    make({"fp8": "mxfp8"})
    with pytest.raises(ValueError, match=r"engine\.fp8 is mxfp8, which wants widths that are a multiple of 64 .* 96"):
        make({"fp8": "mxfp8"}, parallel={"tensor": 2})


def test_eight_bits_want_bf16() -> None:
    with pytest.raises(ValueError, match=r"engine\.fp8 is tensorwise with precision fp32"):
        make({"fp8": "tensorwise"}, precision="fp32")
    with pytest.raises(ValueError, match=r"engine\.fp8 is tensorwise with parallel\.fsdp"):
        make({"fp8": "tensorwise"}, parallel={"fsdp": True})


def test_what_the_device_cannot_do_is_refused_before_anything_is_done(
    celltron: Any, tiny_config: Path, tiny_store: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    ended = celltron("train", "--config", tiny_config, "--data", tiny_store, "--out", out, "engine.layers=te")
    assert ended.code == 2 and not out.exists()
    assert "engine.layers is te, but the device is a CPU; set engine.layers=auto" in ended.stderr


def test_a_run_says_which_layers_it_has_and_why(
    celltron: Any, tiny_config: Path, tiny_store: Path, tmp_path: Path, read_metrics: Any
) -> None:
    out = tmp_path / "run"
    wanted = ["--precision", "bf16", "engine.fp32_residual=true"]
    ended = celltron("train", "--config", tiny_config, "--data", tiny_store, "--out", out, *wanted)
    assert ended.code == 0, ended.stderr
    assert "bf16, torch layers (the device is a CPU)" in ended.stdout + ended.stderr
    losses = [record["loss"] for record in read_metrics(out) if "loss" in record]
    assert len(losses) == 4 and losses[-1] < losses[0]
