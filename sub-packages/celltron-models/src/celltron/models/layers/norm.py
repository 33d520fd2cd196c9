"""Layer normalisation that Megatron's sequence parallelism understands, and a residual in float32.

With Megatron's `fp32_residual_connection` hidden states are float32 between the branches of bfloat16 layers. A norm
computes in its input's dtype, and what enters a branch is rounded to the weights'.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

Norm = tuple[torch.Tensor, torch.Tensor, float]
"""Weight, bias and epsilon."""


def normalise(hidden: torch.Tensor, norm: Norm) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) weight + bias over the last axis (Ba et al. 2016), in the dtype of x."""
    weight, bias, eps = norm
    weight, bias = weight.to(hidden.dtype), bias.to(hidden.dtype)
    return torch.nn.functional.layer_norm(hidden, weight.shape, weight, bias, eps)


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` whose parameters say that their gradients are partial sums under sequence parallelism.

    Megatron all-reduces, over the tensor-parallel group, the gradients of every parameter that carries
    `sequence_parallel`; its own wrapper of the torch norm refuses sequence parallelism instead.

    Args:
        config: Gives the parameters' dtype and whether activations are split along the sequence.
        hidden_size: D, the width that is normalised.
        eps: Added to the variance.
        is_split: Whether this norm sees the split sequence; by default what `config` says.
        **unused: Arguments that Megatron passes to every norm.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        is_split: bool | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(hidden_size, eps=eps, device=torch.cuda.current_device(), dtype=config.params_dtype)
        is_split = config.sequence_parallel if is_split is None else is_split
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = is_split  # type: ignore[attr-defined]

    def forward(self, *rows: Any, function: Callable[..., torch.Tensor] = normalise) -> torch.Tensor:
        """What a function makes of `rows` and a `Norm`, this one: by default hidden states, normalised in their dtype.

        Whoever computes with the parameters calls this module for it, which is when gathered ones are waited for.
        """
        return function(*rows, (self.weight, self.bias, self.eps))


class RoundedLayerNorm(LayerNorm):
    """The norm before a branch: its output has the weights' dtype."""

    def forward(self, *rows: Any, function: Callable[..., torch.Tensor] = normalise) -> torch.Tensor:
        """The same, rounded."""
        return super().forward(*rows, function=function).to(self.weight.dtype)


class Rounding(torch.nn.Module):
    """Hidden states as a branch takes them where no norm stands before it: in the weights' dtype."""

    def __init__(self, config: TransformerConfig, **unused: Any) -> None:
        super().__init__()
        self.dtype = config.params_dtype

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same, or rounded."""
        return hidden.to(self.dtype)
