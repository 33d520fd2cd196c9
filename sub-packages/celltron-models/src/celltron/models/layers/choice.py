"""Which layers a run gets, and why: chosen here, and nowhere else."""

from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core.tensor_parallel import layers as megatron_linears

from celltron.core import InputError
from celltron.models.layers.parts import Implementation

Float8 = Literal["none", "tensorwise", "blockwise", "mxfp8"]
"""How matrices are scaled before they are rounded to 8 bits: whole, in blocks of 128, in blocks of 32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerChoice:
    """Which layers, and why."""

    layers: Implementation
    reason: str
    """In a few words, for the run's description."""
    fuses_gradients: bool
    """Whether their matrix products add a weight's gradient to that of the micro-batches before."""


def choose_layers(
    wanted: Literal["auto", "torch", "te"], *, device: torch.device, dtype: torch.dtype, float8: Float8 = "none"
) -> LayerChoice:
    """Choose between Transformer Engine's layers and those of Megatron and PyTorch.

    Args:
        wanted: What is asked for; `auto` takes Transformer Engine's where they can be.
        device: Where the model is.
        dtype: Of its parameters.
        float8: What Transformer Engine's products are computed in.

    Raises:
        InputError: what is asked for cannot be here.
    """
    is_cuda = device.type == "cuda"
    obstacle = _why_not_te(device, dtype)
    if float8 != "none":
        _check_float8(float8, wanted, obstacle)
    if wanted == "te" and obstacle:
        raise InputError(f"engine.layers is te, but {obstacle}; set engine.layers=auto, or remove the cause")
    if wanted == "torch" or obstacle:
        reason = obstacle if wanted == "auto" else "as engine.layers asks"
        return LayerChoice(layers="torch", reason=reason, fuses_gradients=is_cuda and can_fuse_gradients())
    reason = "on CUDA in bf16" if wanted == "auto" else "as engine.layers asks"
    return LayerChoice(layers="te", reason=reason, fuses_gradients=True)


def _why_not_te(device: torch.device, dtype: torch.dtype) -> str:
    """Empty where Transformer Engine's layers can be."""
    if device.type != "cuda":
        return "the device is a CPU"
    if dtype is not torch.bfloat16:
        return f"precision makes {str(dtype).removeprefix('torch.')} weights, which Transformer Engine rounds to TF32"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError as error:
        return f"Transformer Engine does not import ({' '.join(str(error).split())[:200]})"
    return ""


def _check_float8(float8: Float8, wanted: str, obstacle: str) -> None:
    """Raise InputError where the layers or the GPU cannot compute in 8 bits."""
    cure = "set engine.fp8=none, or remove the cause"
    if wanted == "torch" or obstacle:
        reason = obstacle or "engine.layers is torch"
        raise InputError(f"engine.fp8 is {float8}, which wants Transformer Engine's layers, but {reason}; {cure}")
    from transformer_engine.pytorch.fp8 import check_fp8_block_scaling_support, check_fp8_support, check_mxfp8_support

    checks = {
        "tensorwise": check_fp8_support,
        "blockwise": check_fp8_block_scaling_support,
        "mxfp8": check_mxfp8_support,
    }
    is_supported, reason = checks[float8]()
    if not is_supported:
        raise InputError(f"engine.fp8 is {float8}, but Transformer Engine says: {reason.rstrip('.')}; {cure}")


def can_fuse_gradients() -> bool:
    """Whether apex's kernel for that is here, which Megatron's own linears want."""
    return bool(megatron_linears._grad_accum_fusion_available)
