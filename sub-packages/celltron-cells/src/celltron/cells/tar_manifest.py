"""The manifest and the list of blocks of tar shards; both are untrusted, and a block is found in memory by them alone.

B blocks, C cells.
"""

import hashlib
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from celltron.cells.tar_files import OPEN_ATTEMPTS, Bytes, TarFiles
from celltron.cells.tar_format import (
    BLOCKS_NAME,
    FORMAT,
    GENES_NAME,
    MOST_BLOCK_BYTES,
    OBS_PIECE_BYTES,
    TAR_END,
    TYPES,
    VERSION,
    Layout,
    layout_of,
    obs_name,
    tar_name,
)
from celltron.core import MANIFEST_NAME, InputError
from celltron.core.manifest import check_format, file_entries, fits_own_checksum, is_sha256, parse_manifest

COLUMNS = {
    "tar": pa.int32(),
    "offset": pa.int64(),
    "length": pa.int64(),
    "first_cell": pa.int64(),
    "cells": pa.int32(),
    "nnz": pa.int64(),
    "indptr": pa.dictionary(pa.int8(), pa.string()),
    "indices": pa.dictionary(pa.int8(), pa.string()),
    "counts": pa.dictionary(pa.int8(), pa.string()),
    "crc32": pa.uint32(),
}
"""Of ``blocks.parquet``, one row a block: its tar, its place there in bytes, its first cell, how many cells and counts
it has, the types of its arrays, and the checksum of all its bytes."""


class Blocks(NamedTuple):
    """Where each block lies: ``bounds`` int64 [B+1], its first cell and then C; ``types``, its place in `TYPES`."""

    bounds: npt.NDArray[np.int64]
    tar: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    nnz: npt.NDArray[np.int64]
    types: npt.NDArray[np.int8]
    crc32: npt.NDArray[np.uint32]

    def layout(self, blocks: npt.NDArray[np.int64]) -> Layout:
        """The layouts of some blocks."""
        index_bytes, count_bytes = TYPE_BYTES[self.types[blocks]].T
        return layout_of(self.bounds[blocks + 1] - self.bounds[blocks], self.nnz[blocks], index_bytes, count_bytes)

    def fetch(self, files: TarFiles, i: int) -> Bytes:
        """The bytes of a block, held against its checksum."""
        data = files.read_range(tar_name(int(self.tar[i])), int(self.offset[i]), int(self.length[i]))
        if zlib.crc32(data.data) != self.crc32[i]:
            raise InputError(f"{self.describe(files, i)} does not fit its checksum: copy the tar again")
        return data

    def place(self, i: int) -> int:
        """How many blocks come before a block in its tar."""
        return i - int(np.searchsorted(self.tar, self.tar[i]))

    def describe(self, files: TarFiles, i: int) -> str:
        """A block for messages: its tar, its place there and its cells."""
        where = files.where(tar_name(int(self.tar[i])))
        return (
            f"{where}, block {self.place(i)} (cells {self.bounds[i]} to {self.bounds[i + 1] - 1}, at byte "
            f"{self.offset[i]})"
        )


TYPE_BYTES = np.array([[np.dtype(name).itemsize for name in types] for types in TYPES], dtype=np.int64)
"""int64 [types, 2]: bytes of an index and of a count, of each of `TYPES`."""


def read_tar_manifest(files: TarFiles) -> dict[str, Any]:
    """Read ``manifest.json`` and check it: its own checksum, format, version, and every number that is used."""
    where = files.where(MANIFEST_NAME)
    manifest = parse_manifest(files.read(MANIFEST_NAME, attempts=OPEN_ATTEMPTS).tobytes(), where)
    check_format(manifest, where, format=FORMAT, versions=(VERSION,))
    problem = _problem_of(manifest, where)
    if problem:
        raise InputError(f"{where} is damaged: {problem}; copy the shards again")
    return manifest


