"""AdamW through Megatron's data-parallel wrapper and optimizers."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.transformer.module import MegatronModule

from celltron.train.fully_sharded import DataParallel, FullyShardedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019)."""

    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; biases and norms are not decayed."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    clip_gradient_norm: float = 1.0
    """The gradient is scaled down to this norm where it is longer; 0 never scales."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}, but must lie in [0, 1)")
        for name in ("weight_decay", "clip_gradient_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}, but must not be negative")
        if self.epsilon <= 0:
            raise ValueError(f"optimizer.epsilon is {self.epsilon}, but must be above 0")


def wrap_model(
    model: MegatronModule,
    config: OptimizerConfig,
    *,
    dtype: torch.dtype,
    distributed_optimizer: bool,
    overlap: bool = False,
    fsdp: bool = False,
) -> tuple[DataParallel, MegatronOptimizer]:
    """Wrap a model for data parallelism and make its optimizer.

    Gradients are summed over micro-batches and data-parallel ranks in float32 (float64 for float64 parameters) and
    divided once, by the count of predicted places: Megatron's per-token loss.

    Args:
        model: This rank's part of the model.
        config: AdamW's settings.
        dtype: Of the parameters; with bfloat16 the optimizer keeps float32 copies.
        distributed_optimizer: Whether data-parallel ranks split the optimizer's state.
        overlap: Whether gradients are reduced, and split parameters gathered, while computing goes on.
        fsdp: Whether data-parallel ranks split parameters, gradients and the optimizer's state; it overlaps always.
    """
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=dtype is torch.bfloat16,
        use_distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and distributed_optimizer,
    )
    wrapped: DataParallel = (
        FullyShardedModel(model, dtype=dtype)
        if fsdp
        else DistributedDataParallel(config=model.config, ddp_config=settings, module=model)
    )
    optimizer_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=0.0,
        min_lr=0.0,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.epsilon,
        # Megatron computes the norm only where it may clip.
        clip_grad=config.clip_gradient_norm or math.inf,
        # Cut parameters are float32 themselves.
        bf16=dtype is torch.bfloat16 and not fsdp,
        params_dtype=dtype,
        use_distributed_optimizer=distributed_optimizer,
        overlap_param_gather=overlap and distributed_optimizer,
    )
    overrides = get_standard_config_overrides(optimizer_config)
    with _adam_of_pytorch():
        optimizer = get_megatron_optimizer(optimizer_config, [wrapped], config_overrides=overrides)
    if fsdp:
        # Each process has its own part of every gradient, so their squares are summed over all.
        for part in optimizer.chained_optimizers:
            part.grad_stats_parallel_group = torch.distributed.group.WORLD
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.grad_scale_func = optimizer.scale_loss
    model.config.no_sync_func = wrapped.no_sync
    return wrapped, optimizer


@contextlib.contextmanager
def _adam_of_pytorch() -> Iterator[None]:
    """Have Megatron take PyTorch's AdamW also where Transformer Engine or Apex is installed.

    Their Adams keep the count of steps elsewhere, so that a checkpoint would not go on everywhere.
    """
    chosen = megatron_optimizer.USING_PYTORCH_OPTIMIZER
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = True
    try:
        yield
    finally:
        megatron_optimizer.USING_PYTORCH_OPTIMIZER = chosen


@torch.no_grad()
def take_step(optimizer: MegatronOptimizer) -> float:
    """Clip the gradient and update the parameters; where its norm is no finite number, leave all as it is.

    Megatron's own `step` updates whatever the norm is, as long as no loss is scaled.

    Returns:
        The gradient's norm before clipping, the same on all processes.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if math.isfinite(norm):
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            clip_grad_by_total_norm_fp32(part.get_parameters(), part.config.clip_grad, norm)
        optimizer.step_with_ready_grads()
    return norm


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float, weight_decay: float) -> None:
    """Set every parameter group's learning rate and weight decay, each times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
