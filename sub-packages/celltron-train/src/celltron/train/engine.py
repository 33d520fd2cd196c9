"""What makes steps fast or small and changes no result but its rounding: validated here, and nowhere else."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from celltron.train.fully_sharded import DataParallel
from celltron.train.precision import Precision

Recompute = Literal["none", "selective", "full"]
Layers = Literal["auto", "torch", "te"]
Float8 = Literal["none", "tensorwise", "blockwise", "mxfp8"]
# Gradients span more than what a forward pass makes: tensors that are scaled whole take another format for them.
_FLOAT8_FORMATS = {"tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Memory for time, communication beside computing, and what layers are built of and computed in."""

    recompute: Recompute = "none"
    """What the backward pass computes anew instead of keeping it: with `selective` the attention of each layer, with
    `full` all of each layer but its input (Korthikanti et al. 2022)."""
    overlap: bool = False
    """Whether gradients are reduced while the backward pass goes on and, with parallel.distributed_optimizer,
    parameters gathered while the next forward pass does; for GPUs, whose networks work beside them."""
    layers: Layers = "auto"
    """What layers are built of: `te` is Transformer Engine, for bf16 on CUDA; `torch` is PyTorch, for everything;
    `auto` takes the first where it can be. A checkpoint of the one continues with the other."""
    fp8: Float8 = "none"
    """Whether Transformer Engine's matrix products are computed in 8 bits, and how values are scaled for that: a tensor
    as a whole, in blocks of 128 values, or (from Blackwell on) of 32. Attention and the LM head stay in bf16."""
    fp32_residual: bool = False
    """With bf16: whether what layers add to, and the norms of that, are float32; branches stay bf16."""
    compile: bool = False
    """Whether PyTorch compiles what stands between the matrix products of a layer: biases, dropout, sums, norms and
    activations. Dropout then draws other masks."""

    def __post_init__(self) -> None:
        if self.fp8 != "none" and self.layers == "torch":
            raise ValueError(
                f"engine.fp8 is {self.fp8}, which only Transformer Engine's layers have, but engine.layers is torch; "
                "set engine.fp8=none, or engine.layers=auto"
            )

    def check_precision(self, precision: Precision) -> None:
        """Raise ValueError where these settings want another precision."""
        wants_bf16 = {"engine.fp8": self.fp8 != "none", "engine.fp32_residual": self.fp32_residual}
        for name, is_on in wants_bf16.items():
            if is_on and precision != "bf16":
                value = getattr(self, name.removeprefix("engine."))
                raise ValueError(
                    f"{name} is {str(value).lower()} with precision {precision}, but is a variant of bf16; set "
                    f"precision=bf16, or leave {name} out"
                )

    @property
    def rows_multiple(self) -> int:
        """What the number of rows of a matrix, places of cells, is a multiple of: 8-bit products want that."""
        return {"none": 1, "mxfp8": 32}.get(self.fp8, 16)


def transformer_settings(config: EngineConfig) -> dict[str, Any]:
    """What Megatron's `TransformerConfig` is told of all this."""
    settings = recompute_settings(config.recompute)
    if config.fp32_residual:
        settings["fp32_residual_connection"] = True
    if config.fp8 != "none":
        settings |= {"fp8": _FLOAT8_FORMATS[config.fp8], "fp8_recipe": config.fp8}
    return settings


def recompute_settings(recompute: Recompute) -> dict[str, Any]:
    """The same for Megatron's `TransformerConfig`."""
    if recompute == "none":
        return {}
    if recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@contextmanager
def whole_parameters(model: DataParallel) -> Iterator[None]:
    """Have every process hold all its parameters as the last step left them, also where they are gathered late."""
    is_late = model.ddp_config.overlap_param_gather
    if is_late:
        model.disable_forward_pre_hook()
    try:
        yield
    finally:
        if is_late:
            model.enable_forward_pre_hook()
