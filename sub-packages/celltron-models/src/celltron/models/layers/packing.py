"""Cells packed into one row, as Megatron's layers take them.

Axes: C cells, T tokens of all cells, or of the part of the row that a context-parallel process holds.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class PackedCells(PackedSeqParams):
    """Where each cell of a row ends; besides what Megatron keeps, on the host and as places.

    `lengths` are the tokens of each cell, all above 0; `places_T` int64, where in its cell each token stands.

    Of a part of a row, these are the cells that have tokens in it and those tokens alone. They attend to the whole of
    their cells, which have `key_lengths` tokens and stand at the places `keys` of the row.
    """

    lengths: tuple[int, ...] = ()
    places_T: torch.Tensor | None = None  # noqa: N815
    key_lengths: tuple[int, ...] = ()
    keys: slice = field(default_factory=lambda: slice(0))

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device, *, part: slice | None = None) -> "PackedCells":
        """Describe cells of such lengths.

        Args:
            lengths: Tokens of the cells of a row, one after the other.
            device: Where the model is.
            part: The places of the row that this process holds, at least one; it may begin and end within a cell.

        A row of cells of 3, 4 and 2 tokens, of which two processes hold 5 and 4:

        >>> part = PackedCells.of([3, 4, 2], torch.device("cpu"), part=slice(5, 9))
        >>> part.lengths, part.key_lengths, part.keys
        ((2, 2), (4, 2), slice(3, 9, None))
        >>> part.places_T.tolist()
        [2, 3, 0, 1]
        """
        lengths_C = torch.tensor(lengths, dtype=torch.int32)
        ends_C = lengths_C.cumsum(0, dtype=torch.int32)
        starts_C, num_places = ends_C - lengths_C, int(ends_C[-1])
        begin, end, _ = (part or slice(None)).indices(num_places)
        here_C = (torch.clamp(ends_C, max=end) - torch.clamp(starts_C, min=begin)).clamp(min=0)
        is_here_C = here_C > 0
        queries, keys = here_C[is_here_C], lengths_C[is_here_C]
        places_T = torch.arange(begin, end) - starts_C[is_here_C].repeat_interleave(queries)
        ends = _ends(queries, device)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends if torch.equal(queries, keys) else _ends(keys, device),
            max_seqlen_q=int(queries.max()),
            max_seqlen_kv=int(keys.max()),
            lengths=tuple(queries.tolist()),
            places_T=places_T.to(device, non_blocking=True),
            key_lengths=tuple(keys.tolist()),
            keys=slice(int(starts_C[is_here_C][0]), int(ends_C[is_here_C][-1])),
        )

    def map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "PackedCells":
        """The same cells with every tensor changed, such as put on another device."""
        changed = copy(self)
        changed.cu_seqlens_q = change(self.cu_seqlens_q)
        is_alike = self.cu_seqlens_kv is self.cu_seqlens_q
        changed.cu_seqlens_kv = changed.cu_seqlens_q if is_alike else change(self.cu_seqlens_kv)
        if self.places_T is not None:
            changed.places_T = change(self.places_T)
        return changed


def _ends(lengths_C: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Flash attention's int32 [C + 1]: 0, and where each cell ends."""
    ends_C = lengths_C.cumsum(0, dtype=torch.int32)
    return torch.nn.functional.pad(ends_C, (1, 0)).to(device, non_blocking=True)
