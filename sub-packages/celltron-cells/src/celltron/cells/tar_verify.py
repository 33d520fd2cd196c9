"""All that can be wrong with tar shards: every checksum, and every block down to its gene indices."""

import hashlib
import zlib
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from celltron.cells.tar_files import Bytes
from celltron.cells.tar_format import (
    OBS_PIECE_BYTES,
    TAR_END,
    TYPES,
    decode_block,
    encode_block,
    obs_name,
    problem_of_block,
    sample_key,
    tar_name,
)
from celltron.cells.tar_manifest import read_checked
from celltron.cells.threads import Progress, SharedProgress, map_in_order, num_workers
from celltron.core import InputError

if TYPE_CHECKING:
    from celltron.cells.tar_store import TarStore


def verify_tars(store: "TarStore", *, workers: int | None = None, progress: Progress | None = None) -> None:
    """Read every file of tar shards and check it.

    Args:
        store: the shards.
        workers: threads, each with a file at a time; None takes as many as fetch at once.
        progress: called with (bytes read, bytes in all).

    Raises:
        InputError: it names the first bad file and says how many are bad.
    """
    entries = store.manifest["files"]
    advance = SharedProgress(progress, sum(entry["bytes"] for entry in entries.values()))
    tars = {tar_name(i): i for i in range(len(store.manifest["shards"]))}
    tables = {obs_name(i): i for i in tars.values()}

    def check(file: str) -> str:
        """What is wrong with a file, or nothing."""
        try:
            if file in tars:
                _check_tar(store, tars[file], advance)
            else:
                data = read_checked(store.files, store.manifest, file)
                advance(len(data))
                if file in tables:
                    _check_obs(store, tables[file], data.tobytes())
        except InputError as error:
            return str(error)
        return ""

    workers = store.fetchers if workers is None else num_workers(workers)
    problems = [problem for problem in map_in_order(check, list(entries), workers) if problem]
    if problems:
        raise InputError(f"{problems[0]} ({len(problems)} of {len(entries)} files are bad)")
    store.genes  # noqa: B018 - checks them


def _check_tar(store: "TarStore", tar: int, advance: SharedProgress) -> None:
    blocks, entry = store.blocks, store.manifest["files"][tar_name(tar)]
    digest = hashlib.sha256()
    problem = ""
    first, end = np.searchsorted(blocks.tar, [tar, tar + 1]).tolist()
    for i in range(first, end):
        data = store.files.read_range(tar_name(tar), int(blocks.offset[i]), int(blocks.length[i]))
        digest.update(data.data)
        advance(len(data))
        problem = problem or _problem_of_block(store, i, data)
    rest = store.files.read_range(tar_name(tar), entry["bytes"] - len(TAR_END), len(TAR_END))
    digest.update(rest.data)
    advance(len(rest))
    if problem:
        raise InputError(problem)
    if digest.hexdigest() != entry["sha256"]:
        raise InputError(f"{store.files.where(tar_name(tar))} does not fit its checksum: copy the tar again")


def _problem_of_block(store: "TarStore", i: int, data: Bytes) -> str:
    blocks, where = store.blocks, store.blocks.describe(store.files, i)
    if zlib.crc32(data.data) != blocks.crc32[i]:
        return f"{where} does not fit its checksum: copy the tar again"
    first, end = blocks.bounds[i : i + 2].tolist()
    block = decode_block(data, end - first, int(blocks.nnz[i]), TYPES[blocks.types[i]])
    problem = problem_of_block(block, store.num_genes)
    if not problem and not np.array_equal(block.cells, np.arange(first, end)):
        problem = "its cells have other numbers"
    if not problem and encode_block(sample_key(int(blocks.tar[i]), blocks.place(i)), block) != data.tobytes():
        problem = "its headers are not those of its arrays"
    return f"{where} is damaged: {problem}; write the shards again" if problem else ""


def _check_obs(store: "TarStore", tar: int, data: bytes) -> None:
    shard, where = store.manifest["shards"][tar], store.files.where(obs_name(tar))
    pieces = [data[begin : begin + OBS_PIECE_BYTES] for begin in range(0, len(data), OBS_PIECE_BYTES)]
    if [zlib.crc32(piece) for piece in pieces] != shard["obs_crc32"]:
        raise InputError(f"{where} does not fit the checksums of its pieces: write the shards again")
    try:
        obs = pq.ParquetFile(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{where} is no parquet file ({error}): write the shards again") from error
    if obs.schema_arrow.names != store.obs_columns or (store.obs_columns and obs.metadata.num_rows != shard["cells"]):
        raise InputError(f"{where} is damaged: wanted all columns of obs for {shard['cells']} cells; write it again")
