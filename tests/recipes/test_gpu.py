"""The recipe on a GPU against the recipe on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "geneformer_pretrain.py"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def train(config: Path, store: Path, out: Path, *arguments: str) -> list[float]:
    """Losses of a short run without dropout."""
    command = [sys.executable, RECIPE, "--config", config, "--data", store, "--out", out, *arguments]
    subprocess.run([*map(str, command), "model.hidden_dropout=0", "model.attention_dropout=0"], check=True)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def test_losses_equal_those_of_the_cpu(tiny_config: Path, tiny_store: Path, tmp_path: Path) -> None:
    on_cpu = train(tiny_config, tiny_store, tmp_path / "cpu", "--device", "cpu")
    on_gpu = train(tiny_config, tiny_store, tmp_path / "gpu", "--device", "cuda")
    # float32 sums in another order, and a few Adam steps on top.
    assert on_gpu == pytest.approx(on_cpu, rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fully_sharded_losses_equal_those_of_replicas(
    tiny_config: Path, tiny_store: Path, tmp_path: Path, precision: str
) -> None:
    settings = ["--device", "cuda", "--precision", precision]
    replicated = train(tiny_config, tiny_store, tmp_path / "replicated", *settings)
    cut = train(tiny_config, tiny_store, tmp_path / "cut", *settings, "--fsdp")
    assert cut == pytest.approx(replicated, rel=1e-4 if precision == "fp32" else 1e-2)


def test_bf16_follows_fp32(tiny_config: Path, tiny_store: Path, tmp_path: Path) -> None:
    in_fp32 = train(tiny_config, tiny_store, tmp_path / "fp32", "--device", "cuda")
    in_bf16 = train(tiny_config, tiny_store, tmp_path / "bf16", "--device", "cuda", "--precision", "bf16")
    assert in_bf16 == pytest.approx(in_fp32, rel=2e-2)
