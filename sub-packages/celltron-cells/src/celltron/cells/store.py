"""The CellStore: counts on disk, memory-mapped and read-only.

C cells, G genes, N non-zero counts.
"""

import hashlib
import json
import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from celltron.cells.compiled import compiled
from celltron.cells.shard import Shard, ShardArrays, check_shard, open_shard
from celltron.core import InputError, read_manifest, verify_artefact

FORMAT = "celltron-cellstore"
VERSION = 1
MOST_OPEN_SHARDS = 256  # each holds three file descriptors, of which a process may often have 1,024
Progress = Callable[[int, int], None]


class CellIndexError(InputError, IndexError):
    """A cell number outside the store."""


class Rows(NamedTuple):
    """Cells in compressed rows: ``indptr`` int64 [C+1], ``gene_index`` [N] (rising in each cell) and ``counts`` [N]."""

    indptr: npt.NDArray[np.int64]
    gene_index: npt.NDArray[Any]
    counts: npt.NDArray[Any]


@compiled
def _gather(shard: ShardArrays, local: npt.NDArray[np.int64], slots: npt.NDArray[np.int64], out: Rows) -> None:
    """Copy rows ``local`` of a shard to the places ``slots`` of the output."""
    shard_indptr, shard_indices, shard_counts = shard
    indptr, gene_index, counts = out
    for k in range(local.shape[0]):
        source = np.int64(shard_indptr[local[k]])
        begin, end = indptr[slots[k]], indptr[slots[k] + 1]
        gene_index[begin:end] = shard_indices[source : source + end - begin]
        counts[begin:end] = shard_counts[source : source + end - begin]


