"""Tokens of cells where they lie in memory, and copied one after the other.

C cells, T tokens of all cells.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from celltron.cells.compiled import compiled
from celltron.cells.memory import array_at, like


class TokenRows(NamedTuple):
    """Where the tokens of C cells lie.

    ``addresses`` uint64 [C], of each cell's first token; ``lengths`` int32 [C]; ``dtype`` of the tokens there;
    ``memory``, what must live as long as the addresses are used.
    """

    addresses: npt.NDArray[np.uint64]
    lengths: npt.NDArray[np.int32]
    dtype: str
    memory: tuple[object, ...]

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.lengths.sum(dtype=np.int64))


@compiled
def _copy(
    addresses: npt.NDArray[np.uint64],
    lengths: npt.NDArray[np.int32],
    token_like: npt.NDArray[Any],
    out: npt.NDArray[np.int32],
) -> None:
    end = np.int64(0)
    for cell in range(lengths.shape[0]):
        begin, end = end, end + np.int64(lengths[cell])
        out[begin:end] = array_at(addresses[cell], int(lengths[cell]), token_like)


def copy_tokens(rows: TokenRows, out: npt.NDArray[np.int32] | None = None) -> npt.NDArray[np.int32]:
    """The tokens of all cells one after the other, int32 [T], in new memory or in ``out``."""
    tokens = np.empty(rows.num_tokens, dtype=np.int32) if out is None else out
    _copy(rows.addresses, rows.lengths, like(rows.dtype), tokens)
    return tokens
