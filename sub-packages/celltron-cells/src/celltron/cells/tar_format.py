"""The bytes of tar shards: each block of consecutive cells is one webdataset sample of five .npy members.

A block is found by its offset in the tar alone, and its arrays by how many cells and counts it has and of what types:
headers have a fixed length, so nothing of them is ever parsed.

C cells of a block, N their non-zero counts.
"""

import tarfile
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from celltron.cells.map_rows import index_dtype
from celltron.cells.reader import Rows
from celltron.cells.store_manifest import DTYPES
from celltron.core import InputError

FORMAT = "celltron-tar-shards"
VERSION = 1
BLOCKS_NAME = "blocks.parquet"
GENES_NAME = "genes.parquet"
TYPES = tuple((indices, counts) for indices in DTYPES["indices"] for counts in DTYPES["counts"])
"""The types of indices and counts that a block may have."""
MOST_BLOCK_BYTES = 2**32
"""Keeps ``indptr`` within uint32 and every member within the 8 GiB that a ustar header can say."""
OBS_PIECE_BYTES = 2**18
"""Each piece of so many bytes of an obs file has a checksum of its own, so that one column can be read alone."""
_TAR_UNIT = 512
_NPY_HEADER_BYTES = 128
TAR_END = bytes(2 * _TAR_UNIT)


class Block(NamedTuple):
    """Consecutive cells in compressed rows, little-endian, as they lie in a tar.

    ``indptr`` uint32 [C+1]; ``indices`` [N] rising in each cell; ``counts`` [N] above zero; ``totals`` float64 [C], the
    sums of the cells' counts in their source; ``cells`` int64 [C], their numbers in the store.
    """

    indptr: npt.NDArray[np.uint32]
    indices: npt.NDArray[Any]
    counts: npt.NDArray[Any]
    totals: npt.NDArray[np.float64]
    cells: npt.NDArray[np.int64]


class Layout(NamedTuple):
    """Where the arrays of a block begin, in bytes from its own beginning, and how long it is."""

    indptr: Any
    indices: Any
    counts: Any
    totals: Any
    cells: Any
    length: Any


def tar_name(i: int) -> str:
    """The file name of tar ``i``."""
    return f"shard-{i:06d}.tar"


def obs_name(i: int) -> str:
    """The file name of the obs table of the cells of tar ``i``."""
    return f"obs-{i:06d}.parquet"


def sample_key(tar: int, place: int) -> str:
    """The webdataset key of the block at a place of a tar."""
    return f"{tar:06d}-{place:04d}"


def layout_of(num_cells: Any, nnz: Any, index_bytes: Any, count_bytes: Any) -> Layout:
    """The layout of a block, or of many when the arguments are int64 arrays; types by their bytes an item."""
    begins, end = [], 0 * num_cells
    for size in (4 * (num_cells + 1), nnz * index_bytes, nnz * count_bytes, 8 * num_cells, 8 * num_cells):
        begins.append(end + _TAR_UNIT + _NPY_HEADER_BYTES)
        end = begins[-1] + size
        end = end + -end % _TAR_UNIT
    return Layout._make([*begins, end])


def make_block(cells: npt.NDArray[np.int64], rows: Rows, totals: npt.NDArray[np.float64], num_genes: int) -> Block:
    """Bring rows to the smallest types that hold them."""
    counts = rows.counts
    if counts.dtype.kind in "iu":
        largest = int(counts.max(initial=0))
        dtype = next(name for name in DTYPES["counts"] if largest <= np.iinfo(name).max)
    else:
        dtype = "float32"
    arrays = (rows.indptr, rows.gene_index, counts, totals, cells)
    dtypes = ("uint32", index_dtype(num_genes), dtype, "float64", "int64")
    block = Block(*(a.astype(np.dtype(d).newbyteorder("<")) for a, d in zip(arrays, dtypes, strict=True)))
    if not (np.array_equal(block.counts, counts) and np.array_equal(block.indices, rows.gene_index)):
        raise InputError(
            f"cells {cells[0]} to {cells[-1]} hold counts that {dtype} does not hold, or genes beyond {num_genes}: "
            "run celltron verify"
        )
    return block


def problem_of_block(block: Block, num_genes: int) -> str:
    """What is wrong with the rows of a block, or nothing."""
    if not (np.isfinite(block.totals) & (block.totals >= 0)).all():
        return "a total is negative or not finite"
    indptr = block.indptr.astype(np.int64)
    if indptr[0] != 0 or indptr[-1] != len(block.indices) or (indptr[1:] < indptr[:-1]).any():
        return "its rows do not follow each other"
    if len(block.indices) == 0:
        return ""
    rises = block.indices[1:] > block.indices[:-1]
    begins = indptr[1:-1]
    rises[begins[(begins > 0) & (begins < len(block.indices))] - 1] = True
    if not rises.all() or int(block.indices.max()) >= num_genes:
        return f"the genes of a cell do not rise below {num_genes}"
    return "" if (block.counts > 0).all() else "a count is not above zero"


def encode_block(key: str, block: Block) -> bytes:
    """The members of a block, each with its headers: the same bytes for the same block."""
    parts: list[Any] = []
    for name, array in block._asdict().items():
        npy = _npy_header(array)
        member = tarfile.TarInfo(f"{key}.{name}.npy")  # mode 0644, nobody's, of the year 1970
        member.size = len(npy) + array.nbytes
        parts += [member.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"), npy, array.data]
        parts.append(bytes(-member.size % _TAR_UNIT))
    return b"".join(parts)


def decode_block(data: npt.NDArray[np.uint8], num_cells: int, nnz: int, types: tuple[str, str]) -> Block:
    """The arrays of a block whose length fits its layout, as views; headers are not looked at."""
    layout = layout_of(num_cells, nnz, *(np.dtype(name).itemsize for name in types))
    assert len(data) == layout.length, (len(data), layout.length)
    dtypes = ("uint32", *types, "float64", "int64")
    sizes = (num_cells + 1, nnz, nnz, num_cells, num_cells)
    return Block(
        *(
            np.frombuffer(data, np.dtype(dtype).newbyteorder("<"), size, begin)
            for dtype, size, begin in zip(dtypes, sizes, layout, strict=False)
        )
    )


def _npy_header(array: npt.NDArray[Any]) -> bytes:
    """Magic, version 1.0, length of what follows, and the description padded to a fixed length.

    Source: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html, "Format Version 1.0".
    """
    text = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, 'shape': ({len(array)},), }}"
    length = _NPY_HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.ljust(length - 1).encode("ascii") + b"\n"
