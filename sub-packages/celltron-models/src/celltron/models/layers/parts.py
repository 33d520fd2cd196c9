"""What layers are built of: Megatron's and PyTorch's modules, or Transformer Engine's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from celltron.models.layers.attention import SdpaCoreAttention
from celltron.models.layers.layer import FeedForward
from celltron.models.layers.norm import LayerNorm, RoundedLayerNorm
from celltron.models.layers.packing import PackedCells
from celltron.models.layers.rows import BranchEnd, branch_end

Implementation = Literal["torch", "te"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerParts:
    """The modules of a layer; all implementations have the same parameters under the same names."""

    column_linear: type
    """Its output is split between tensor-parallel processes."""
    row_linear: type
    """Its input is."""
    core_attention: type
    norm: type
    """Behind a branch: its output is carried on."""
    branch_norm: type
    """Before a branch."""
    is_compiled: bool
    """Whether what stands between the matrix products is compiled in training."""

    def self_attention(self) -> ModuleSpec:
        """The attention branch, without its last bias."""
        return ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.padding},
            submodules=SelfAttentionSubmodules(
                linear_qkv=self.column_linear,
                core_attention=self.core_attention,
                linear_proj=self.row_linear,
            ),
        )

    def feed_forward(self) -> ModuleSpec:
        """The feed-forward branch, without its last bias."""
        return ModuleSpec(
            module=FeedForward,
            params={"is_compiled": self.is_compiled},
            submodules=MLPSubmodules(linear_fc1=self.column_linear, linear_fc2=self.row_linear),
        )

    def branch_end(self) -> Callable[..., BranchEnd]:
        """What adds a branch to the residual."""
        return branch_end(is_compiled=self.is_compiled)


def layer_parts(implementation: Implementation, config: TransformerConfig, *, is_compiled: bool = False) -> LayerParts:
    """The parts that run on a CPU and on any GPU, or Transformer Engine's."""
    if implementation == "te":
        return _te_parts(config, is_compiled=is_compiled)
    return LayerParts(
        column_linear=ColumnParallelLinear,
        row_linear=RowParallelLinear,
        core_attention=SdpaCoreAttention,
        norm=LayerNorm,
        branch_norm=RoundedLayerNorm,
        is_compiled=is_compiled,
    )


def _te_parts(config: TransformerConfig, *, is_compiled: bool) -> LayerParts:
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm, TERowParallelLinear

    # Transformer Engine's norm rounds what it is given to its weights' dtype first.
    is_wide = config.fp32_residual_connection
    return LayerParts(
        column_linear=TEColumnParallelLinear,
        row_linear=TERowParallelLinear,
        # Transformer Engine would have every cell cut between context-parallel processes; here rows are.
        core_attention=TeCoreAttention if config.context_parallel_size == 1 else SdpaCoreAttention,
        norm=LayerNorm if is_wide else TENorm,
        branch_norm=RoundedLayerNorm if is_wide else TENorm,
        is_compiled=is_compiled,
    )


class TeCoreAttention(MegatronModule):
    """Transformer Engine's attention, which chooses between flash attention and cuDNN's; it drops out by itself.

    Shapes are those of `SdpaCoreAttention`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        *,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        self.attention = TEDotProductAttention(
            config=config,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type=attention_type,
            pg_collection=pg_collection,
        )

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
        # Padding asks for a mask or for where cells end.
        is_padded = attention_mask is not None or packed_seq_params is not None
        attended: torch.Tensor = self.attention(
            q,
            k,
            v,
            attention_mask,
            attn_mask_type=AttnMaskType.padding if is_padded else AttnMaskType.no_mask,
            packed_seq_params=packed_seq_params,
        )
        return attended
