"""Core attention on PyTorch's scaled_dot_product_attention.

Axes: B cells, S places, T tokens of packed cells, N heads held by this rank, H head width, D = N x H. `_row` marks all
places of a row, of which S or T are this context-parallel process's part.
"""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import scaled_dot_product_attention

from celltron.models.layers.packing import PackedCells


class SdpaCoreAttention(MegatronModule):
    """Bidirectional attention softmax(q k^T / sqrt(H)) v (Vaswani et al. 2017, eq. 1), never building S x S scores.

    Takes the place of Megatron's `DotProductAttention`, which materialises the scores. `attention_mask` is boolean,
    broadcastable to [B, 1, S, S_row], and True where a place must not be attended to, as everywhere in Megatron.

    Where context-parallel processes share the row, each has the queries of its own places attend to the keys and values
    of all, which are gathered in one call; the backward pass sums and scatters their gradients. All places see all, so
    that parts of like length are about as much work.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *unused: Any,
        pg_collection: ProcessGroupCollection | None = None,
        **unused_keywords: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.dropout = config.attention_dropout
        group = None if pg_collection is None else pg_collection.cp
        self.context_group = group if group is not None and group.size() > 1 else None

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
        if self.context_group is not None:
            k, v = _gather_row(k, v, packed_seq_params, self.context_group)
        dropout = self.dropout if self.training else 0.0
        if dropout > 0:
            # Heads are split over tensor-parallel ranks, so each rank must drop other probabilities.
            with tensor_parallel.get_cuda_rng_tracker().fork():
                return _attend(q, k, v, attention_mask, packed_seq_params, dropout)
        return _attend(q, k, v, attention_mask, packed_seq_params, dropout)


def _gather_row(
    k: torch.Tensor, v: torch.Tensor, packed: PackedCells | None, group: torch.distributed.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the row, put together from the group's parts; of packed cells those that have a part here."""
    both_row = tensor_parallel.gather_from_sequence_parallel_region(
        torch.stack((k, v), dim=1), tensor_parallel_output_grad=True, group=group
    )
    k_row, v_row = (both_row if packed is None else both_row[packed.keys]).unbind(1)
    return k_row, v_row


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

    Keys and values are those of the cells that have queries here, whole: of a part of a row at its `packed.keys`. On
    CUDA all cells are one call: in half precision without dropout of flash attention for variable lengths (Dao 2023),
    which wants heads of a multiple of 8 values, of at most 256, otherwise of PyTorch's attention of jagged tensors. On
    a CPU each cell is a call.
    """
    num_keys = packed.keys.stop - packed.keys.start
    assert len(k_TNH) == num_keys, f"{len(k_TNH)} keys, wanted those of {num_keys} places"
    if dropout == 0.0 and _has_flash_attention(q_TNH):
        from torch.nn.attention.varlen import varlen_attn

        ends = (packed.cu_seqlens_q, packed.cu_seqlens_kv)
        longest = (packed.max_seqlen_q, packed.max_seqlen_kv)
        out_TNH: torch.Tensor = varlen_attn(q_TNH, k_TNH, v_TNH, *ends, *longest)  # type: ignore[assignment]
        return out_TNH.flatten(1)
    if q_TNH.is_cuda:
        return attend_jagged(q_TNH, k_TNH, v_TNH, packed, dropout)
    out = []
    lengths, key_lengths = list(packed.lengths), list(packed.key_lengths)
    parts = zip((q_TNH, k_TNH, v_TNH), (lengths, key_lengths, key_lengths), strict=True)
    for cell in zip(*(torch.split(tensor, of_tensor) for tensor, of_tensor in parts), strict=True):
        q_NSH, k_NSH, v_NSH = (tensor.transpose(0, 1) for tensor in cell)
        if dropout:
            out_NSH = attend_and_drop(q_NSH, k_NSH, v_NSH, dropout)
        else:
            out_NSH = scaled_dot_product_attention(q_NSH[None], k_NSH[None], v_NSH[None])[0]
        out.append(out_NSH.transpose(0, 1).flatten(1))
    return torch.cat(out)


def attend_jagged(
    q_TNH: torch.Tensor, k_TNH: torch.Tensor, v_TNH: torch.Tensor, packed: PackedCells, dropout: float
) -> torch.Tensor:
    """Attention within each cell, [T, N x H], in one call, whose kernel PyTorch chooses."""

    def nest(tensor_TNH: torch.Tensor, ends: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
        # With the lengths at hand PyTorch need not ask the GPU for them.
        jagged = torch.nested.nested_tensor_from_jagged(
            tensor_TNH.contiguous(), ends, min_seqlen=min(lengths), max_seqlen=max(lengths)
        )
        return jagged.transpose(1, 2)

    q = nest(q_TNH, packed.cu_seqlens_q, packed.lengths)
    k, v = (nest(tensor, packed.cu_seqlens_kv, packed.key_lengths) for tensor in (k_TNH, v_TNH))
    out_TNH: torch.Tensor = scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).values()
    return out_TNH.flatten(1)


def attend_and_drop(
    q_NSH: torch.Tensor, k_NUH: torch.Tensor, v_NUH: torch.Tensor, probability: float
) -> torch.Tensor:
    """Attention with dropout of its weights, [N, S, H], for a CPU, where PyTorch's draws a number for every weight."""
    q_NSH_wide, k_NUH_wide, v_NUH_wide = (_at_least_float32(tensor) for tensor in (q_NSH, k_NUH, v_NUH))
    scores_NSU = torch.bmm(q_NSH_wide * q_NSH.shape[-1] ** -0.5, k_NUH_wide.transpose(1, 2))
    weights = scores_NSU.softmax(dim=-1).flatten()
    kept_NSU = weights.index_fill(0, draw_places(len(weights), probability), 0.0).view_as(scores_NSU)
    return (torch.bmm(kept_NSU, v_NUH_wide) / (1.0 - probability)).to(q_NSH.dtype)


def draw_places(num_places: int, probability: float) -> torch.Tensor:
    """Places below `num_places`, int64, rising; each is among them with this probability, whichever others are.

    From one to the next it is as far as from a trial that succeeds to the next: a geometric number.
    """
    drawn, last = [], -1.0
    while last < num_places:
        size = 32 + int(1.05 * probability * (num_places - last))
        gaps = torch.empty(size, dtype=torch.float64, device="cpu").geometric_(probability)
        drawn.append(gaps.clamp_(max=num_places + 1.0).cumsum(0) + last)
        last = float(drawn[-1][-1])
    places = torch.cat(drawn)
    return places[: int(torch.searchsorted(places, float(num_places)))].long()


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _has_flash_attention(q_TNH: torch.Tensor) -> bool:
    """Whether PyTorch's flash attention takes such queries: from Ampere GPUs on."""
    if not q_TNH.is_cuda or q_TNH.dtype not in (torch.bfloat16, torch.float16):
        return False
    head_size = q_TNH.shape[-1]
    return head_size % 8 == 0 and head_size <= 256 and torch.cuda.get_device_capability(q_TNH.device) >= (8, 0)
