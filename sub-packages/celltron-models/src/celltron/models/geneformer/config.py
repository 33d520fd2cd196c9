"""Geneformer's shape and regularisation."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneformerConfig:
    """Geneformer (Theodoris et al. 2023), the BERT that Hugging Face calls `BertForMaskedLM`, or a variant of it."""

    variant: Literal["post_norm", "pre_norm", "pre_norm_erf"] = "post_norm"
    """`post_norm` is Geneformer as published; `pre_norm` is BioNeMo's: norms before the branches and after the last
    layer, GELU in its tanh form, no norm and no token types in the embedding; `pre_norm_erf` has the exact GELU."""
    num_layers: int = 6
    """Transformer layers."""
    hidden_size: int = 256
    """Width D of the hidden states."""
    ffn_hidden_size: int = 512
    """Width of the feed-forward branch."""
    num_attention_heads: int = 4
    """Attention heads; D is a multiple of it."""
    max_positions: int = 2048
    """Rows of the position table: the longest cell in places, special tokens included."""
    hidden_dropout: float = 0.02
    """Probability of dropping a value after the embedding, the attention and the feed-forward branch."""
    attention_dropout: float = 0.02
    """Probability of dropping an attention weight; above 0, PyTorch's layers attend more slowly, on a CPU without fused
    attention."""
    norm_epsilon: float = 1e-12
    """Added to the variance in every layer norm."""
    initial_standard_deviation: float = 0.02
    """Standard deviation of the initial weights, in `pre_norm` of those that end a branch over sqrt(2 x layers); biases
    start at 0, norms at 1."""
    vocabulary_multiple: int = 128
    """The vocabulary is padded to a multiple of this in every layout; the tensor-parallel size divides it."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}, but must be at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.hidden_size is {self.hidden_size}, which is no multiple of model.num_attention_heads "
                f"({self.num_attention_heads}); change one of them"
            )
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"model.{name} is {getattr(self, name)}, but must lie in [0, 1)")
        if self.norm_epsilon <= 0:
            raise ValueError(f"model.norm_epsilon is {self.norm_epsilon}, but must be above 0")
        if self.initial_standard_deviation < 0:
            raise ValueError(
                f"model.initial_standard_deviation is {self.initial_standard_deviation}, but must not be negative"
            )
        if self.vocabulary_multiple < 1:
            raise ValueError(f"model.vocabulary_multiple is {self.vocabulary_multiple}, but must be at least 1")

    @property
    def is_pre_norm(self) -> bool:
        """Whether norms stand before the branches."""
        return self.variant != "post_norm"

    def check_layout(self, *, tensor_parallel: int, pipeline_parallel: int) -> None:
        """Raise ValueError where this shape cannot be cut into the given numbers of parts."""
        if self.num_attention_heads % tensor_parallel:
            raise ValueError(
                f"model.num_attention_heads is {self.num_attention_heads}, which parallel.tensor "
                f"({tensor_parallel}) does not divide; choose a divisor of the number of heads"
            )
        if self.ffn_hidden_size % tensor_parallel:
            raise ValueError(
                f"model.ffn_hidden_size is {self.ffn_hidden_size}, which parallel.tensor ({tensor_parallel}) "
                "does not divide; choose a divisor"
            )
        if self.vocabulary_multiple % tensor_parallel:
            raise ValueError(
                f"model.vocabulary_multiple is {self.vocabulary_multiple}, which parallel.tensor ({tensor_parallel}) "
                "does not divide; choose a multiple of it"
            )
        if self.num_layers % pipeline_parallel:
            raise ValueError(
                f"model.num_layers is {self.num_layers}, which parallel.pipeline ({pipeline_parallel}) does not "
                "divide; choose a divisor of the number of layers"
            )

    def padded_vocabulary(self, num_tokens: int) -> int:
        """Rows of the embedding for a vocabulary of `num_tokens`."""
        return -(-num_tokens // self.vocabulary_multiple) * self.vocabulary_multiple
