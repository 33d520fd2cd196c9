import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from celltron.core import InputError
from celltron.models.layers import choice
from celltron.models.layers.choice import choose_layers

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BF16 = torch.bfloat16


@pytest.fixture
def transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Transformer Engine that imports, on a GPU that has no blocks of 32."""
    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.fp8")
    modules = {name: ModuleType(name) for name in names}
    fp8: Any = modules["transformer_engine.pytorch.fp8"]
    fp8.check_fp8_support = fp8.check_fp8_block_scaling_support = lambda: (True, "")
    fp8.check_mxfp8_support = lambda: (False, "Device compute capability 10.0 or higher required for MXFP8 execution.")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def no_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)


def test_transformer_engine_is_taken_for_bf16_on_cuda(transformer_engine: None) -> None:
    chosen = choose_layers("auto", device=CUDA, dtype=BF16)
    assert (chosen.layers, chosen.reason, chosen.fuses_gradients) == ("te", "on CUDA in bf16", True)


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        (CPU, BF16, "the device is a CPU"),
        (CUDA, torch.float32, "precision makes float32 weights, which Transformer Engine rounds to TF32"),
    ],
)
def test_torch_is_taken_elsewhere(
    transformer_engine: None, device: torch.device, dtype: torch.dtype, reason: str
) -> None:
    chosen = choose_layers("auto", device=device, dtype=dtype)
    assert (chosen.layers, chosen.reason, chosen.fuses_gradients) == ("torch", reason, False)


def test_torch_is_taken_without_transformer_engine(no_transformer_engine: None) -> None:
    chosen = choose_layers("auto", device=CUDA, dtype=BF16)
    assert chosen.layers == "torch" and chosen.reason.startswith("Transformer Engine does not import (")


def test_torch_is_taken_when_asked_for(transformer_engine: None) -> None:
    chosen = choose_layers("torch", device=CUDA, dtype=BF16)
    assert (chosen.layers, chosen.reason) == ("torch", "as engine.layers asks")


@pytest.mark.parametrize(("device", "fuses"), [(CUDA, True), (CPU, False)])
def test_gradients_are_fused_by_apex_on_cuda(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, fuses: bool
) -> None:
    monkeypatch.setattr(choice.megatron_linears, "_grad_accum_fusion_available", True)
    assert choose_layers("torch", device=device, dtype=BF16).fuses_gradients is fuses


def test_transformer_engine_is_refused_where_it_cannot_be(no_transformer_engine: None) -> None:
    with pytest.raises(InputError, match=r"engine\.layers is te, but Transformer Engine does not import \("):
        choose_layers("te", device=CUDA, dtype=BF16)
    with pytest.raises(InputError, match=r"engine\.layers is te, but the device is a CPU; set engine\.layers=auto"):
        choose_layers("te", device=CPU, dtype=BF16)


@pytest.mark.parametrize("float8", ["tensorwise", "blockwise"])
def test_eight_bits_are_taken_where_the_gpu_has_them(transformer_engine: None, float8: Any) -> None:
    assert choose_layers("auto", device=CUDA, dtype=BF16, float8=float8).layers == "te"


def test_eight_bits_are_refused_where_the_gpu_lacks_them(transformer_engine: None) -> None:
    says = r"engine\.fp8 is mxfp8, but Transformer Engine says: Device compute capability 10\.0 .*; set engine\.fp8="
    with pytest.raises(InputError, match=says):
        choose_layers("auto", device=CUDA, dtype=BF16, float8="mxfp8")


def test_eight_bits_are_refused_on_a_cpu() -> None:
    with pytest.raises(InputError, match=r"wants Transformer Engine's layers, but the device is a CPU"):
        choose_layers("auto", device=CPU, dtype=BF16, float8="tensorwise")
