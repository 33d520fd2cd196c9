"""The pre-norm transformer layer (Xiong et al. 2020, doi:10.48550/arXiv.2002.04745) out of Megatron's parts."""

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from celltron.models.layers.norm import LayerNorm
from celltron.models.layers.post_norm import post_norm_torch_spec


def pre_norm_torch_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """This stage's layers, x += attention(norm(x)), then x += mlp(norm(x)), and the norm that follows the last one.

    The layer is Megatron's own; its branches are those of the post-norm layer.
    """
    branches = post_norm_torch_spec().submodules
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=LayerNorm,
            self_attention=branches.self_attention,
            self_attn_bda=branches.self_attn_bda,
            pre_mlp_layernorm=LayerNorm,
            mlp=branches.mlp,
            mlp_bda=branches.mlp_bda,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=LayerNorm)


def gelu_tanh(values: torch.Tensor) -> torch.Tensor:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) (Hendrycks & Gimpel 2016, section 2): Megatron's fused GELU."""
    return torch.nn.functional.gelu(values, approximate="tanh")
