"""Files of counts to a CellStore, in bounded memory; what can be checked early is checked before the first row."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from celltron.cells.gene_map import ENSEMBL_PREFIX, GeneList, Species, find_genes
from celltron.cells.h5ad_matrix import RowBlock
from celltron.cells.ingest_h5ad import HEAD_VALUES, H5adSource, check_cell_ids, describe_bad_value, open_h5ad
from celltron.cells.map_rows import BadValue, MappedRows, map_rows
from celltron.cells.obs_schema import ObsSchema
from celltron.cells.store import FORMAT, VERSION
from celltron.cells.store_writer import StoreWriter, write_table
from celltron.core import GeneNames, InputError, write_artefact

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """How counts are read; see `convert`."""

    layer: str | None = None
    """Layer that holds the counts; null takes X."""
    use_raw: bool = False
    """Read `raw`, which has its own genes."""
    species: Species = "human"
    """Whose genes the names are."""
    gene_id_column: str | None = None
    """Column of var with Ensembl ids or symbols (`var_names` for the row names); null finds it."""
    obs_columns: Sequence[str] | None = None
    """Columns of obs to keep; null keeps all."""
    allow_floats: bool = False
    """Accept values that are not whole numbers; they are stored as float32."""
    keep_unmapped: bool = False
    """Keep genes without an Ensembl id, under the name they have."""
    shard_cells: int = 65536
    """Cells in one shard."""

    def __post_init__(self) -> None:
        if self.species not in ENSEMBL_PREFIX:
            raise InputError(f"species is {self.species!r}: wanted one of {', '.join(ENSEMBL_PREFIX)}")
        if self.shard_cells < 1:
            raise InputError(f"shard_cells is {self.shard_cells}: wanted 1 or more cells in a shard")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionReport:
    """What a conversion read and wrote; ``str(report)`` is what the command prints.

    ``num_unmapped`` genes (``unmapped_names``: the first of them) have no Ensembl id and held ``unmapped_fraction``
    of all counts; ``num_summed`` columns fell on the gene of another column of their file and were added to it;
    ``notes`` names the obs columns that became text.
    """

    out: str
    num_cells: int
    num_genes: int
    nnz: int
    num_bytes: int
    sources: list[dict[str, Any]]
    num_unmapped: int
    unmapped_fraction: float
    unmapped_names: list[str]
    unmapped_kept: bool
    num_summed: int
    notes: list[str]
    seconds: float

    def __str__(self) -> str:
        rate = self.num_cells / max(self.seconds, 1e-9)
        lines = [
            f"{self.out}: {self.num_cells:,} cells x {self.num_genes:,} genes, {self.nnz:,} non-zero counts, "
            f"{self.num_bytes / 1e6:,.1f} MB ({self.num_bytes / max(self.nnz, 1):.2f} bytes a count)",
            f"read {len(self.sources)} file{'s' * (len(self.sources) != 1)} in {self.seconds:.1f} s ({rate:,.0f} "
            "cells/s)",
        ]
        lines += [
            f"  {s['name']}: {s['cells']:,} cells from {s['matrix']}, genes by {s['gene_column']}" for s in self.sources
        ]
        if self.num_unmapped:
            some = ", ".join(self.unmapped_names) + (", …" if self.num_unmapped > len(self.unmapped_names) else "")
            done = "kept under their own names" if self.unmapped_kept else "left out"
            lines.append(
                f"{self.num_unmapped:,} genes without an Ensembl id {done} ({self.unmapped_fraction:.2%} of the "
                f"counts): {some}"
            )
        if self.num_summed:
            lines.append(f"{self.num_summed:,} columns summed into a gene that another column names too")
        if self.notes:
            lines.append(f"obs columns stored as text: {', '.join(self.notes)}")
        return "\n".join(lines)


def convert(  # noqa: PLR0913 - the options a biologist types
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    layer: str | None = None,
    use_raw: bool = False,
    species: Species = "human",
    gene_id_column: str | None = None,
    obs_columns: Sequence[str] | None = None,
    allow_floats: bool = False,
    keep_unmapped: bool = False,
    shard_cells: int = 65536,
    replace: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert .h5ad files to one CellStore.

    The store's genes are the union of the files' genes in first-seen order; its cells are the files' cells in order.
    Nothing is left at ``out`` unless all went well; memory grows by some 16 bytes a cell, not with the counts.

    Args:
        sources: .h5ad files.
        out: folder to make.
        layer: layer that holds the counts; X otherwise.
        use_raw: read ``raw``, which has its own genes.
        species: whose genes the names are.
        gene_id_column: column of var with Ensembl ids or symbols, ``var_names`` for the row names; otherwise the one
            that maps to most genes.
        obs_columns: columns of obs to keep; all otherwise.
        allow_floats: accept values that are not whole numbers; they are stored as float32.
        keep_unmapped: keep genes without an Ensembl id, under the name they have.
        shard_cells: cells in one shard.
        replace: replace a store at ``out`` once the new one is complete.
        progress: called with (cells done, cells in all) after each block.
    """
    options = ConvertOptions(
        layer=layer,
        use_raw=use_raw,
        species=species,
        gene_id_column=gene_id_column,
        obs_columns=obs_columns,
        allow_floats=allow_floats,
        keep_unmapped=keep_unmapped,
        shard_cells=shard_cells,
    )
    return _convert(_check_paths(sources), Path(out), options, replace, progress)


