"""Rows of counts read where they lie: kernels that follow the addresses of a `Located` instead of copying arrays.

K located cells, C cells asked for, N non-zero counts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from numba import types
from numba.extending import intrinsic

from celltron.cells.compiled import compiled
from celltron.cells.reader import Located, Rows


@intrinsic
def _pointer_of(typing_context: Any, address: Any) -> Any:
    """An address as a pointer that `numba.carray` takes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.uint64), generate


@numba.njit(inline="always")
def array_at(address: np.uint64, size: int, like: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array of ``size`` values of ``like``'s type that begins at an address; for kernels only."""
    return numba.carray(_pointer_of(address), (size,), like.dtype)  # type: ignore[attr-defined, call-arg]


def address_of(array: npt.NDArray[Any]) -> int:
    """Where an array's data begins."""
    return int(array.__array_interface__["data"][0])


def like(dtype: str) -> npt.NDArray[Any]:
    """An empty array that tells a kernel the type behind an address."""
    return np.empty(0, dtype=np.dtype(dtype).newbyteorder("="))


class Addresses(NamedTuple):
    """What kernels take of a `Located`."""

    slots: npt.NDArray[np.int64]
    indices: npt.NDArray[np.uint64]
    counts: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.int64]
    totals: npt.NDArray[np.float64]


def addresses_of(located: Located) -> Addresses:
    """The arrays of a `Located`, without the types and the memory that belong to them."""
    return Addresses(located.slots, located.index_addresses, located.count_addresses, located.sizes, located.totals)


@compiled
def _copy(rows: Addresses, index_like: npt.NDArray[Any], count_like: npt.NDArray[Any], out: Rows) -> None:
    indptr, gene_index, counts = out
    for k in range(rows.slots.shape[0]):
        begin, size = indptr[rows.slots[k]], rows.sizes[k]
        gene_index[begin : begin + size] = array_at(rows.indices[k], size, index_like)
        counts[begin : begin + size] = array_at(rows.counts[k], size, count_like)


def copy_rows(located: Sequence[Located], num_cells: int, index_dtype: str, count_dtype: str) -> Rows:
    """Copy located cells in the order of their slots ``0 .. num_cells - 1``, gene indices as each member has them."""
    indptr = np.zeros(num_cells + 1, dtype=np.int64)
    for part in located:
        indptr[part.slots + 1] = part.sizes
    np.cumsum(indptr, out=indptr)
    rows = Rows(indptr, np.empty(indptr[-1], dtype=index_dtype), np.empty(indptr[-1], dtype=count_dtype))
    for part in located:
        _copy(addresses_of(part), like(part.index_dtype), like(part.count_dtype), rows)
    return rows
