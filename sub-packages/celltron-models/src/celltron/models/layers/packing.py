"""Cells packed into one row, as Megatron's layers take them.

Axes: C cells, T tokens of all cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class PackedCells(PackedSeqParams):
    """Where each cell of a row ends; besides what Megatron keeps, on the host and as places.

    `lengths` are the tokens of each cell, all above 0; `places_T` int64, where in its cell each token stands.
    """

    lengths: tuple[int, ...] = ()
    places_T: torch.Tensor | None = None  # noqa: N815

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "PackedCells":
        """Describe cells of such lengths."""
        lengths_C = torch.tensor(lengths, dtype=torch.int32)
        ends_C = lengths_C.cumsum(0, dtype=torch.int32)
        places_T = torch.arange(int(ends_C[-1])) - (ends_C - lengths_C).repeat_interleave(lengths_C)
        ends = torch.nn.functional.pad(ends_C, (1, 0)).to(device, non_blocking=True)
        longest = max(lengths)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            lengths=tuple(lengths),
            places_T=places_T.to(device, non_blocking=True),
        )