def _convert(
    paths: list[Path], out: Path, options: ConvertOptions, replace: bool, progress: Progress | None
) -> ConversionReport:
    began = time.monotonic()
    with write_artefact(out, format=FORMAT, version=VERSION, replace=replace) as artefact:
        plan = _make_plan(paths, options)
        writer = StoreWriter(artefact.folder, num_genes=len(plan.genes), shard_cells=options.shard_cells)
        totals = _write_rows(plan, options, writer, artefact.folder, progress)
        write_table(plan.genes.table(), artefact.folder / "genes.parquet")
        artefact.meta |= writer.finish(meta=_meta(plan, options, totals))
        num_bytes = sum(file.stat().st_size for file in artefact.folder.rglob("*") if file.is_file())
    return ConversionReport(
        out=str(out),
        num_cells=writer.num_cells,
        num_genes=len(plan.genes),
        nnz=writer.nnz,
        num_bytes=num_bytes,
        sources=plan.sources,
        num_unmapped=len(plan.genes.unmapped),
        unmapped_fraction=totals.unmapped_fraction,
        unmapped_names=list(plan.genes.unmapped)[:5],
        unmapped_kept=options.keep_unmapped,
        num_summed=plan.genes.num_summed,
        notes=list(plan.obs.notes),
        seconds=time.monotonic() - began,
    )


def _check_paths(sources: Sequence[str | Path]) -> list[Path]:
    paths = [Path(source) for source in ([sources] if isinstance(sources, (str, Path)) else sources)]
    if not paths:
        raise InputError("no source files were given: name at least one .h5ad file")
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise InputError(f"{path} is given twice as a source: name each file once")
        seen.add(path.resolve())
    return paths


@dataclass(slots=True)
class _Plan:
    """What one look at every file tells: genes, columns of obs, and for each file the store's genes of its columns."""

    paths: list[Path]
    genes: GeneList
    obs: ObsSchema
    sources: list[dict[str, Any]] = field(default_factory=list)
    gene_of_column: list[npt.NDArray[np.int64]] = field(default_factory=list)


@dataclass(slots=True)
class _Totals:
    counts: float = 0.0
    unmapped: float = 0.0

    @property
    def unmapped_fraction(self) -> float:
        return self.unmapped / self.counts if self.counts else 0.0


def _make_plan(paths: list[Path], options: ConvertOptions) -> _Plan:
    names = GeneNames.for_species(options.species)
    plan = _Plan(
        paths=paths,
        genes=GeneList(species=options.species, keep_unmapped=options.keep_unmapped),
        obs=ObsSchema(wanted=options.obs_columns),
    )
    file_names = [path.name for path in paths]
    for path in paths:
        with open_h5ad(path, adata_layer=options.layer, use_raw=options.use_raw) as source:
            genes = find_genes(source.var, path, names, options.species, options.gene_id_column)
            plan.gene_of_column.append(plan.genes.add(genes, source.var))
            plan.obs.add(source.obs, path)
            check_cell_ids(source)
            _map_block(source, source.head(HEAD_VALUES), plan.gene_of_column[-1], len(plan.genes), options.allow_floats)
            plan.sources.append(
                {
                    "name": path.name if file_names.count(path.name) == 1 else str(path),
                    "bytes": path.stat().st_size,
                    "cells": source.obs.num_rows,
                    "matrix": source.matrix_name,
                    "gene_column": genes.column,
                }
            )
    return plan


def _write_rows(
    plan: _Plan, options: ConvertOptions, writer: StoreWriter, folder: Path, progress: Progress | None
) -> _Totals:
    totals = _Totals()
    num_cells = sum(int(source["cells"]) for source in plan.sources)
    for path, entry, gene_of_column in zip(plan.paths, plan.sources, plan.gene_of_column, strict=True):
        with open_h5ad(path, adata_layer=options.layer, use_raw=options.use_raw) as source:
            for block in source.blocks(folder / "scratch"):
                rows = _map_block(source, block, gene_of_column, len(plan.genes), options.allow_floats)
                writer.append(rows, plan.obs.table(source.obs, entry["name"], block.start, rows.totals))
                totals.counts += float(rows.totals.sum())
                totals.unmapped += rows.unmapped_total
                if progress is not None:
                    progress(writer.num_cells, num_cells)
    return totals


def _map_block(
    source: H5adSource, block: RowBlock, gene_of_column: npt.NDArray[np.int64], num_genes: int, allow_floats: bool
) -> MappedRows:
    rows = map_rows(
        block.indptr, block.columns, block.values, gene_of_column, num_genes=num_genes, allow_floats=allow_floats
    )
    if isinstance(rows, BadValue):
        raise InputError(describe_bad_value(source, block, rows))
    return rows


def _meta(plan: _Plan, options: ConvertOptions, totals: _Totals) -> dict[str, Any]:
    return {
        "genes": len(plan.genes),
        "species": options.species,
        "sources": plan.sources,
        "total_counts": totals.counts,
        "unmapped_genes": len(plan.genes.unmapped),
        "unmapped_fraction": totals.unmapped_fraction,
        "summed_columns": plan.genes.num_summed,
    }
