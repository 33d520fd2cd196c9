"""Vectors of cells: the mean of the last layer's hidden states over a cell's tokens.

Axes: C cells, B = C rows, S places in a row, T tokens of all cells, D width.
"""

import torch

from celltron.models.geneformer.model import Geneformer
from celltron.models.layers.packing import PackedCells


def mean_hidden(hidden_TD: torch.Tensor, lengths_C: torch.Tensor) -> torch.Tensor:
    """The mean over each cell's tokens, [C, D], summed in float32 (float64 for float64).

    Args:
        hidden_TD: The cells' tokens one after the other.
        lengths_C: Tokens of each cell, above 0, int32 or int64, on the same device; they sum to T.

    >>> mean_hidden(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([2, 1])).tolist()
    [[2.0], [5.0]]
    """
    wide_TD = hidden_TD.to(torch.promote_types(hidden_TD.dtype, torch.float32))
    # Unsafe means that the lengths are not compared with T, which would sync the host.
    return torch.segment_reduce(wide_TD, "mean", lengths=lengths_C, axis=0, unsafe=True)


@torch.inference_mode()
def embed_cells(
    model: Geneformer,
    tokens_BS: torch.Tensor,
    is_padding_BS: torch.Tensor | None = None,
    *,
    packed: PackedCells | None = None,
) -> torch.Tensor:
    """Embed cells that are rows, or packed into one row; [C, D] in their order.

    The head is not run, so that nothing of the vocabulary's size is computed.

    Args:
        model: A model that one process holds whole, in evaluation mode.
        tokens_BS: Token ids, int64: a cell a row, or one row of packed cells.
        is_padding_BS: True where there is no token; each row has one.
        packed: Where the cells of a packed row end.
    """
    config = model.config
    num_parts = (
        config.tensor_model_parallel_size * config.pipeline_model_parallel_size * config.context_parallel_size
    )
    assert num_parts == 1, f"the model is cut into {num_parts} parts, wanted 1"
    assert not model.training, "the model is in training mode, in which dropout changes the vectors"
    hidden_BSD = model.hidden_states(tokens_BS, is_padding_BS, packed=packed).transpose(0, 1)
    if packed is not None:
        return mean_hidden(hidden_BSD[0], packed.cu_seqlens_q.diff())
    if is_padding_BS is None:
        return hidden_BSD.mean(dim=1, dtype=torch.promote_types(hidden_BSD.dtype, torch.float32))
    return mean_hidden(hidden_BSD[~is_padding_BS], (~is_padding_BS).sum(dim=1))
