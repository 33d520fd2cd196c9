"""BERT's input embedding under tensor and sequence parallelism.

Axes: B cells, S places in a cell (this context-parallel process's part of them), D width, V vocabulary.
"""

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from celltron.models.layers.norm import LayerNorm


class BertEmbedding(MegatronModule):
    """dropout(norm(token + position + token type)), token type 0 everywhere (Devlin et al. 2019, section 3).

    Of a pre-norm model it is dropout(token + position).

    Args:
        config: Width, dropout, dtype and sequence parallelism.
        num_tokens: V, a multiple of the tensor-parallel size.
        max_positions: The longest cell, in places.
        num_token_types: Rows of the token-type table, of which only the first is used; 0 makes none.
        has_norm: Whether the sum is normalised.
        groups: The tensor-parallel and the context-parallel group.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        num_tokens: int,
        max_positions: int,
        num_token_types: int,
        has_norm: bool = True,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.groups = groups
        self.context_rank = groups.cp.rank()
        placement = {"device": torch.cuda.current_device(), "dtype": config.params_dtype}
        self.word_embeddings = VocabParallelEmbedding(
            num_tokens,
            config.hidden_size,
            init_method=config.embedding_init_method,
            config=config,
            tp_group=groups.tp,
        )
        self.position_embeddings = torch.nn.Embedding(max_positions, config.hidden_size, **placement)
        self.token_type_embeddings = (
            torch.nn.Embedding(num_token_types, config.hidden_size, **placement) if num_token_types else None
        )
        self.norm = (
            LayerNorm(config, config.hidden_size, config.layernorm_epsilon) if has_norm else torch.nn.Identity()
        )
        self.dropout = torch.nn.Dropout(config.hidden_dropout)

    def forward(self, tokens_BS: torch.Tensor, places_S: torch.Tensor | None = None) -> torch.Tensor:
        """Return [S, B, D], or this rank's part of S under sequence parallelism; float32 where the residual is.

        `places_S` says where in its cell each token stands, for cells packed into one row; without, rows are this
        context-parallel process's part of cells.
        """
        if places_S is None:
            S = tokens_BS.shape[1]
            first = self.context_rank * S
            places_S = torch.arange(first, first + S, device=tokens_BS.device)
        words_BSD = self.word_embeddings(tokens_BS)
        if self.config.fp32_residual_connection:
            words_BSD = words_BSD.float()
        embedded_BSD = words_BSD + self.position_embeddings(places_S)
        if self.token_type_embeddings is not None:
            embedded_BSD = embedded_BSD + self.token_type_embeddings(tokens_BS.new_zeros(()))
        embedded_SBD: torch.Tensor = embedded_BSD.transpose(0, 1).contiguous()
        if self.config.sequence_parallel:
            embedded_SBD = tensor_parallel.scatter_to_sequence_parallel_region(embedded_SBD, group=self.groups.tp)
            with tensor_parallel.get_cuda_rng_tracker().fork():
                embedded_SBD = self.dropout(self.norm(embedded_SBD))
        else:
            embedded_SBD = self.dropout(self.norm(embedded_SBD))
        return embedded_SBD
