"""Cells as webdataset tars for object storage: blocks of consecutive cells, an index, and obs beside every tar.

C cells, B blocks.
"""

import json
import shutil
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from celltron.cells.map_rows import index_dtype
from celltron.cells.reader import CellReader
from celltron.cells.store_writer import write_tables
from celltron.cells.tar_format import (
    BLOCKS_NAME,
    FORMAT,
    GENES_NAME,
    MOST_BLOCK_BYTES,
    OBS_PIECE_BYTES,
    TAR_END,
    VERSION,
    Block,
    encode_block,
    layout_of,
    make_block,
    obs_name,
    problem_of_block,
    sample_key,
    tar_name,
)
from celltron.cells.tar_manifest import blocks_table
from celltron.cells.threads import Progress, SharedProgress, map_in_order, num_workers
from celltron.core import InputError, __version__, write_artefact, write_atomically
from celltron.core.durable import HashedFile, hash_file

BLOCK_CELLS = 256
SHARD_BYTES = 256 * 2**20
PLAN_CELLS = 2**16
LARGEST_COUNT_BYTES = 8
DONE_FOLDER, SETTINGS_NAME = "done", "settings.json"
"""Until all is written, the partial folder says what has been done, and for what settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReport:
    """What `shard_store` wrote; ``str(report)`` is what the command prints."""

    out: str
    num_cells: int
    num_tars: int
    num_blocks: int
    nnz: int
    num_bytes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.out}: {self.num_cells:,} cells in {self.num_blocks:,} blocks, {self.num_tars:,} tar "
            f"shard{'s' * (self.num_tars != 1)}, {self.num_bytes / 1e6:,.1f} MB "
            f"({self.num_bytes / max(self.nnz, 1):.2f} bytes a count), written in {self.seconds:.1f} s "
            f"({self.num_cells / max(self.seconds, 1e-9):,.0f} cells/s)"
        )


class _Plan(NamedTuple):
    """What goes where.

    ``bounds`` int64 [B+1], the first cell of each block and then C; ``tars`` int64 [tars + 1], the first block of each
    tar and then B.
    """

    bounds: npt.NDArray[np.int64]
    tars: npt.NDArray[np.int64]

    @property
    def num_tars(self) -> int:
        return len(self.tars) - 1

    def cells_of(self, tar: int) -> tuple[int, int]:
        """The first cell of a tar and that of the next one."""
        first, end = self.bounds[self.tars[tar : tar + 2]].tolist()
        return first, end


def shard_store(
    reader: CellReader,
    out: str | Path,
    *,
    block_cells: int = BLOCK_CELLS,
    shard_bytes: int = SHARD_BYTES,
    replace: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> ShardReport:
    """Write the cells of a store or collection as webdataset-compatible tars, which `TarStore` streams.

    A tar holds blocks of consecutive cells, each one sample ``TAR-BLOCK`` with the members ``indptr.npy``,
    ``indices.npy``, ``counts.npy``, ``totals.npy`` and ``cells.npy`` (see `Block`), so that
    ``wds.WebDataset(tars).decode()`` yields the arrays. Beside the tars lie their obs, the genes, the list of blocks
    and a manifest with the checksums of all. The same cells give the same bytes, whatever ``workers``. Nothing opens at
    ``out`` until all is written; after a kill or Ctrl-C the same call goes on with the tars that are complete.

    The counts get new checksums here: verify the store first if its disk is not to be trusted.

    Args:
        reader: what to write.
        out: folder to make; upload it as it is.
        block_cells: cells in a block, which is fetched whole; the last one may be smaller.
        shard_bytes: a tar is at most about so long; a block that is longer has a tar of its own.
        replace: replace tar shards at ``out`` once the new ones are complete.
        workers: threads, each writing a tar; one a processor otherwise.
        progress: called with (cells done, cells in all) after each block.
    """
    if block_cells < 1:
        raise InputError(f"block_cells is {block_cells}: wanted 1 or more cells in a block")
    if shard_bytes < 1:
        raise InputError(f"shard_bytes is {shard_bytes}: wanted 1 or more bytes in a tar")
    began, out, workers = time.monotonic(), Path(out), num_workers(workers)
    with write_artefact(out, format=FORMAT, version=VERSION, replace=replace, resume=True) as artefact:
        artefact.leave = True
        job = _Job(
            reader, _plan(reader, block_cells, shard_bytes), artefact.folder, SharedProgress(progress, len(reader))
        )
        job.begin({"store": reader.fingerprint, "block_cells": block_cells, "shard_bytes": shard_bytes})
        artefact.leave = False
        obs = _obs_table(reader)
        tars = list(map_in_order(lambda tar: job.tar(tar, obs), range(job.plan.num_tars), workers))
        blocks = [block for tar in tars for block in tar["blocks"]]
        artefact.files[GENES_NAME] = write_tables([_gene_table(reader)], artefact.folder / GENES_NAME)
        artefact.files[BLOCKS_NAME] = write_tables([blocks_table(blocks)], artefact.folder / BLOCKS_NAME)
        artefact.meta |= _meta(reader, tars, block_cells, obs.column_names)
        artefact.files |= {name: entry for tar in tars for name, entry in tar["files"].items()}
        artefact.remove.append(DONE_FOLDER)
        num_bytes = sum(file.stat().st_size for file in artefact.folder.iterdir() if file.is_file())
    return ShardReport(
        out=str(out),
        num_cells=len(reader),
        num_tars=len(tars),
        num_blocks=len(blocks),
        nnz=artefact.meta["nnz"],
        num_bytes=num_bytes,
        seconds=time.monotonic() - began,
    )


def _plan(reader: CellReader, block_cells: int, shard_bytes: int) -> _Plan:
    """Cut the cells into blocks and the blocks into tars, by about how long they will be."""
    num_cells = len(reader)
    bounds = np.append(np.arange(0, num_cells, block_cells, dtype=np.int64), num_cells)
    blocks_at_once = max(1, PLAN_CELLS // block_cells)
    sizes: list[int] = []
    for first in range(0, len(bounds) - 1, blocks_at_once):
        sizes += _block_bytes(reader, bounds[first : first + blocks_at_once + 1], block_cells).tolist()
    tars, length = [0], 0
    for block, size in enumerate(sizes):
        if length and length + size > shard_bytes:
            tars.append(block)
            length = 0
        length += size
    return _Plan(bounds, np.array([*tars, len(bounds) - 1] if num_cells else [0], dtype=np.int64))


def _block_bytes(reader: CellReader, bounds: npt.NDArray[np.int64], block_cells: int) -> npt.NDArray[np.int64]:
    """int64: about how long each block will be; counts above 65,535 are rare, and are not looked for."""
    num_blocks = len(bounds) - 1
    nnz, count_bytes = np.zeros(num_blocks, dtype=np.int64), np.ones(num_blocks, dtype=np.int64)
    for part in reader.locate(np.arange(bounds[0], bounds[-1], dtype=np.int64)):
        block_of = part.slots // block_cells
        nnz += np.bincount(block_of, weights=part.sizes, minlength=num_blocks).astype(np.int64)
        count_type = np.dtype(part.count_dtype)
        np.maximum.at(count_bytes, block_of, min(count_type.itemsize, 4 if count_type.kind == "f" else 2))
    num_cells, index_bytes = np.diff(bounds), np.dtype(index_dtype(reader.num_genes)).itemsize
    longest = int(layout_of(num_cells, nnz, index_bytes, LARGEST_COUNT_BYTES).length.max())
    if longest >= MOST_BLOCK_BYTES:
        raise InputError(
            f"block_cells is {block_cells}: that many cells may take {longest:,} bytes, wanted a block below "
            f"{MOST_BLOCK_BYTES:,}; take fewer cells"
        )
    length: npt.NDArray[np.int64] = layout_of(num_cells, nnz, index_bytes, count_bytes).length
    return length


class _Job:
    """Writes tars into the partial folder, each with a record of what was done, by which a later run goes on."""

    def __init__(self, reader: CellReader, plan: _Plan, folder: Path, advance: SharedProgress) -> None:
        self.reader = reader
        self.plan = plan
        self.folder = folder
        self.advance = advance

    def begin(self, settings: dict[str, Any]) -> None:
        """Keep what is in the folder if it is of a run with these settings; what that run had half written goes."""
        settings = settings | {"version": VERSION, "celltron_version": __version__}
        done = self.folder / DONE_FOLDER
        known: set[str] = set()
        if _read_json(done / SETTINGS_NAME) == settings:
            known = {name(tar) for tar in range(self.plan.num_tars) for name in (tar_name, obs_name)} | {DONE_FOLDER}
        for entry in self.folder.iterdir():
            if entry.name not in known:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        done.mkdir(exist_ok=True)
        write_atomically(done / SETTINGS_NAME, json.dumps(settings))

    def tar(self, tar: int, obs: pa.Table) -> dict[str, Any]:
        """Write a tar and its obs unless they are there; returns its record: blocks, files, checksums of obs."""
        path, obs_path = self.folder / tar_name(tar), self.folder / obs_name(tar)
        record_path = self.folder / DONE_FOLDER / f"{tar:06d}.json"
        first, end = self.plan.cells_of(tar)
        record: dict[str, Any] | None = _read_json(record_path)
        if record is not None and path.exists() and obs_path.exists():
            if record["files"] == {path.name: hash_file(path), obs_path.name: hash_file(obs_path)}:
                self.advance(end - first)
                return record
        obs_entry = write_tables([obs.slice(first, end - first)], obs_path)
        with HashedFile(path) as file:
            blocks = [self._append(file, tar, place, block) for place, block in enumerate(self._blocks(tar))]
            file.write(TAR_END)
        record = {
            "blocks": blocks,
            "files": {path.name: file.entry(), obs_path.name: obs_entry},
            "obs_crc32": _checksums(obs_path),
        }
        write_atomically(record_path, json.dumps(record))
        return record

    def _append(self, file: HashedFile, tar: int, place: int, block: Block) -> dict[str, Any]:
        """Write a block; returns its line of the list of blocks."""
        data = encode_block(sample_key(tar, place), block)
        line = {
            "tar": tar,
            "offset": file.tell(),
            "length": len(data),
            "first_cell": int(block.cells[0]),
            "cells": len(block.cells),
            "nnz": len(block.counts),
            **{name: getattr(block, name).dtype.name for name in ("indptr", "indices", "counts")},
            "crc32": zlib.crc32(data),
        }
        file.write(data)
        self.advance(len(block.cells))
        return line

    def _blocks(self, tar: int) -> Iterator[Block]:
        reader, bounds = self.reader, self.plan.bounds
        for block in range(self.plan.tars[tar], self.plan.tars[tar + 1]):
            cells = np.arange(bounds[block], bounds[block + 1], dtype=np.int64)
            made = make_block(cells, reader.rows(cells), reader.totals(cells), reader.num_genes)
            problem = problem_of_block(made, reader.num_genes)
            if problem:
                raise InputError(f"{reader.name} is damaged in cells {cells[0]} to {cells[-1]}: {problem}; verify it")
            yield made


def _read_json(path: Path) -> Any:
    """What a file of this writer's holds; None if there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def _obs_table(reader: CellReader) -> pa.Table:
    """All of obs, a column at a time; each column has one type over all tars."""
    return pa.table({name: pa.Array.from_pandas(reader.obs_column(name)) for name in reader.obs_columns})


