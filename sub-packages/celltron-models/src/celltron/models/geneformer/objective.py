"""Masked gene prediction.

Axes: M masked places, V padded vocabulary.
"""

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy


def masked_gene_loss(logits_MV_local: torch.Tensor, labels_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over the masked places of -log p(gene), and their number (Devlin et al. 2019, section 3.1, task 1).

    Args:
        logits_MV_local: This tensor-parallel rank's part of the logits; overwritten.
        labels_M: The true token ids, int64.

    Returns:
        The sum in nats (float32, or float64 for float64 logits) and the count (int32), both scalars.
    """
    # [M, 1, V] is Megatron's [S, B, V].
    loss_M = vocab_parallel_cross_entropy(logits_MV_local[:, None, :], labels_M[:, None])
    count = torch.tensor(labels_M.numel(), dtype=torch.int32, device=labels_M.device)
    return loss_M.sum(), count
