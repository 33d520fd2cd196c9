"""Geneformer out of megatron-core parts.

Axes: B cells, S places in a cell, D width, V padded vocabulary, M places that are predicted. `_local` marks this
tensor-parallel rank's part.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from celltron.models.geneformer.config import GeneformerConfig
from celltron.models.layers.choice import can_fuse_gradients
from celltron.models.layers.embedding import BertEmbedding
from celltron.models.layers.head import BertHeadTransform
from celltron.models.layers.initialise import initialise
from celltron.models.layers.packing import PackedCells
from celltron.models.layers.parts import Implementation, LayerParts, layer_parts
from celltron.models.layers.post_norm import post_norm_spec
from celltron.models.layers.pre_norm import gelu_tanh, pre_norm_spec

NUM_TOKEN_TYPES = 2
# The output bias of rows that only pad the vocabulary: exp() of it is 0 in every precision, so they take no part.
PADDING_ROW_BIAS = -10_000.0
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "post_norm": torch.nn.functional.relu,
    "pre_norm": gelu_tanh,
    "pre_norm_erf": torch.nn.functional.gelu,
}


class Geneformer(LanguageModule):
    """One pipeline stage of Geneformer, on this rank's tensor-parallel part.

    Args:
        config: The model's shape.
        transformer_config: The same for Megatron, with the layout; see `make_transformer_config`.
        num_tokens: The vocabulary's true size.
        parts: What the layers are built of.
        groups: The process groups of the layout.
    """

    def __init__(
        self,
        config: GeneformerConfig,
        transformer_config: TransformerConfig,
        *,
        num_tokens: int,
        parts: LayerParts,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=transformer_config, pg_collection=groups)
        self.model_type = ModelType.encoder_or_decoder
        self.num_tokens = num_tokens
        self.pre_process = groups.pp.rank() == 0
        self.post_process = groups.pp.rank() == groups.pp.size() - 1
        self.share_embeddings_and_output_weights = True
        padded_tokens = config.padded_vocabulary(num_tokens)
        if self.pre_process:
            self.embedding = BertEmbedding(
                transformer_config,
                num_tokens=padded_tokens,
                max_positions=config.max_positions,
                num_token_types=0 if config.is_pre_norm else NUM_TOKEN_TYPES,
                has_norm=not config.is_pre_norm,
                groups=groups,
            )
        self.encoder = TransformerBlock(
            transformer_config,
            pre_norm_spec(parts, transformer_config) if config.is_pre_norm else post_norm_spec(parts),
            post_layer_norm=config.is_pre_norm,
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=groups,
        )
        if self.post_process:
            # BioNeMo's head has the exact GELU whatever its layers have.
            activation = _ACTIVATIONS["pre_norm_erf" if config.is_pre_norm else "post_norm"]
            self.head = BertHeadTransform(transformer_config, activation=activation)
            self.output_layer = ColumnParallelLinear(
                transformer_config.hidden_size,
                padded_tokens,
                config=_of_output_layer(transformer_config),
                init_method=transformer_config.init_method,
                bias=True,
                skip_weight_param_allocation=self.pre_process,
                tp_group=groups.tp,
            )
        if self.pre_process or self.post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor]) -> None:
        """Take the hidden states [S, B, D] of the stage before; called by Megatron's pipeline schedules."""
        self.encoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(
        self,
        tokens_BS: torch.Tensor,
        is_padding_BS: torch.Tensor | None = None,
        places_M: torch.Tensor | None = None,
        *,
        packed: PackedCells | None = None,
    ) -> torch.Tensor:
        """Run this stage.

        Args:
            tokens_BS: Token ids, int64: a cell a row, or one row of packed cells; where context-parallel processes
                share rows, this one's part of them.
            is_padding_BS: True where there is no token; such places are never attended to. Of whole rows.
            places_M: The places to predict, as b x S + s, int64; None means all, in that order.
            packed: Where the cells of a packed row end; none attends to another.

        Returns:
            On the last stage the logits of this rank's part of the vocabulary, [M, V_local]; on others the hidden
            states [S, B, D] for the next.
        """
        hidden_SBD = self.hidden_states(tokens_BS, is_padding_BS, packed=packed)
        if not self.post_process:
            return hidden_SBD
        return self._logits(hidden_SBD, places_M)

    def hidden_states(
        self, tokens_BS: torch.Tensor, is_padding_BS: torch.Tensor | None = None, *, packed: PackedCells | None = None
    ) -> torch.Tensor:
        """The output of this stage's layers, [S, B, D], or this rank's part of S under sequence parallelism."""
        S_row = tokens_BS.shape[1] * self.config.context_parallel_size
        assert is_padding_BS is None or is_padding_BS.shape[1] == S_row, (is_padding_BS.shape, S_row)
        places_T = None if packed is None else packed.places_T
        embedded_SBD = self.embedding(tokens_BS, places_T) if self.pre_process else None
        hidden_SBD: torch.Tensor = self.encoder(
            hidden_states=embedded_SBD, attention_mask=_attention_mask(is_padding_BS), packed_seq_params=packed
        )
        return hidden_SBD

    def _logits(self, hidden_SBD: torch.Tensor, places_M: torch.Tensor | None) -> torch.Tensor:
        hidden_SBD = hidden_SBD.to(self.config.params_dtype)
        if self.config.sequence_parallel:
            # The head works on whole sequences on every rank, so the backward only cuts the gradient.
            hidden_SBD = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_SBD, tensor_parallel_output_grad=False, group=self.tp_group
            )
        hidden_MD = hidden_SBD.transpose(0, 1).flatten(0, 1)
        if places_M is not None:
            hidden_MD = hidden_MD[places_M]
        # Megatron's linears take [S, B, D].
        logits_M1V: torch.Tensor = self.output_layer(
            self.head(hidden_MD)[:, None, :], weight=self.shared_embedding_or_output_weight()
        )[0]
        return logits_M1V[:, 0, :]


