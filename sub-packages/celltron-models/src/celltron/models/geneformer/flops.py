"""Arithmetic of Geneformer, counted from its shapes.

Axes: T tokens of all cells, M places that are predicted, D width, F feed-forward width, V vocabulary.
"""

from celltron.models.geneformer.config import GeneformerConfig

BACKWARD_PER_FORWARD = 2
"""Each product of the forward pass has two in the backward pass: one to its input, one to its weight."""


def flops_per_step(
    config: GeneformerConfig, num_tokens: int, lengths_sum: float, lengths_square_sum: float, num_predicted: float
) -> float:
    """Floating-point operations of forward and backward over cells with lengths l_1, l_2, ...

    A product of [m, k] with [k, n] is 2 m n k operations. With T = sum(l_i) the forward pass is

        num_layers x (2 T D 3D      queries, keys, values
                    + 2 T D D       projection
                    + 4 T D F       feed-forward, two products
                    + 4 sum(l_i^2) D)   scores and values of the attention, all heads together
        + 2 M D (D + V)             head and decoder, on predicted places only

    and a training step is three times that. Embeddings, norms, activations, dropout and softmax are not counted, nor
    what is computed twice (recomputed activations, the scores in flash attention's backward pass) or on padding: it is
    the work that the model asks for, as in Chowdhery et al. 2022 (PaLM, doi:10.48550/arXiv.2204.02311, appendix B).

    Args:
        config: The model's shape.
        num_tokens: V. The true vocabulary counts what is asked for, `config.padded_vocabulary` of it what is computed.
        lengths_sum: T, special tokens included.
        lengths_square_sum: Sum of the squares of the cells' lengths: a place attends within its cell.
        num_predicted: M.

    A cell of 2,048 genes, 15 % of them predicted, by the 10M model:

    >>> flops = flops_per_step(GeneformerConfig(), 25_426, 2048, 2048**2, 307)
    >>> f"{flops:.4g} in the step, {flops / 2048:.4g} a token"
    '1.281e+11 in the step, 6.254e+07 a token'
    """
    D, F = config.hidden_size, config.ffn_hidden_size
    of_layer = lengths_sum * (8.0 * D * D + 4.0 * D * F) + 4.0 * D * lengths_square_sum
    forward = config.num_layers * of_layer + 2.0 * num_predicted * D * (D + num_tokens)
    return (1 + BACKWARD_PER_FORWARD) * forward
