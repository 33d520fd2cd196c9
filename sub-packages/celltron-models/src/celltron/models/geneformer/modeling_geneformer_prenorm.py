"""Pre-norm Geneformer for `transformers`: the whole model, in one file that needs nothing but torch and transformers.

A BERT as megatron-core builds it: token plus learned position embedding, without norm or token types; layers that
normalise before attention and feed-forward branch; a last norm; BERT's head; a decoder tied to the token embedding.
Load it with `AutoModelForMaskedLM.from_pretrained(FOLDER, trust_remote_code=True)`.

Axes: B cells, S places in a cell, D width, F feed-forward width, N heads, H head width, V vocabulary.
"""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

# What `hidden_act` may be, and how its GELU is computed.
APPROXIMATE = {"gelu_pytorch_tanh": "tanh", "gelu": "none"}


class PreNormGeneformerConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """The shape of a pre-norm Geneformer; fields are named as BERT's.

    `hidden_act` is the feed-forward branch's: `gelu_pytorch_tanh` or `gelu`; the head's is always the exact `gelu`.
    """

    model_type = "geneformer_prenorm"

    vocab_size: int = 25429
    hidden_size: int = 256
    num_hidden_layers: int = 6
    intermediate_size: int = 512
    num_attention_heads: int = 4
    max_position_embeddings: int = 2048
    hidden_act: str = "gelu_pytorch_tanh"
    hidden_dropout_prob: float = 0.02
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02


