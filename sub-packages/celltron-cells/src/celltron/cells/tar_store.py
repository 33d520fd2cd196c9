"""Tar shards read by streaming: a `CellReader` over a folder or an address that fetches blocks when they are wanted.

C cells, G genes, B blocks, K cells asked for.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd

from celltron.cells.memory import copy_rows
from celltron.cells.reader import Located, Rows, checked_cells
from celltron.cells.row_table import RowTable, locate_rows
from celltron.cells.store import fingerprint_of_genes
from celltron.cells.store_manifest import DTYPES
from celltron.cells.tar_cache import BlockCache
from celltron.cells.tar_files import OPEN_ATTEMPTS, TarFiles, check_lengths, open_files
from celltron.cells.tar_format import BLOCKS_NAME, GENES_NAME, TYPES
from celltron.cells.tar_manifest import TYPE_BYTES, read_blocks, read_table, read_tar_manifest
from celltron.cells.tar_obs import read_obs_column
from celltron.cells.threads import Progress
from celltron.core import InputError

CACHE_BYTES = 512 * 2**20
_ENDS = np.empty(0, dtype=np.uint32)
_KINDS = [(indices, counts, 0) for indices, counts in TYPES]


class TarStore:
    """Raw counts of C cells in G genes behind an address, a `CellReader` like the store that was sharded.

    Its fingerprint is that store's, so that splits and ranked tokens made for the one serve the other. Every block is
    held against its checksum when it arrives.
    """

    gene_maps: tuple[npt.NDArray[np.int64] | None, ...] = (None,)

    def __init__(self, files: TarFiles, *, cache_bytes: int, fetchers: int) -> None:
        if cache_bytes < 0:
            raise InputError(f"cache_bytes is {cache_bytes}: wanted 0 (keep no block) or more bytes")
        if fetchers < 1:
            raise InputError(f"fetchers is {fetchers}: wanted 1 or more blocks fetched at a time")
        self.files = files
        self.name = files.name
        self.fetchers = fetchers
        self.manifest = read_tar_manifest(files)
        self.num_genes = int(self.manifest["genes"])
        self.nnz = int(self.manifest["nnz"])
        self.blocks = read_blocks(files, self.manifest)
        # A server that does not answer range requests shows it here, on a small file.
        files.read_range(BLOCKS_NAME, 0, 1, attempts=OPEN_ATTEMPTS)
        wanted = {file: int(entry["bytes"]) for file, entry in self.manifest["files"].items()}
        check_lengths(files, wanted, fetchers)
        # Where indptr, indices, counts and totals of each block begin, uint64 [4, B], from the block's own beginning.
        self._begins = np.array(self.blocks.layout(np.arange(self.num_blocks))[:4], dtype=np.uint64)
        self._widest = _widest(self.blocks.types)
        self._cache_bytes = cache_bytes
        self._cache = BlockCache(partial(self.blocks.fetch, files), self.blocks.length, cache_bytes, fetchers)
        self._obs: dict[str, pd.Series[Any]] = {}

    @classmethod
    def open(
        cls,
        address: str | Path,
        *,
        storage: Mapping[str, Any] | None = None,
        cache_bytes: int = CACHE_BYTES,
        fetchers: int = 8,
    ) -> "TarStore":
        """Read the lists of tar shards and compare the length of every file with what the manifest says.

        Args:
            address: folder, or an address such as ``s3://bucket/cells.tars`` or ``https://host/cells.tars``.
            storage: options for fsspec's file system of the address, such as credentials.
            cache_bytes: how much of the last used blocks is held in memory. A shuffle window should fit into it, or its
                blocks are fetched again and again; besides, what a call hands out lives until it is dropped.
            fetchers: how many blocks are fetched at a time.
        """
        return cls(open_files(address, storage), cache_bytes=cache_bytes, fetchers=fetchers)

    def __len__(self) -> int:
        return int(self.blocks.bounds[-1])

    def __repr__(self) -> str:
        return f"TarStore({self.name!r}, {len(self):,} cells x {self.num_genes:,} genes)"

    @property
    def num_blocks(self) -> int:
        """Number of blocks, each of which is fetched whole."""
        return len(self.blocks.tar)

    @property
    def disk_runs(self) -> npt.NDArray[np.int64]:
        """int64 [B+1]: the first cell of each block, then C."""
        return self.blocks.bounds

    @property
    def cached_bytes(self) -> int:
        """Bytes of the blocks that are held now."""
        return self._cache.num_bytes

    def check_cells(self, cells: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Cell numbers as int64 [C]; one outside is a `CellIndexError`."""
        return checked_cells(cells, len(self), self.name)

    def blocks_of(self, cells: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """int64 [K]: the block that each cell lies in."""
        return np.searchsorted(self.blocks.bounds, cells, side="right") - 1

    def locate(self, cells: npt.NDArray[np.int64]) -> list[Located]:
        """Where the counts of cells lie in the blocks, which are fetched if they are not there."""
        used, place_of = np.unique(self.blocks_of(cells), return_inverse=True)
        addresses, buffers = self._cache.hold(used)
        indptr, indices, counts, totals = addresses + self._begins[:, used]
        kinds = self.blocks.types[used].astype(np.int64)
        table = RowTable(
            starts=self.blocks.bounds[used],
            nnz=self.blocks.nnz[used],
            indptr=indptr,
            indices=indices,
            counts=counts,
            totals=totals,
            index_bytes=TYPE_BYTES[kinds, 0].astype(np.uint64),
            count_bytes=TYPE_BYTES[kinds, 1].astype(np.uint64),
            kinds=kinds,
        )

        def damage(place: int) -> InputError:
            return InputError(
                f"{self.blocks.describe(self.files, int(used[place]))} is damaged: a cell ends where the block does "
                "not; write the shards again"
            )

        return locate_rows(cells, place_of, table, _ENDS, _KINDS, memory=(buffers,), damage=damage)

    def rows(self, cells: npt.ArrayLike) -> Rows:
        """Cells in the given order, repeats allowed, as copies; their blocks are all in memory meanwhile."""
        cells = self.check_cells(cells)
        return copy_rows(self.locate(cells), len(cells), *self._widest)

    def totals(self, cells: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """float64 [C]: the sum of all counts of each cell in its source, genes that were left out too."""
        cells = self.check_cells(cells)
        totals = np.empty(len(cells), dtype=np.float64)
        for slots in self._pieces(cells):
            for part in self.locate(cells[slots]):
                totals[slots[part.slots]] = part.totals
        return totals

    def _pieces(self, cells: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
        """The places of cells, cut so that the blocks of each part fit into the cache."""
        used, place_of = np.unique(self.blocks_of(cells), return_inverse=True)
        piece_of = (np.cumsum(self.blocks.length[used]) // max(self._cache_bytes, 1))[place_of]
        order = np.argsort(piece_of, kind="stable")
        yield from np.split(order, np.flatnonzero(np.diff(piece_of[order])) + 1)

    def prefetch(self, blocks: npt.NDArray[np.int64]) -> None:
        """Begin to fetch blocks (numbers, int64) in this order, as far as half of the cache goes; does not wait."""
        self._cache.prefetch(blocks)

    @cached_property
    def genes(self) -> pd.DataFrame:
        """One row a gene, by gene index, as the store has it: ``gene_id``, ``gene_name``, ``species`` and more."""
        table = read_table(self.files, self.manifest, GENES_NAME)
        ids = table["gene_id"].to_pylist() if "gene_id" in table.column_names else []
        if len(ids) != self.num_genes or len(set(ids)) != len(ids) or not all(isinstance(gene, str) for gene in ids):
            raise InputError(
                f"{self.files.where(GENES_NAME)} is damaged: wanted {self.num_genes} different gene ids; write the "
                "shards again"
            )
        return cast(pd.DataFrame, table.to_pandas())

    @cached_property
    def gene_ids(self) -> tuple[str, ...]:
        """The Ensembl id of each gene index."""
        return tuple(self.genes["gene_id"])

    @cached_property
    def genes_fingerprint(self) -> str:
        """sha256 (hex) of the gene ids in order."""
        return fingerprint_of_genes(self.gene_ids)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the store that was sharded: the cells are the same."""
        return str(self.manifest["store_fingerprint"])

    @property
    def obs_columns(self) -> list[str]:
        """The names of the columns of obs."""
        return list(self.manifest["obs_columns"])

    def obs_column(self, name: str) -> "pd.Series[Any]":
        """One column of obs over all cells; fetched alone, and kept."""
        if name not in self.obs_columns:
            raise InputError(
                f"{self.name} has no obs column {name!r}: it has {', '.join(self.obs_columns)}; name one of these"
            )
        if name not in self._obs:
            self._obs[name] = read_obs_column(self.files, self.manifest, name, self.fetchers)
        return self._obs[name].copy()

    def verify(self, progress: Progress | None = None, *, workers: int | None = None) -> None:
        """Read everything: see `celltron.cells.tar_verify.verify_tars`."""
        from celltron.cells.tar_verify import verify_tars

        verify_tars(self, workers=workers, progress=progress)

    def info(self) -> str:
        """A few lines for a person."""
        shards, sizes = self.manifest["shards"], [entry["bytes"] for entry in self.manifest["files"].values()]
        species = ", ".join(sorted(set(self.genes["species"]))) if "species" in self.genes else "species not given"
        return "\n".join(
            [
                f"{self.name}: {len(self):,} cells x {self.num_genes:,} genes ({species}), {self.nnz:,} non-zero "
                "counts",
                f"{len(shards):,} tar shard{'s' * (len(shards) != 1)}, {self.num_blocks:,} blocks of "
                f"{self.manifest['block_cells']} cells, {sum(sizes) / 1e6:,.1f} MB "
                f"({sum(sizes) / max(self.nnz, 1):.2f} bytes a count)",
                f"made from {self.manifest['store_name']}, fingerprint {self.fingerprint}",
                f"obs: {', '.join(self.obs_columns) or 'no columns'}",
            ]
        )

    def close(self) -> None:
        """Stop the threads and drop the blocks; those handed out live on."""
        self._cache.close()

    def __enter__(self) -> "TarStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _widest(types: npt.NDArray[np.int8]) -> tuple[str, str]:
    """The types of indices and counts that hold those of all blocks."""
    kinds = [TYPES[kind] for kind in np.unique(types).tolist()] or [TYPES[0]]
    indices, counts = zip(*kinds, strict=True)
    return max(indices, key=DTYPES["indices"].index), max(counts, key=DTYPES["counts"].index)
