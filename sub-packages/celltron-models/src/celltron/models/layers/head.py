"""BERT's masked-language-model head.

Axes: M places that are predicted, D width.
"""

from collections.abc import Callable

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from celltron.models.layers.norm import LayerNorm


class BertHeadTransform(MegatronModule):
    """norm(activation(W x + b)): what stands between the encoder and the decoder tied to the embedding.

    Every tensor-parallel rank computes it whole, on the same input, so its gradients are whole too.

    Args:
        config: Width, epsilon and dtype.
        activation: By default the layers'.
    """

    def __init__(
        self, config: TransformerConfig, *, activation: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        super().__init__(config=config)
        self.activation = activation or config.activation_func
        placement = {"device": torch.cuda.current_device(), "dtype": config.params_dtype}
        self.dense = torch.nn.Linear(config.hidden_size, config.hidden_size, **placement)
        self.norm = LayerNorm(config, config.hidden_size, config.layernorm_epsilon, is_split=False)

    def forward(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        """Return the transformed hidden states, same shape."""
        transformed_MD: torch.Tensor = self.norm(self.activation(self.dense(hidden_MD)))
        return transformed_MD
