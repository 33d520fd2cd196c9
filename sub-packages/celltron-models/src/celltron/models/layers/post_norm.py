"""The post-norm transformer layer (Vaswani et al. 2017; BERT, Devlin et al. 2019) out of Megatron's parts."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from celltron.models.layers.attention import SdpaCoreAttention
from celltron.models.layers.norm import LayerNorm


@dataclass
class PostNormSubmodules(TransformerLayerSubmodules):
    """Megatron's layer parts, with a norm after each residual sum instead of before each branch."""

    attention_norm: ModuleSpec | type = IdentityOp
    mlp_norm: ModuleSpec | type = IdentityOp


class PostNormTransformerLayer(TransformerLayer):
    """x = norm(x + dropout(attention(x))), then norm(x + dropout(mlp(x))); hidden states are [S, B, D]."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: PostNormSubmodules,
        layer_number: int = 1,
        hidden_dropout: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config, submodules, layer_number, hidden_dropout, pg_collection, vp_stage)
        norm = {"config": config, "hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
        self.attention_norm = build_module(submodules.attention_norm, **norm)
        self.mlp_norm = build_module(submodules.mlp_norm, **norm)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the hidden states [S, B, D] and Megatron's unused cross-attention context."""
        kwargs.pop("dynamic_inference_decode_only", None)
        hidden_SBD, context = self._forward_attention(*args, **kwargs)
        hidden_SBD = self._forward_mlp(self.attention_norm(hidden_SBD))
        return self.mlp_norm(hidden_SBD), context


def post_norm_torch_spec() -> ModuleSpec:
    """The layer with Megatron's parallel linears, SDPA attention and torch norms: runs on a CPU and on any GPU."""
    return ModuleSpec(
        module=PostNormTransformerLayer,
        submodules=PostNormSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.padding},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=SdpaCoreAttention,
                    linear_proj=RowParallelLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
            attention_norm=LayerNorm,
            mlp_norm=LayerNorm,
        ),
    )