class CellStore:
    """Raw counts of C cells in G genes; ``store[i]`` is one cell, ``rows`` many.

    Nothing is written and nothing but the manifest is read when a store is opened; arrays are mapped when they are
    first touched.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.num_genes = int(manifest["genes"])
        self.nnz = int(manifest["nnz"])
        self.dtypes: dict[str, str] = dict(manifest["dtypes"])
        sizes = [int(shard["cells"]) for shard in manifest["shards"]]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._shards: dict[int, Shard] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | Path) -> "CellStore":
        """Open a store and compare the length of every file with what its manifest says."""
        path = Path(path)
        if path.is_file():
            raise InputError(f"{path} is a file, wanted the folder of a CellStore: make one with celltron convert")
        manifest = read_manifest(path, format=FORMAT, versions={VERSION})
        _check_manifest(path, manifest)
        return cls(path, manifest)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        return f"CellStore({str(self.path)!r}, {len(self):,} cells x {self.num_genes:,} genes)"

    def __getitem__(self, cell: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
        """One cell: gene indices (rising) and their counts, copies of the store's own."""
        _, gene_index, counts = self.rows(np.array([cell], dtype=np.int64))
        return gene_index.astype(np.int64), counts

    def rows(self, cells: npt.ArrayLike) -> Rows:
        """Cells in the given order, repeats allowed, as copies."""
        cells = self.check_cells(cells)
        shard_of = np.searchsorted(self._starts, cells, side="right") - 1
        parts = []
        indptr = np.zeros(len(cells) + 1, dtype=np.int64)
        for i in np.unique(shard_of):
            slots = np.flatnonzero(shard_of == i)
            local = cells[slots] - self._starts[i]
            shard = self._shard(int(i))
            begins, ends = shard.indptr[local].astype(np.int64), shard.indptr[local + 1].astype(np.int64)
            if np.any(begins < 0) or np.any(ends < begins) or np.any(ends > len(shard.indices)):
                raise InputError(
                    f"{shard.folder / 'indptr.bin'} is damaged: a cell ends where the shard does not; run celltron "
                    "verify"
                )
            indptr[slots + 1] = ends - begins
            parts.append((slots, local, shard))
        np.cumsum(indptr, out=indptr)
        rows = Rows(
            indptr,
            gene_index=np.empty(indptr[-1], dtype=self.dtypes["indices"]),
            counts=np.empty(indptr[-1], dtype=self.dtypes["counts"]),
        )
        for slots, local, shard in parts:
            _gather(ShardArrays(shard.indptr, shard.indices, shard.counts), local, slots, rows)
        return rows

    def check_cells(self, cells: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Cell numbers as int64 [C]; one outside the store is a `CellIndexError`."""
        array = np.atleast_1d(np.asarray(cells))
        if array.size == 0:
            return np.zeros(0, dtype=np.int64)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise InputError(
                f"cells must be a list of whole numbers, got an array of {array.dtype} with shape {array.shape}"
            )
        lowest, highest = int(array.min()), int(array.max())
        if lowest < 0 or highest >= len(self):
            wrong = lowest if lowest < 0 else highest
            raise CellIndexError(
                f"there is no cell {wrong} in {self.path}: its cells are numbered 0 to {len(self) - 1}"
            )
        return array.astype(np.int64, copy=False)

    def _shard(self, i: int) -> Shard:
        shard = self._shards.get(i)
        if shard is None:
            with self._lock:
                shard = self._shards.get(i)
                if shard is None:
                    if len(self._shards) >= MOST_OPEN_SHARDS:
                        self._shards.pop(next(iter(self._shards)))
                    shard = self._shards[i] = open_shard(self.path, i, self.manifest["shards"][i], self.dtypes)
        return shard

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self._starts) - 1

    def shard_cells(self, i: int) -> npt.NDArray[np.int64]:
        """The cells of a shard, for work that goes through the store in the order of the disk."""
        return np.arange(self._starts[i], self._starts[i + 1], dtype=np.int64)

    @cached_property
    def genes(self) -> pd.DataFrame:
        """One row a gene, by gene index: ``gene_id``, ``gene_name``, ``species``, the sources' columns."""
        table = read_table(self.path / "genes.parquet")
        ids = table["gene_id"].to_pylist() if "gene_id" in table.column_names else []
        if len(ids) != self.num_genes or len(set(ids)) != len(ids) or not all(isinstance(gene, str) for gene in ids):
            raise InputError(
                f"{self.path / 'genes.parquet'} is damaged: wanted {self.num_genes} different gene ids; convert the "
                "files again"
            )
        return cast(pd.DataFrame, table.to_pandas())

    @cached_property
    def gene_ids(self) -> tuple[str, ...]:
        """The Ensembl id of each gene index."""
        return tuple(self.genes["gene_id"])

    @cached_property
    def obs(self) -> pd.DataFrame:
        """One row a cell: ``cell_id``, ``source``, ``total_counts``, the sources' columns."""
        return cast(pd.DataFrame, self._read_obs(None).to_pandas(split_blocks=True))

    def obs_column(self, name: str) -> "pd.Series[Any]":
        """One column of obs, read alone."""
        if name not in self.obs_columns:
            raise InputError(
                f"{self.path} has no obs column {name!r}: it has {', '.join(self.obs_columns)}; name one of these"
            )
        return cast("pd.Series[Any]", self._read_obs([name]).to_pandas()[name])

    @cached_property
    def obs_columns(self) -> list[str]:
        """The names of the columns of obs."""
        if not self.num_shards:
            return []
        path = self.path / "shards" / "00000" / "obs.parquet"
        try:
            return list(pq.read_schema(path).names)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} is damaged: it is no parquet file; convert the files again") from error

    def _read_obs(self, columns: list[str] | None) -> pa.Table:
        tables = []
        for i in range(self.num_shards):
            path = self.path / "shards" / f"{i:05d}" / "obs.parquet"
            table = read_table(path, columns)
            if table.num_rows != self._starts[i + 1] - self._starts[i]:
                raise InputError(
                    f"{path} is damaged: it has {table.num_rows} rows, wanted one for each cell; convert the files "
                    "again"
                )
            tables.append(table)
        try:
            return pa.concat_tables(tables).unify_dictionaries()
        except pa.ArrowException as error:
            raise InputError(
                f"{self.path} is damaged: its shards have different obs columns; convert the files again"
            ) from error

    @cached_property
    def total_counts(self) -> npt.NDArray[np.float64]:
        """float64 [C]: the sum of all counts of the cell in its source, genes outside the store too."""
        totals = self.obs_column("total_counts").to_numpy(dtype=np.float64)
        if not np.isfinite(totals).all() or (totals < 0).any():
            raise InputError(
                f"{self.path} is damaged: total_counts of obs must be finite and not negative; convert the files again"
            )
        return totals

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the checksums of all files: equal for equal content, wherever it lies."""
        files = {name: entry["sha256"] for name, entry in self.manifest["files"].items()}
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()

    @cached_property
    def genes_fingerprint(self) -> str:
        """sha256 (hex) of the gene ids in order."""
        return fingerprint_of_genes(self.gene_ids)

    def verify(self, progress: Progress | None = None) -> None:
        """Read everything: checksums, then the order and range of every index and the tables' lengths.

        ``progress`` is called with (bytes hashed, bytes in all).
        """
        total = sum(int(entry["bytes"]) for entry in self.manifest["files"].values())
        done = 0

        def hashed(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            if progress is not None:
                progress(done, total)

        verify_artefact(self.path, progress=hashed)
        for i in range(self.num_shards):
            check_shard(self._shard(i), self.num_genes)
        _ = self.genes, self.total_counts, self._read_obs(None)

    def info(self) -> str:
        """A few lines for a person."""
        num_bytes = sum(int(entry["bytes"]) for entry in self.manifest["files"].values())
        sources = self.manifest["sources"]
        lines = [
            f"{self.path}: {self.manifest['format']} version {self.manifest['version']}",
            f"{len(self):,} cells x {self.num_genes:,} genes ({self.manifest['species']}), {self.nnz:,} non-zero "
            "counts "
            f"({self.nnz / max(1, len(self)):,.0f} a cell), {num_bytes / 1e6:,.1f} MB in {self.num_shards} "
            f"shard{'s' * (self.num_shards != 1)}",
            f"types: {', '.join(f'{name} {dtype}' for name, dtype in self.dtypes.items())}",
            *(
                f"source: {s['name']}, {s['cells']:,} cells from {s['matrix']}, genes by {s['gene_column']}"
                for s in sources
            ),
            f"genes without an Ensembl id: {self.manifest['unmapped_genes']:,} "
            f"({self.manifest['unmapped_fraction']:.2%} of the counts)",
            f"obs: {', '.join(self.obs_columns)}",
        ]
        return "\n".join(lines)


def fingerprint_of_genes(gene_ids: tuple[str, ...]) -> str:
    """sha256 (hex) of gene ids in order."""
    return hashlib.sha256(json.dumps(gene_ids).encode()).hexdigest()


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a parquet file, or some of its columns; a damaged one is an InputError."""
    try:
        return pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is damaged (parquet says: {error}): convert the files again") from error


