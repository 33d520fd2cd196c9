"""How large Geneformer is on one process of a layout: parameters, activations, and what its operations do.

Nothing is built; the formulas follow `model.py` and the layers with PyTorch's operations. They are of the kind of
Korthikanti et al. 2022 (doi:10.48550/arXiv.2205.05198), section 4, whose layer keeps s b h (34 + 5 a s / h) bytes in 16
bits: this one has a ReLU, or a GELU where norms stand before the branches, and no scores (flash attention, Dao et al.
2022, doi:10.48550/arXiv.2205.14135).

Axes: T places of a micro-batch, padding included, M of them predicted, D width, F feed-forward width, N heads, V padded
vocabulary; t tensor-parallel processes, b bytes of a value.
"""

from dataclasses import dataclass, replace
from typing import Literal

from celltron.models.geneformer.config import GeneformerConfig

Recompute = Literal["none", "selective", "full"]
"""What the backward pass computes anew: nothing, each layer's attention, or all of each layer but its input."""
NUM_TOKEN_TYPES = 2
INDEX_BYTES, FLOAT32_BYTES = 8, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """The share that one process has in the model."""

    tensor: int = 1
    """Processes that share every matrix."""
    pipeline: int = 1
    """Stages."""
    stage: int = 0
    """This process's."""
    context: int = 1
    """Processes that share every row's places."""
    sequence_parallel: bool = False
    """Whether tensor-parallel processes cut the sequence between the matrices."""

    @property
    def is_first(self) -> bool:
        """Whether the embedding is here."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether the head is here."""
        return self.stage == self.pipeline - 1

    @property
    def sequence(self) -> int:
        """Parts into which the sequence is cut."""
        return self.tensor if self.sequence_parallel else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """What of a micro-batch a process computes on; averages are no whole numbers.

    Of context-parallel processes each has an equal part of the places.
    """

    computed: float
    """T, padding included."""
    squares: float
    """Sum over places of the length of their cell, as far as it is computed on: of whole cells the squares of those."""
    predicted: float
    """M."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """What one operation of the forward pass of a micro-batch does on one process."""

    flops: float = 0.0
    """Of matrix products."""
    moved_bytes: float = 0.0
    """Read and written."""
    is_attention: bool = False
    """Whether it is the products of queries with keys, and of weights with values."""
    is_recomputed: bool = False
    """Whether the backward pass does it once more."""
    kernels: int = 1
    """Calls of PyTorch's operations."""


def count_parameters(config: GeneformerConfig, num_tokens: int, share: Share) -> int:
    """Parameters on one process; the whole model's for `Share()`.

    A layer has 4 D^2 + 2 D F in its matrices, of which a process holds 1/t, as of the biases 3 D + F of products whose
    output is split; the other 2 D, and two norms with 4 D, are whole everywhere. The last of several stages has the
    embedding's rows of the vocabulary once more, for the tied decoder.

    >>> count_parameters(GeneformerConfig(), 25_426, Share())
    10300544
    """
    D = config.hidden_size
    count = config.num_layers // share.pipeline * count_layer_parameters(config, share)
    rows = config.padded_vocabulary(num_tokens) // share.tensor
    if share.is_first:
        count += (rows + config.max_positions + (0 if config.is_pre_norm else NUM_TOKEN_TYPES)) * D
    if share.is_last:
        count += D * D + 3 * D + rows + (0 if share.is_first else rows * D)
    return count + _of_outer_norm(config, share)


def count_layer_parameters(config: GeneformerConfig, share: Share) -> int:
    """Those of one layer on one process."""
    D, F = config.hidden_size, config.ffn_hidden_size
    return (4 * D * D + 2 * D * F + 3 * D + F) // share.tensor + _of_sums(D)


def count_split_parameters(config: GeneformerConfig, share: Share) -> int:
    """Those that see only a part of the sequence under sequence parallelism, so that their gradients are summed."""
    return config.num_layers // share.pipeline * _of_sums(config.hidden_size) + _of_outer_norm(config, share)