def _gene_table(reader: CellReader) -> pa.Table:
    """Every column that the reader knows of its genes; at least their ids."""
    genes = getattr(reader, "genes", None)
    if genes is None:
        return pa.table({"gene_id": list(reader.gene_ids)})
    return pa.Table.from_pandas(genes, preserve_index=False)


def _meta(reader: CellReader, tars: list[dict[str, Any]], block_cells: int, obs_columns: list[str]) -> dict[str, Any]:
    """What the manifest says besides the checksums of the files."""
    shards = [
        {
            "cells": sum(block["cells"] for block in tar["blocks"]),
            "blocks": len(tar["blocks"]),
            "nnz": sum(block["nnz"] for block in tar["blocks"]),
            "obs_crc32": tar["obs_crc32"],
        }
        for tar in tars
    ]
    return {
        "cells": len(reader),
        "genes": reader.num_genes,
        "nnz": sum(shard["nnz"] for shard in shards),
        "block_cells": block_cells,
        "store_name": Path(reader.name).name,
        "store_fingerprint": reader.fingerprint,
        "obs_columns": obs_columns,
        "shards": shards,
    }


def _checksums(path: Path) -> list[int]:
    with path.open("rb") as file:
        return [zlib.crc32(piece) for piece in iter(lambda: file.read(OBS_PIECE_BYTES), b"")]