class PreNormEmbedding(nn.Module):
    """dropout(token + position)."""

    def __init__(self, config: PreNormGeneformerConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """Return [B, S, D]."""
        num_places = tokens_BS.shape[1]
        if num_places > self.position_embeddings.num_embeddings:
            raise ValueError(
                f"input_ids has {num_places} places, more than the {self.position_embeddings.num_embeddings} positions"
            )
        embedded_BSD = self.word_embeddings(tokens_BS) + self.position_embeddings.weight[:num_places]
        dropped_BSD: torch.Tensor = self.dropout(embedded_BSD)
        return dropped_BSD


class PreNormAttention(nn.Module):
    """Attention of every place to every visible one; rows of `linear_qkv` run over [N, 3, H]."""

    def __init__(self, config: PreNormGeneformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.linear_qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.linear_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_BSD: torch.Tensor, is_visible_B11S: torch.Tensor | None) -> torch.Tensor:
        """Return [B, S, D]."""
        qkv_BSN3H = self.linear_qkv(hidden_BSD).unflatten(-1, (self.num_heads, 3, -1))
        q_BNSH, k_BNSH, v_BNSH = qkv_BSN3H.transpose(1, 2).unbind(3)
        attended_BNSH = nn.functional.scaled_dot_product_attention(
            q_BNSH, k_BNSH, v_BNSH, attn_mask=is_visible_B11S, dropout_p=self.dropout if self.training else 0.0
        )
        projected_BSD: torch.Tensor = self.linear_proj(attended_BNSH.transpose(1, 2).flatten(2))
        return projected_BSD


class PreNormMLP(nn.Module):
    """D to F to D, with a GELU between."""

    def __init__(self, config: PreNormGeneformerConfig) -> None:
        super().__init__()
        if config.hidden_act not in APPROXIMATE:
            raise ValueError(f"hidden_act is {config.hidden_act!r}, wanted one of {', '.join(APPROXIMATE)}")
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.approximate = APPROXIMATE[config.hidden_act]

    def forward(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        """Return [B, S, D]."""
        inner_BSF = nn.functional.gelu(self.linear_fc1(hidden_BSD), approximate=self.approximate)
        outer_BSD: torch.Tensor = self.linear_fc2(inner_BSF)
        return outer_BSD


class PreNormLayer(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: PreNormGeneformerConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attention = PreNormAttention(config)
        self.pre_mlp_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = PreNormMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_BSD: torch.Tensor, is_visible_B11S: torch.Tensor | None) -> torch.Tensor:
        """Return [B, S, D]."""
        attended_BSD = self.self_attention(self.input_layernorm(hidden_BSD), is_visible_B11S)
        hidden_BSD = hidden_BSD + self.dropout(attended_BSD)
        hidden_BSD = hidden_BSD + self.dropout(self.mlp(self.pre_mlp_layernorm(hidden_BSD)))
        return hidden_BSD


class PreNormEncoder(nn.Module):
    """The layers and the last norm."""

    def __init__(self, config: PreNormGeneformerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PreNormLayer(config) for _ in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_BSD: torch.Tensor, is_visible_B11S: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Return the hidden states before every layer and, last, the normalised output: L + 1 of [B, S, D]."""
        all_hidden = []
        for layer in self.layers:
            all_hidden.append(hidden_BSD)
            hidden_BSD = layer(hidden_BSD, is_visible_B11S)
        return (*all_hidden, self.final_layernorm(hidden_BSD))


class PreNormHead(nn.Module):
    """norm(gelu(W x + b)): what stands between the encoder and the tied decoder."""

    def __init__(self, config: PreNormGeneformerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        """Return [B, S, D]."""
        transformed_BSD: torch.Tensor = self.norm(nn.functional.gelu(self.dense(hidden_BSD)))
        return transformed_BSD


class PreNormGeneformerPreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """What both models share with `transformers`."""

    config_class = PreNormGeneformerConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def wants_names(self, return_dict: bool | None) -> bool:
        """Whether to answer with names; None takes the config's."""
        return bool(self.config.return_dict if return_dict is None else return_dict)


class PreNormGeneformerModel(PreNormGeneformerPreTrainedModel):  # type: ignore[no-untyped-call]
    """The encoder alone: tokens to hidden states."""

    def __init__(self, config: PreNormGeneformerConfig) -> None:
        super().__init__(config)
        self.embedding = PreNormEmbedding(config)
        self.encoder = PreNormEncoder(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another token embedding in its place."""
        assert isinstance(value, nn.Embedding), type(value)
        self.embedding.word_embeddings = value

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        token_type_ids: torch.Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutput | tuple[torch.Tensor, ...]:
        """Run the encoder.

        Args:
            input_ids: Token ids [B, S].
            attention_mask: 1 where there is a token, 0 where there is padding, [B, S].
            output_hidden_states: Whether to give the hidden states before every layer too.
            return_dict: Whether to answer with names; None takes the config's.
            token_type_ids: What tokenizers of BERT add: zeros, for this model has one type of token.
            output_attentions: Never true, as the attention weights are not kept; None takes the config's.
        """
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions is true, but this model does not keep its attention weights")
        if token_type_ids is not None and token_type_ids.any():  # syncs the host
            raise ValueError("token_type_ids holds more than zeros, but this model has one type of token")
        is_visible_B11S = None
        if attention_mask is not None:
            is_visible_B11S = attention_mask[:, None, None, :].bool()
            # A cell without tokens would have nothing to attend to.
            is_visible_B11S = is_visible_B11S | ~is_visible_B11S.any(-1, keepdim=True)
        all_hidden = self.encoder(self.embedding(input_ids), is_visible_B11S)
        wants_all = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = BaseModelOutput(last_hidden_state=all_hidden[-1], hidden_states=all_hidden if wants_all else None)
        return output if self.wants_names(return_dict) else output.to_tuple()


class PreNormGeneformerForMaskedLM(PreNormGeneformerPreTrainedModel):  # type: ignore[no-untyped-call]
    """The encoder with the head that predicts masked genes."""

    def __init__(self, config: PreNormGeneformerConfig) -> None:
        super().__init__(config)
        self.model = PreNormGeneformerModel(config)
        self.head = PreNormHead(config)
        self.output_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        token_type_ids: torch.Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> MaskedLMOutput | tuple[torch.Tensor, ...]:
        """Predict the token at every place.

        Args:
            input_ids: Token ids [B, S].
            attention_mask: 1 where there is a token, 0 where there is padding, [B, S].
            labels: True token ids [B, S], -100 where nothing is to be predicted; gives `loss`, the mean over the rest.
            output_hidden_states: Whether to give the encoder's hidden states too.
            return_dict: Whether to answer with names; None takes the config's.
            token_type_ids: What tokenizers of BERT add: zeros, for this model has one type of token.
            output_attentions: Never true, as the attention weights are not kept; None takes the config's.
        """
        encoded = self.model(
            input_ids,
            attention_mask,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            token_type_ids=token_type_ids,
            output_attentions=output_attentions,
        )
        # The decoder is the token embedding.
        logits_BSV = nn.functional.linear(
            self.head(encoded.last_hidden_state), self.model.get_input_embeddings().weight, self.output_bias
        )
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits_BSV.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        output = MaskedLMOutput(loss=loss, logits=logits_BSV, hidden_states=encoded.hidden_states)
        return output if self.wants_names(return_dict) else output.to_tuple()