def _of_sums(hidden_size: int) -> int:
    """Biases that a layer's two sums take, and its two norms."""
    return 2 * hidden_size + 4 * hidden_size


def _of_outer_norm(config: GeneformerConfig, share: Share) -> int:
    """The norm outside the layers: after the embedding, or of a pre-norm model after the last layer."""
    return 2 * config.hidden_size if _has_outer_norm(config, share) else 0


def _has_outer_norm(config: GeneformerConfig, share: Share) -> bool:
    return share.is_last if config.is_pre_norm else share.is_first


def layer_bytes(
    config: GeneformerConfig, share: Share, *, value_bytes: int, mask_bytes: int = 1, recompute: Recompute = "none"
) -> float:
    """What a layer keeps of a place for the backward pass.

    In values of b bytes

        its input, its two norms, and the sum between its branches           4 D       / t with sequence parallelism
        queries, keys, values; what attention gives, a cell a time; those
        together                                                             5 D / t
        feed-forward behind its ReLU; before and behind a GELU               F / t; 2 F / t
        of c context-parallel processes: keys and values of the whole row    2 D c / t

    besides a dropout mask after each branch (D), float32 normalisers of the attention (N / t) and of the norms (4).

    Args:
        config: The model's shape.
        share: The process.
        value_bytes: b.
        mask_bytes: Of a place of a dropout mask; on a CPU they are values.
        recompute: With `selective` a layer keeps nothing that its attention gives but the whole of it, nor what it
            gathers.
    """
    D, F = config.hidden_size, config.ffn_hidden_size
    if recompute == "full":
        return D * value_bytes / share.sequence
    of_masks = 2 * D * mask_bytes if config.hidden_dropout else 0
    on_sequence = 4 * D * value_bytes + 4 * FLOAT32_BYTES + of_masks
    on_heads = (4 * D + (2 if config.is_pre_norm else 1) * F) * value_bytes
    if recompute == "none":
        on_heads += D * value_bytes + config.num_attention_heads * FLOAT32_BYTES
        on_heads += _values_of_row(config, share) * value_bytes
    return on_sequence / share.sequence + on_heads / share.tensor


def _values_of_row(config: GeneformerConfig, share: Share) -> int:
    """Keys and values that context-parallel processes gather, for each place of one of them."""
    return 2 * config.hidden_size * share.context if share.context > 1 else 0


def activation_bytes(
    config: GeneformerConfig,
    share: Share,
    places: Places,
    *,
    value_bytes: int,
    mask_bytes: int = 1,
    recompute: Recompute = "none",
) -> float:
    """What the forward pass of a micro-batch keeps for the backward pass, without the logits; see `logit_bytes`.

    That is what the stage's layers keep, see `layer_bytes`, and on the first stage the embedding, on the last the head.
    """
    D, of_norm = config.hidden_size, 2 * FLOAT32_BYTES
    of_layer = layer_bytes(config, share, value_bytes=value_bytes, mask_bytes=mask_bytes, recompute=recompute)
    of_place = config.num_layers / share.pipeline * of_layer
    if share.is_first:
        of_place += (D * mask_bytes if config.hidden_dropout else 0) / share.sequence + 2 * INDEX_BYTES
    if _has_outer_norm(config, share):
        of_place += (D * value_bytes + of_norm) / share.sequence
    kept = places.computed * of_place
    if share.is_last:
        num_values = (4 if config.is_pre_norm else 3) * D
        kept += places.predicted * (num_values * value_bytes + of_norm + 2 * INDEX_BYTES)
    return kept


def logit_bytes(
    config: GeneformerConfig, num_tokens: int, share: Share, places: Places, *, value_bytes: int
) -> float:
    """The head's logits on predicted places at their peak: M V / t, and in float32 too where they are narrower."""
    if not share.is_last:
        return 0.0
    of_place = max(FLOAT32_BYTES, value_bytes) + (value_bytes if value_bytes < FLOAT32_BYTES else 0)
    return places.predicted * config.padded_vocabulary(num_tokens) / share.tensor * of_place


