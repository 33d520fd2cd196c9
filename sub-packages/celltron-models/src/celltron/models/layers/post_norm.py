"""The post-norm transformer layer (Vaswani et al. 2017; BERT, Devlin et al. 2019) out of Megatron's parts."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from celltron.models.layers.layer import Layer, LayerSubmodules
from celltron.models.layers.norm import Rounding
from celltron.models.layers.parts import LayerParts


@dataclass
class PostNormSubmodules(LayerSubmodules):
    """The layer parts, with a norm after each residual sum instead of before each branch."""

    attention_norm: ModuleSpec | type = IdentityOp
    mlp_norm: ModuleSpec | type = IdentityOp


class PostNormLayer(Layer):
    """x = norm(x + dropout(attention(x))), then norm(x + dropout(mlp(x))); hidden states are [S, B, D].

    With a residual in float32 the sums, the norms and x are float32, and x is rounded where it enters a branch.
    """

    def __init__(self, config: TransformerConfig, submodules: PostNormSubmodules, **place: Any) -> None:
        super().__init__(config, submodules, **place)
        norm = {"config": config, "hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
        self.attention_norm = build_module(submodules.attention_norm, **norm)
        self.mlp_norm = build_module(submodules.mlp_norm, **norm)
        self.self_attn_bda = partial(submodules.self_attn_bda, norm=self.attention_norm)
        self.mlp_bda = partial(submodules.mlp_bda, norm=self.mlp_norm)


def post_norm_spec(parts: LayerParts) -> ModuleSpec:
    """The layer out of the given parts."""
    return ModuleSpec(
        module=PostNormLayer,
        submodules=PostNormSubmodules(
            input_layernorm=Rounding,
            self_attention=parts.self_attention(),
            self_attn_bda=parts.branch_end(),
            pre_mlp_layernorm=Rounding,
            feed_forward=parts.feed_forward(),
            mlp_bda=parts.branch_end(),
            attention_norm=parts.norm,
            mlp_norm=parts.norm,
        ),
    )