_DTYPES = {
    "indptr": ("uint64",),
    "indices": ("uint16", "uint32"),
    "counts": ("uint8", "uint16", "uint32", "uint64", "float32"),
}
_ARRAYS = {"indptr.bin", "indices.bin", "counts.bin", "obs.parquet"}


def _check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """A manifest is untrusted: shape, types and lengths must agree before an array is mapped."""

    def demand(true: bool, what: str) -> None:
        if not true:
            raise InputError(f"{path / 'manifest.json'} is damaged: {what}; convert the files again")

    def is_count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62

    for key in ("cells", "genes", "nnz", "unmapped_genes"):
        demand(is_count(manifest.get(key)), f"{key} must be a whole number")
    demand(isinstance(manifest.get("unmapped_fraction"), (int, float)), "unmapped_fraction must be a number")
    demand(isinstance(manifest.get("species"), str), "species must be text")
    dtypes, shards, sources = manifest.get("dtypes"), manifest.get("shards"), manifest.get("sources")
    demand(isinstance(dtypes, dict) and set(dtypes) == set(_DTYPES), f"dtypes must name {', '.join(_DTYPES)}")
    assert isinstance(dtypes, dict), dtypes
    for name, dtype in dtypes.items():
        demand(dtype in _DTYPES[name], f"the type of {name} must be {' or '.join(_DTYPES[name])}")
    demand(isinstance(shards, list) and isinstance(sources, list), "shards and sources must be lists")
    assert isinstance(shards, list) and isinstance(sources, list), (shards, sources)
    for source in sources:
        good = isinstance(source, dict) and is_count(source.get("cells"))
        demand(
            good and all(isinstance(source.get(key), str) for key in ("name", "matrix", "gene_column")),
            "a source is incomplete",
        )
    files = manifest["files"]
    demand("genes.parquet" in files, "it lists no genes.parquet")
    for i, shard in enumerate(shards):
        good = isinstance(shard, dict) and is_count(shard.get("cells")) and is_count(shard.get("nnz"))
        demand(good, f"shard {i} must say how many cells and counts it has")
        folder = f"shards/{i:05d}/"
        demand(all(folder + name in files for name in _ARRAYS), f"it does not list all files of {folder}")
        lengths = {"indptr": shard["cells"] + 1, "indices": shard["nnz"], "counts": shard["nnz"]}
        for name, length in lengths.items():
            wanted = length * np.dtype(dtypes[name]).itemsize
            demand(files[f"{folder}{name}.bin"]["bytes"] == wanted, f"{folder}{name}.bin must have {wanted} bytes")
    for key in ("cells", "nnz"):
        demand(sum(shard[key] for shard in shards) == manifest[key], f"{key} must be the sum over the shards")
