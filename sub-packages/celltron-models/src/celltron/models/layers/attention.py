"""Core attention on PyTorch's scaled_dot_product_attention.

Axes: B cells, S places, N heads held by this rank, H head width, D = N x H.
"""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import scaled_dot_product_attention


class SdpaCoreAttention(MegatronModule):
    """Bidirectional attention softmax(q k^T / sqrt(H)) v (Vaswani et al. 2017, eq. 1), never building S x S scores.

    Takes the place of Megatron's `DotProductAttention`, which materialises the scores. `attention_mask` is boolean,
    broadcastable to [B, 1, S, S], and True where a place must not be attended to, as everywhere in Megatron.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, *unused: Any, **unused_keywords: Any) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.dropout = config.attention_dropout

    def forward(
        self,
        q_SBNH: torch.Tensor,
        k_SBNH: torch.Tensor,
        v_SBNH: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **unused: Any,
    ) -> torch.Tensor:
        """Return the attended values, [S, B, N x H]."""
        q_BNSH, k_BNSH, v_BNSH = (tensor.permute(1, 2, 0, 3) for tensor in (q_SBNH, k_SBNH, v_SBNH))
        is_visible = None if attention_mask is None else ~attention_mask
        if self.training and self.dropout > 0:
            # Heads are split over tensor-parallel ranks, so each rank must drop other probabilities.
            with tensor_parallel.get_cuda_rng_tracker().fork():
                out_BNSH = scaled_dot_product_attention(
                    q_BNSH, k_BNSH, v_BNSH, attn_mask=is_visible, dropout_p=self.dropout
                )
        else:
            out_BNSH = scaled_dot_product_attention(q_BNSH, k_BNSH, v_BNSH, attn_mask=is_visible)
        return out_BNSH.permute(2, 0, 1, 3).flatten(2)
