"""The CellStore: counts on disk, memory-mapped and read-only.

C cells, G genes, N non-zero counts, S shards.
"""

import dataclasses
import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from celltron.cells.memory import copy_rows
from celltron.cells.obs_union import obs_frame
from celltron.cells.reader import Located, Rows, checked_cells
from celltron.cells.shard import Shard, open_shard, shard_folder
from celltron.cells.shard_table import ShardTable
from celltron.cells.store_manifest import read_store_manifest
from celltron.cells.threads import Progress
from celltron.core import InputError


class CellStore:
    """Raw counts of C cells in G genes, a `CellReader`; ``store[i]`` is one cell, ``rows`` many.

    Nothing is written and nothing but the manifest is read when a store is opened; arrays are mapped when they are
    first touched.
    """

    gene_maps: tuple[npt.NDArray[np.int64] | None, ...] = (None,)

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.name = str(path)
        self.manifest = manifest
        self.num_genes = int(manifest["genes"])
        self.nnz = int(manifest["nnz"])
        self.species = str(manifest["species"])
        self.dtypes: dict[str, str] = dict(manifest["dtypes"])
        self._entries: list[dict[str, Any]] = manifest["shards"]
        self._table = ShardTable(self._entries, self._open_shard, np.zeros(len(self._entries), dtype=np.int64))

    @classmethod
    def open(cls, path: str | Path) -> "CellStore":
        """Open a store and compare the length of every file with what its manifest says."""
        path = Path(path)
        if path.is_file():
            raise InputError(f"{path} is a file, wanted the folder of a CellStore: make one with celltron convert")
        return cls(path, read_store_manifest(path))

    def __len__(self) -> int:
        return int(self._table.starts[-1])

    def __repr__(self) -> str:
        return f"CellStore({str(self.path)!r}, {len(self):,} cells x {self.num_genes:,} genes)"

    def __getitem__(self, cell: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
        """One cell: gene indices (rising) and their counts, copies of the store's own."""
        _, gene_index, counts = self.rows(np.array([cell], dtype=np.int64))
        return gene_index.astype(np.int64), counts

    def check_cells(self, cells: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Cell numbers as int64 [C]; one outside the store is a `CellIndexError`."""
        return checked_cells(cells, len(self), self.name)

    def rows(self, cells: npt.ArrayLike) -> Rows:
        """Cells in the given order, repeats allowed, as copies."""
        cells = self.check_cells(cells)
        return copy_rows(self.locate(cells), len(cells), self.dtypes["indices"], self.dtypes["counts"])

    def locate(self, cells: npt.NDArray[np.int64]) -> list[Located]:
        """Where the counts of cells lie in the mapped files."""
        return self._table.locate(cells)

    def _open_shard(self, i: int) -> Shard:
        """Map a shard; one of a store of version 1 gets its totals out of obs."""
        has_totals = "totals" in self.dtypes
        shard = open_shard(self.path, i, self._entries[i], has_totals=has_totals)
        return shard if has_totals else dataclasses.replace(shard, totals=self._obs_totals[self.shard_cells(i)])

    def shard(self, i: int) -> Shard:
        """The mapped arrays of a shard."""
        return self._table.shard(i)

    @cached_property
    def _obs_totals(self) -> npt.NDArray[np.float64]:
        """The totals of a store of version 1, which only obs has."""
        totals = self.obs_column("total_counts").to_numpy(dtype=np.float64)
        if not np.isfinite(totals).all() or (totals < 0).any():
            raise InputError(
                f"{self.path} is damaged: total_counts of obs must be finite and not negative; convert the files again"
            )
        return totals

    def totals(self, cells: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """float64 [C]: the sum of all counts of the cell in its source, genes outside the store too."""
        totals = np.empty(len(cells), dtype=np.float64)
        for part in self.locate(self.check_cells(cells)):
            totals[part.slots] = part.totals
        return totals

    @cached_property
    def total_counts(self) -> npt.NDArray[np.float64]:
        """float64 [C]: the totals of all cells."""
        return self.totals(np.arange(len(self), dtype=np.int64))

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self._entries)

    @property
    def disk_runs(self) -> npt.NDArray[np.int64]:
        """int64 [S+1]: the first cell of each shard, then C."""
        return self._table.starts

    def shard_cells(self, i: int) -> npt.NDArray[np.int64]:
        """The cells of a shard, for work that goes through the store in the order of the disk."""
        return np.arange(self._table.starts[i], self._table.starts[i + 1], dtype=np.int64)

    @cached_property
    def genes(self) -> pd.DataFrame:
        """One row a gene, by index: ``gene_id``, ``gene_name``, ``species``, ``num_cells``, the sources' columns."""
        table = read_table(self._gene_file)
        self._checked_ids(table)
        return cast(pd.DataFrame, table.to_pandas())

    @cached_property
    def gene_ids(self) -> tuple[str, ...]:
        """The Ensembl id of each gene index; no other column of the gene file is read."""
        return self._checked_ids(read_table(self._gene_file, ["gene_id"]))

    @property
    def _gene_file(self) -> Path:
        return self.path / str(self.manifest["gene_file"])

    def _checked_ids(self, genes: pa.Table) -> tuple[str, ...]:
        ids = genes["gene_id"].to_pylist() if "gene_id" in genes.column_names else []
        if len(ids) != self.num_genes or len(set(ids)) != len(ids) or not all(isinstance(gene, str) for gene in ids):
            raise InputError(
                f"{self._gene_file} is damaged: wanted {self.num_genes} different gene ids; convert the files again"
            )
        return tuple(ids)

    @cached_property
    def obs(self) -> pd.DataFrame:
        """One row a cell: ``cell_id``, ``source``, ``total_counts``, the sources' columns."""
        return obs_frame(self._read_obs(None))

    def obs_column(self, name: str) -> "pd.Series[Any]":
        """One column of obs, read alone; whole numbers stay whole where some are missing, as pandas' ``Int64``."""
        if name not in self.obs_columns:
            raise InputError(
                f"{self.path} has no obs column {name!r}: it has {', '.join(self.obs_columns)}; name one of these"
            )
        return obs_frame(self._read_obs([name]))[name]

    @cached_property
    def obs_columns(self) -> list[str]:
        """The names of the columns of obs, of all shards."""
        names: dict[str, None] = {}
        for i in range(self.num_shards):
            path = shard_folder(self.path, i) / "obs.parquet"
            try:
                names |= dict.fromkeys(pq.read_schema(path).names)
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"{path} is damaged: it is no parquet file; convert the files again") from error
        return list(names)

    def _read_obs(self, columns: list[str] | None) -> pa.Table:
        """Rows of all shards; a column that a shard lacks (an append brought others) is missing there."""
        tables = []
        for i in range(self.num_shards):
            path = shard_folder(self.path, i) / "obs.parquet"
            there = columns and [name for name in columns if name in pq.read_schema(path).names]
            table = read_table(path, there)
            if table.num_rows != self._entries[i]["cells"]:
                raise InputError(
                    f"{path} is damaged: it has {table.num_rows} rows, wanted one for each cell; convert the files "
                    "again"
                )
            tables.append(table)
        try:
            return pa.concat_tables(tables, promote_options="default").unify_dictionaries()
        except pa.ArrowException as error:
            raise InputError(
                f"{self.path} is damaged: its shards have obs columns of different types; convert the files again"
            ) from error

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the checksums of all files: equal for equal content, wherever it lies."""
        files = {name: entry["sha256"] for name, entry in self.manifest["files"].items()}
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()

    @cached_property
    def genes_fingerprint(self) -> str:
        """sha256 (hex) of the gene ids in order."""
        return fingerprint_of_genes(self.gene_ids)

    def verify(self, progress: Progress | None = None, *, workers: int | None = None) -> None:
        """Read everything: see `celltron.cells.verify.verify_store`."""
        from celltron.cells.verify import verify_store

        verify_store(self, workers=workers, progress=progress)

    def info(self) -> str:
        """A few lines for a person: see `celltron.cells.describe.describe_store`."""
        from celltron.cells.describe import describe_store

        return describe_store(self)


def fingerprint_of_genes(gene_ids: tuple[str, ...]) -> str:
    """sha256 (hex) of gene ids in order."""
    return hashlib.sha256(json.dumps(gene_ids).encode()).hexdigest()


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a parquet file, or some of its columns; a damaged one is an InputError."""
    try:
        return pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is damaged (parquet says: {error}): convert the files again") from error
