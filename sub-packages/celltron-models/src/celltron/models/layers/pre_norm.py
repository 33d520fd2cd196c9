"""The pre-norm transformer layer (Xiong et al. 2020, doi:10.48550/arXiv.2002.04745) out of Megatron's parts."""

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from celltron.models.layers.layer import Layer, LayerSubmodules
from celltron.models.layers.parts import LayerParts


def pre_norm_spec(parts: LayerParts, config: TransformerConfig) -> TransformerBlockSubmodules:
    """This stage's layers, x += attention(norm(x)), then x += mlp(norm(x)), and the norm that follows the last one.

    With a residual in float32 the sums are float32, and the norms round.
    """
    layer = ModuleSpec(
        module=Layer,
        submodules=LayerSubmodules(
            input_layernorm=parts.branch_norm,
            self_attention=parts.self_attention(),
            self_attn_bda=parts.branch_end(),
            pre_mlp_layernorm=parts.branch_norm,
            feed_forward=parts.feed_forward(),
            mlp_bda=parts.branch_end(),
        ),
    )
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=parts.branch_norm
    )


def gelu_tanh(values: torch.Tensor) -> torch.Tensor:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) (Hendrycks & Gimpel 2016, section 2): Megatron's fused GELU."""
    return torch.nn.functional.gelu(values, approximate="tanh")