def _attention_mask(is_padding_BS: torch.Tensor | None) -> torch.Tensor | None:
    """True where a place must not be attended to, [B, 1, 1, S]; None where there is none."""
    if is_padding_BS is None:
        return None
    # A cell without tokens would have nothing to attend to; the first place of every other cell is a token.
    is_hidden_BS = is_padding_BS.clone()
    is_hidden_BS[:, 0] = False
    has_padding = bool(is_hidden_BS.any())  # syncs the host
    return is_hidden_BS[:, None, None, :] if has_padding else None


def _of_output_layer(config: TransformerConfig) -> TransformerConfig:
    """Of Megatron's own linear whatever the layers are built of, without sequence parallelism."""
    plain = copy.copy(config)
    plain.sequence_parallel = False
    plain.gradient_accumulation_fusion = config.gradient_accumulation_fusion and can_fuse_gradients()
    return plain


def _leave_as_is(weight: torch.Tensor) -> torch.Tensor:
    return weight


def make_transformer_config(
    config: GeneformerConfig, *, dtype: torch.dtype, sequence_parallel: bool, **settings: Any
) -> TransformerConfig:
    """Translate the shape for Megatron, on the layout that its parallel state has been set up with.

    Args:
        config: The model's shape.
        dtype: Of parameters and activations.
        sequence_parallel: Whether activations are split along the sequence between tensor-parallel ranks.
        **settings: Of Megatron's own, such as those of recomputing activations.
    """
    is_wide = settings.get("fp32_residual_connection", False)
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        hidden_dropout=config.hidden_dropout,
        attention_dropout=config.attention_dropout,
        layernorm_epsilon=config.norm_epsilon,
        activation_func=_ACTIVATIONS[config.variant],
        # Megatron marks a tensor-parallel weight as such where it initialises it; `initialise` then sets the values.
        init_method=_leave_as_is,
        output_layer_init_method=_leave_as_is,
        embedding_init_method=_leave_as_is,
        params_dtype=dtype,
        pipeline_dtype=torch.float32 if is_wide else dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        sequence_parallel=sequence_parallel,
        # Cells differ in length, so pipeline stages tell each other the shape of every micro-batch.
        variable_seq_lengths=True,
        # A stage's output is freed once it is sent. Megatron then starts the backward pass itself, under the CPU's mode
        # of celltron.train.cpu, which `torch.autograd.backward` would leave.
        deallocate_pipeline_outputs=True,
        moe_token_dispatcher_type="alltoall",  # variable lengths are refused with the default, although unused here
        calculate_per_token_loss=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        **settings,
    )


def build_geneformer(
    config: GeneformerConfig,
    *,
    num_tokens: int,
    dtype: torch.dtype,
    sequence_parallel: bool,
    seed: int,
    layers: Implementation = "torch",
    is_compiled: bool = False,
    **settings: Any,
) -> Geneformer:
    """Build this rank's part of the model with its initial weights.

    Args:
        config: The model's shape.
        num_tokens: The vocabulary's size.
        dtype: Of parameters and activations.
        sequence_parallel: Whether activations are split along the sequence between tensor-parallel ranks.
        seed: Of the initial weights, which do not depend on the layout.
        layers: What they are built of; `celltron.models.layers.choice` says which of them can be.
        is_compiled: Whether what stands between a layer's matrix products is compiled in training.
        **settings: Of Megatron's `TransformerConfig`, such as those of recomputing activations.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    transformer_config = make_transformer_config(config, dtype=dtype, sequence_parallel=sequence_parallel, **settings)
    parts = layer_parts(layers, transformer_config, is_compiled=is_compiled)
    model = Geneformer(config, transformer_config, num_tokens=num_tokens, parts=parts, groups=groups)
    initialise(
        model, seed=seed, standard_deviation=config.initial_standard_deviation, num_tokens=num_tokens
    )
    if config.is_pre_norm:
        _scale_branches(model)
    if model.post_process:
        silence_padding_rows(model)
    return model


@torch.no_grad()
def _scale_branches(model: Geneformer) -> None:
    """Divide the initial weights that end a branch by sqrt(2 L), L layers, so that sums do not grow with the depth.

    Source: Shoeybi et al. 2019, doi:10.48550/arXiv.1909.08053, section 5.
    """
    for layer in model.encoder.layers:
        for linear in (layer.self_attention.linear_proj, layer.mlp.linear_fc2):
            linear.weight.mul_((2 * model.config.num_layers) ** -0.5)


@torch.no_grad()
def silence_padding_rows(model: Geneformer) -> None:
    """Give the output rows that only pad the vocabulary a bias under which they never get any probability."""
    bias = model.output_layer.bias
    first_row = model.tp_group.rank() * bias.shape[0]
    bias[max(0, model.num_tokens - first_row) :] = PADDING_ROW_BIAS
