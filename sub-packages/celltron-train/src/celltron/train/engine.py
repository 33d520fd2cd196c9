"""What makes steps fast or small and changes no result: validated here, and nowhere else."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from megatron.core.distributed import DistributedDataParallel

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Memory for time, and communication beside computing."""

    recompute: Recompute = "none"
    """What the backward pass computes anew instead of keeping it: with `selective` the attention of each layer, with
    `full` all of each layer but its input (Korthikanti et al. 2022)."""
    overlap: bool = False
    """Whether gradients are reduced while the backward pass goes on and, with parallel.distributed_optimizer,
    parameters gathered while the next forward pass does; for GPUs, whose networks work beside them."""


def recompute_settings(recompute: Recompute) -> dict[str, Any]:
    """The same for Megatron's `TransformerConfig`."""
    if recompute == "none":
        return {}
    if recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@contextmanager
def whole_parameters(model: DistributedDataParallel) -> Iterator[None]:
    """Have every process hold all its parameters as the last step left them, also where they are gathered late."""
    is_late = model.ddp_config.overlap_param_gather
    if is_late:
        model.disable_forward_pre_hook()
    try:
        yield
    finally:
        if is_late:
            model.enable_forward_pre_hook()