def working_bytes(
    config: GeneformerConfig,
    num_tokens: int,
    share: Share,
    places: Places,
    *,
    value_bytes: int,
    recompute: Recompute = "none",
) -> float:
    """What a backward pass makes for a moment, about: gradients within one layer, or the whole of the embedding's.

    A layer that is computed anew keeps for that while what it would have kept.
    """
    D, F = config.hidden_size, config.ffn_hidden_size
    of_layer = value_bytes * (2 * D + max(2 * F, 6 * D + _values_of_row(config, share)) / share.tensor)
    if recompute != "none":
        kept = layer_bytes(config, share, value_bytes=value_bytes, recompute=recompute)
        of_layer += layer_bytes(config, share, value_bytes=value_bytes) - kept
    rows = config.padded_vocabulary(num_tokens) / share.tensor
    of_embedding = (int(share.is_first) + int(share.is_last)) * rows * D * value_bytes
    return max(places.computed * of_layer, of_embedding)


def list_operations(
    config: GeneformerConfig,
    num_tokens: int,
    share: Share,
    places: Places,
    *,
    value_bytes: int,
    recompute: Recompute = "none",
) -> list[Operation]:
    """The forward pass of one micro-batch on one process; products of the whole model are those of `flops_per_step`."""
    layer = _layer(config, share, places, value_bytes)
    if recompute != "none":
        layer = [replace(one, is_recomputed=recompute == "full" or one.is_attention) for one in layer]
    operations = layer * (config.num_layers // share.pipeline)
    if share.is_first:
        operations.append(_moves(15 * config.hidden_size * places.computed, value_bytes, kernels=9))
    if share.is_last:
        operations += _head(config, num_tokens, share, places, value_bytes)
    return operations


def _layer(config: GeneformerConfig, share: Share, places: Places, b: int) -> list[Operation]:
    T, t, D, F = places.computed, share.tensor, config.hidden_size, config.ffn_hidden_size
    attention = Operation(
        flops=4.0 * places.squares * D / t, moved_bytes=4.0 * T * D / t * b, is_attention=True, kernels=4
    )
    # Of each branch: add the bias, drop, add the input, normalise.
    of_branch = _moves((7 + 2) * D * T / share.sequence, b, kernels=4)
    return [
        _product(T, D, 3 * D / t, b),
        _moves(2 * 3 * D * T / t, b),  # the bias
        attention,
        _moves(2 * D * T / t, b),  # cells put together again
        _product(T, D / t, D, b),
        of_branch,
        _product(T, D, F / t, b),
        _moves(4 * F * T / t, b, kernels=2),  # bias and ReLU
        _product(T, F / t, D, b),
        of_branch,
    ]


def _head(config: GeneformerConfig, num_tokens: int, share: Share, places: Places, b: int) -> list[Operation]:
    M, D = places.predicted, config.hidden_size
    V_local = config.padded_vocabulary(num_tokens) / share.tensor
    return [
        _product(M, D, D, b),
        _moves(6 * M * D, b, kernels=4),  # gathered, ReLU, norm
        _product(M, D, V_local, b),
        _moves(3 * M * V_local, b, kernels=2),  # the bias, and read for the cross entropy
        _moves(9 * M * V_local, FLOAT32_BYTES, kernels=12),  # which takes the maximum from them, exponentiates, ...
    ]


def _product(m: float, k: float, n: float, b: int) -> Operation:
    """[m, k] with [k, n]."""
    return Operation(flops=2.0 * m * k * n, moved_bytes=b * (m * k + k * n + m * n))


def _moves(num_values: float, b: int, kernels: int = 1) -> Operation:
    return Operation(moved_bytes=b * num_values, kernels=kernels)