def _problem_of(manifest: dict[str, Any], where: str) -> str:
    if not fits_own_checksum(manifest):
        return "it does not fit its own checksum"
    if not all(_is_count(manifest.get(key)) for key in ("cells", "genes", "nnz", "block_cells")):
        return "cells, genes, nnz and block_cells must be whole numbers"
    if not is_sha256(manifest.get("store_fingerprint")):
        return "store_fingerprint must be a sha256"
    names, shards, files = manifest.get("obs_columns"), manifest.get("shards"), file_entries(manifest, where)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return "obs_columns must be a list of names"
    if not isinstance(shards, list):
        return "shards must be a list"
    wanted = [BLOCKS_NAME, GENES_NAME, *(name(i) for i in range(len(shards)) for name in (tar_name, obs_name))]
    if set(files) != set(wanted):
        return "the files it lists are not those of its shards"
    for i, shard in enumerate(shards):
        if not isinstance(shard, dict) or not all(_is_count(shard.get(key)) for key in ("cells", "blocks", "nnz")):
            return f"shard {i} must say how many cells, blocks and counts it has"
        pieces, num_bytes = shard.get("obs_crc32"), files[obs_name(i)]["bytes"]
        if not isinstance(pieces, list) or len(pieces) != -(-num_bytes // OBS_PIECE_BYTES):
            return f"shard {i} must have a checksum for each piece of {obs_name(i)}"
    for key in ("cells", "nnz"):
        if sum(shard[key] for shard in shards) != manifest[key]:
            return f"{key} must be the sum over the shards"
    return ""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def read_checked(files: TarFiles, manifest: dict[str, Any], file: str) -> Bytes:
    """A whole small file, held against length and checksum of the manifest."""
    entry = manifest["files"][file]
    data = files.read(file, attempts=OPEN_ATTEMPTS)
    if len(data) != entry["bytes"] or hashlib.sha256(data.data).hexdigest() != entry["sha256"]:
        raise InputError(
            f"{files.where(file)} does not fit {MANIFEST_NAME} ({len(data)} bytes, wanted {entry['bytes']}, or another "
            "content): copy the shards again"
        )
    return data


def read_table(files: TarFiles, manifest: dict[str, Any], file: str) -> pa.Table:
    """A whole parquet file of the shards."""
    data = read_checked(files, manifest, file)
    try:
        return pq.read_table(pa.BufferReader(pa.py_buffer(data)))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{files.where(file)} is no parquet file ({error}): write the shards again") from error


def blocks_table(parts: Sequence[dict[str, Any]]) -> pa.Table:
    """``blocks.parquet`` of rows as dictionaries."""
    return pa.Table.from_pylist(list(parts), schema=pa.schema(COLUMNS))


def read_blocks(files: TarFiles, manifest: dict[str, Any]) -> Blocks:
    """Read ``blocks.parquet``; blocks must follow each other, fill the tars, and be as long as what they hold."""
    table = read_table(files, manifest, BLOCKS_NAME)

    def demand(true: Any, what: str) -> None:
        if not true:
            raise InputError(f"{files.where(BLOCKS_NAME)} is damaged: {what}; write the shards again")

    demand(table.schema.remove_metadata() == pa.schema(COLUMNS), "its columns are not those of this version")
    demand(not any(column.null_count for column in table.columns), "a value is missing")
    column = {name: table[name] for name in table.column_names}
    numbers = {name: column[name].to_numpy() for name in COLUMNS if not pa.types.is_dictionary(COLUMNS[name])}
    demand(all((values >= 0).all() and (values < 2**62).all() for values in numbers.values()), "a number is negative")
    kinds = list(zip(*(column[name].cast(pa.string()).to_pylist() for name in ("indices", "counts")), strict=True))
    demand(set(kinds) <= set(TYPES) and set(column["indptr"].to_pylist()) <= {"uint32"}, "a type is unknown")
    places = {kind: i for i, kind in enumerate(TYPES)}
    blocks = Blocks(
        bounds=np.concatenate([[0], np.cumsum(numbers["cells"], dtype=np.int64)]),
        tar=numbers["tar"],
        offset=numbers["offset"],
        length=numbers["length"],
        nnz=numbers["nnz"],
        types=np.array([places[kind] for kind in kinds], dtype=np.int8),
        crc32=numbers["crc32"],
    )
    demand(np.array_equal(blocks.bounds[:-1], numbers["first_cell"]), "its blocks do not follow each other")
    demand((numbers["cells"] > 0).all(), "a block has no cells")
    demand((blocks.nnz < MOST_BLOCK_BYTES).all() and (blocks.length < MOST_BLOCK_BYTES).all(), "a block is too large")
    demand((blocks.layout(np.arange(len(kinds))).length == blocks.length).all(), "a block is not as long as its arrays")
    _demand_fit(blocks, manifest, demand)
    return blocks


def _demand_fit(blocks: Blocks, manifest: dict[str, Any], demand: Any) -> None:
    """Each tar must be its blocks one after the other, with the cells and counts that the manifest says."""
    shards = manifest["shards"]
    counts = np.array([shard["blocks"] for shard in shards], dtype=np.int64)
    demand(counts.sum() == len(blocks.tar), f"it has {len(blocks.tar)} blocks, the manifest {counts.sum()}")
    demand(np.array_equal(np.repeat(np.arange(len(shards)), counts), blocks.tar), "its blocks are in other tars")
    ends = np.cumsum(counts)
    for i, (first, end) in enumerate(zip(ends - counts, ends, strict=True)):
        part = slice(first, end)
        offsets = np.cumsum(blocks.length[part]) - blocks.length[part]
        size = int(blocks.length[part].sum()) + len(TAR_END)
        demand(np.array_equal(blocks.offset[part], offsets), f"the blocks of {tar_name(i)} do not fill it")
        demand(size == manifest["files"][tar_name(i)]["bytes"], f"{tar_name(i)} has another length")
        demand(blocks.bounds[end] - blocks.bounds[first] == shards[i]["cells"], f"{tar_name(i)} has other cells")
        demand(blocks.nnz[part].sum() == shards[i]["nnz"], f"{tar_name(i)} has other counts")
