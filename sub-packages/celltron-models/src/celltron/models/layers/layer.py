"""Megatron's transformer layer with a feed-forward branch and ends of branches that can be compiled."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from celltron.models.layers.rows import activate, compiled


@dataclass
class LayerSubmodules(TransformerLayerSubmodules):
    """Megatron's layer parts, with the feed-forward branch as a part of its own.

    Megatron knows `mlp` by its class, and gives others than its own no process group.
    """

    feed_forward: ModuleSpec | type = IdentityOp


class Layer(TransformerLayer):
    """x += dropout(attention(norm(x))), then x += dropout(mlp(norm(x))); hidden states are [S, B, D]."""

    def __init__(self, config: TransformerConfig, submodules: LayerSubmodules, **place: Any) -> None:
        super().__init__(config, submodules, **place)
        self.mlp = build_module(submodules.feed_forward, config=config, tp_group=self.pg_collection.tp)
        # Megatron would turn gradients on here, also where nothing is trained.
        self.bias_dropout_add_exec_handler = nullcontext


class FeedForward(MLP):
    """W2 activation(W1 x + b1), and the bias b2 beside it."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        *,
        is_compiled: bool,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=tp_group)
        self.is_compiled = is_compiled

    def forward(self, hidden_SBD: torch.Tensor, **unused: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the product [S, B, D] and the bias [D]."""
        inner_SBF, bias_F = self.linear_fc1(hidden_SBD)
        if self.is_compiled and self.training:
            rows = inner_SBF.flatten(0, 1)
            inner_SBF = compiled(activate)(rows, bias_F, self.activation_func).view_as(inner_SBF)
        else:
            inner_SBF = activate(inner_SBF, bias_F, self.activation_func)
        product: tuple[torch.Tensor, torch.Tensor] = self.linear_fc2(inner_SBF)
        return product
