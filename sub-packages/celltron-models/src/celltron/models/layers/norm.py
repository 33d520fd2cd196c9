"""Layer normalisation that Megatron's sequence parallelism understands."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


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
        super().__init__(
            hidden_size, eps=eps, device=torch.cuda.current_device(), dtype=config.params_dtype
        )
        is_split = config.sequence_parallel if is_split is None else is_split
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = is_split  # type: ignore[attr-defined]
