"""What layers can be built of and computed in, on a GPU against float32.

Losses and gradients in bfloat16 are as far from those in float32 as rounding takes them: how far that is, PyTorch's own
layers in bfloat16 say.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

PROGRAM = Path(__file__).with_name("train_layouts.py")
NUM_STEPS = 6
Train = Callable[[str], "Trained"]


class Trained:
    """What a run of one process wrote down."""

    def __init__(self, folder: Path, name: str) -> None:
        self.arrays: dict[str, np.ndarray] = dict(np.load(folder / f"{name}.0.npz"))
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        self.records: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def losses(self) -> np.ndarray:
        return np.array([record["loss"] for record in self.records if "loss" in record])

    def gradients(self) -> dict[str, np.ndarray]:
        """Of the first step, which starts from the same weights in all runs."""
        start = "1 gradient "
        return {name.removeprefix(start): array for name, array in self.arrays.items() if name.startswith(start)}

    def distance(self, other: "Trained") -> float:
        """|g - h| / |h| of the gradients."""
        found, expected = self.gradients(), other.gradients()
        assert found.keys() == expected.keys()
        differences = {name: found[name] - expected[name] for name in found}
        return length(differences) / length(expected)


def length(arrays: dict[str, np.ndarray]) -> float:
    return math.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in arrays.values()))


def run(program: Path, *arguments: object) -> str:
    """What a program printed; not forked from a warm process, since Transformer Engine asks a GPU when imported."""
    command = list(map(str, [sys.executable, program, *arguments]))
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-4000:]
    return ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """`train("gpu_te")`: the run of that name, trained once."""
    folder = tmp_path_factory.mktemp("gpu_layers")
    done: dict[str, Trained] = {}

    def train_once(name: str) -> Trained:
        if name not in done:
            run(PROGRAM, folder, name)
            done[name] = Trained(folder, name)
            assert len(done[name].losses()) == NUM_STEPS
        return done[name]

    return train_once


@pytest.fixture
def transformer_engine() -> None:
    pytest.importorskip("transformer_engine.pytorch", reason="no Transformer Engine")


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize("name", ["gpu_te", "gpu_te_padded", "gpu_te_wide", "gpu_te_compiled", "gpu_te_recomputed"])
def test_transformer_engine_is_as_close_to_float32_as_pytorch(train: Train, name: str) -> None:
    exact, own, found = train("gpu_fp32"), train("gpu_torch"), train(name)
    np.testing.assert_allclose(found.losses(), exact.losses(), rtol=2e-2)
    assert found.distance(exact) < 1.5 * own.distance(exact) + 1e-2


@pytest.mark.usefixtures("transformer_engine")
def test_so_is_the_pre_norm_variant(train: Train) -> None:
    exact, own, found = train("gpu_fp32_pre_norm"), train("gpu_torch_pre_norm"), train("gpu_te_pre_norm")
    np.testing.assert_allclose(found.losses(), exact.losses(), rtol=2e-2)
    assert found.distance(exact) < 1.5 * own.distance(exact) + 1e-2


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_eight_bits_train_about_as_bfloat16_does(train: Train, recipe: str) -> None:
    from transformer_engine.pytorch.fp8 import check_fp8_block_scaling_support, check_fp8_support

    check = {"tensorwise": check_fp8_support, "blockwise": check_fp8_block_scaling_support}[recipe]
    is_supported, reason = check()
    if not is_supported:
        pytest.skip(reason)
    found, expected = train(f"gpu_{recipe}"), train("gpu_torch")
    np.testing.assert_allclose(found.losses(), expected.losses(), rtol=5e-2)
    # Three bits of mantissa round to a sixteenth of a value, and such errors mostly cancel in sums.
    assert found.distance(expected) < 0.3


def test_a_float32_residual_comes_closer_to_float32(train: Train) -> None:
    exact = train("gpu_fp32")
    assert train("gpu_torch_wide").distance(exact) < 0.8 * train("gpu_torch").distance(exact)


def test_compiled_layers_are_those_of_eager_ones(train: Train) -> None:
    pytest.importorskip("triton", reason="no Triton")
    found, expected = train("gpu_fp32_compiled"), train("gpu_fp32")
    np.testing.assert_allclose(found.losses(), expected.losses(), rtol=1e-4)
    assert found.distance(expected) < 1e-4


@pytest.mark.parametrize("name", ["gpu_te_dropout", "gpu_compiled_dropout"])
def test_with_dropout_the_run_still_learns(train: Train, name: str) -> None:
    pytest.importorskip("transformer_engine.pytorch" if "te" in name else "triton", reason="not installed")
    losses = train(name).losses()
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 0.2


@pytest.mark.usefixtures("transformer_engine")
def test_a_checkpoint_of_either_continues_with_the_other(
    tmp_path: Path, tiny_config: Path, tiny_store: Path
) -> None:
    recipe = Path(__file__).resolve().parents[2] / "recipes" / "geneformer_pretrain.py"
    wanted = ["--device", "cuda", "--precision", "bf16", "model.hidden_dropout=0", "model.attention_dropout=0"]
    arguments = [recipe, "--config", tiny_config, "--data", tiny_store, "--out", tmp_path / "run", *wanted]
    for max_steps, layers in ((2, "te"), (4, "torch"), (6, "te")):
        resume = ["--resume", "auto", f"loop.max_steps={max_steps}", f"engine.layers={layers}"]
        assert f"bf16, {layers} layers (as engine.layers asks)" in run(*arguments, *resume)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [record["step"] for record in map(json.loads, lines) if "loss" in record]
    assert steps == [1, 2, 3, 4, 5, 6]
