"""Core attention on PyTorch's scaled_dot_product_attention.

Axes: B cells, S places, T tokens of packed cells, N heads held by this rank, H head width, D = N x H.
"""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import scaled_dot_product_attention

from celltron.models.layers.packing import PackedCells


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
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        packed_seq_params: PackedCells | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        """Return the attended values, [S, B, N x H] for q, k, v [S, B, N, H], [T, N x H] for packed [T, N, H]."""
        dropout = self.dropout if self.training else 0.0
        if dropout > 0:
            # Heads are split over tensor-parallel ranks, so each rank must drop other probabilities.
            with tensor_parallel.get_cuda_rng_tracker().fork():
                return _attend(q, k, v, attention_mask, packed_seq_params, dropout)
        return _attend(q, k, v, attention_mask, packed_seq_params, dropout)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packed: PackedCells | None,
    dropout: float,
) -> torch.Tensor:
    if packed is not None:
        return attend_packed(q, k, v, packed, dropout)
    q_BNSH, k_BNSH, v_BNSH = (tensor.permute(1, 2, 0, 3) for tensor in (q, k, v))
    is_visible = None if attention_mask is None else ~attention_mask
    out_BNSH = scaled_dot_product_attention(q_BNSH, k_BNSH, v_BNSH, attn_mask=is_visible, dropout_p=dropout)
    return out_BNSH.permute(2, 0, 1, 3).flatten(2)


def attend_packed(
    q_TNH: torch.Tensor, k_TNH: torch.Tensor, v_TNH: torch.Tensor, packed: PackedCells, dropout: float
) -> torch.Tensor:
    """Attention within each cell, [T, N x H]; nothing is computed across cells or on padding.

    On CUDA in half precision all cells are one call of flash attention for variable lengths (Dao 2023), which has no
    dropout; elsewhere each cell is a call.
    """
    if q_TNH.is_cuda and dropout == 0.0 and q_TNH.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        ends, longest = packed.cu_seqlens_q, packed.max_seqlen_q
        out_TNH: torch.Tensor = varlen_attn(q_TNH, k_TNH, v_TNH, ends, ends, longest, longest)  # type: ignore[assignment]
        return out_TNH.flatten(1)
    out = []
    lengths = list(packed.lengths)
    for cell in zip(*(torch.split(tensor, lengths) for tensor in (q_TNH, k_TNH, v_TNH)), strict=True):
        q_1NSH, k_1NSH, v_1NSH = (tensor.transpose(0, 1)[None] for tensor in cell)
        out_1NSH = scaled_dot_product_attention(q_1NSH, k_1NSH, v_1NSH, dropout_p=dropout)
        out.append(out_1NSH[0].transpose(0, 1).flatten(1))
    return torch.cat(out)
