"""Sources of counts to a CellStore, in bounded memory; a run that breaks off is gone on with by the next."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from celltron.cells.convert_plan import Base, Plan, make_plan
from celltron.cells.convert_plan import ConvertOptions as ConvertOptions
from celltron.cells.convert_work import WORK, Progress, Workplace, Written, write_shards
from celltron.cells.ingest.open import expand_sources
from celltron.cells.ingest.remote import UnreachableError
from celltron.cells.ingest.source import SourceOptions
from celltron.cells.source_pool import SourcePool
from celltron.cells.store_manifest import FORMAT, VERSION
from celltron.cells.store_writer import write_tables
from celltron.cells.threads import num_workers
from celltron.core import write_artefact

GENE_FILE = "genes.parquet"
SHOWN_SOURCES = 10
SHOWN_NAMES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionReport:
    """What a conversion read and wrote; ``str(report)`` is what the command prints.

    All numbers but ``num_genes`` are of what was written; ``cells_before`` and ``genes_before`` are of the store that
    was added to. ``num_unmapped`` genes (``unmapped_names``: the first of them) have no Ensembl id and held
    ``unmapped_fraction`` of all counts; ``num_summed`` columns fell on the gene of another column of their source and
    were added to it; ``notes`` names the obs columns that became text. ``shards_kept`` shards of ``cells_kept`` cells
    were there from a broken-off run; ``is_dropped`` says that one with another plan was dropped.
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
    cells_before: int = 0
    genes_before: int = 0
    shards_kept: int = 0
    cells_kept: int = 0
    is_dropped: bool = False

    def __str__(self) -> str:
        rate = (self.num_cells - self.cells_kept) / max(self.seconds, 1e-9)
        lines = [
            f"{self._headline()}, {self.nnz:,} non-zero counts, {self.num_bytes / 1e6:,.1f} MB "
            f"({self.num_bytes / max(self.nnz, 1):.2f} bytes a count)",
            f"read {len(self.sources)} source{'s' * (len(self.sources) != 1)} in {self.seconds:.1f} s ({rate:,.0f} "
            "cells/s)",
        ]
        lines += [
            f"  {s['name']}: {s['cells']:,} cells from {s['matrix']}, genes by {s['gene_column']}"
            for s in self.sources[:SHOWN_SOURCES]
        ]
        if len(self.sources) > SHOWN_SOURCES:
            lines.append(f"  and {len(self.sources) - SHOWN_SOURCES:,} more")
        if self.shards_kept:
            lines.append(
                f"went on where a broken-off run stopped: {self.shards_kept:,} shards of {self.cells_kept:,} cells "
                "were there"
            )
        if self.is_dropped:
            lines.append("dropped what a broken-off run with other sources or options had left")
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

    def _headline(self) -> str:
        if not self.cells_before:
            return f"{self.out}: {self.num_cells:,} cells x {self.num_genes:,} genes"
        return (
            f"{self.out}: {self.num_cells:,} cells added to {self.cells_before:,}, "
            f"{self.num_genes - self.genes_before:,} genes to {self.genes_before:,}"
        )


def convert(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    replace: bool = False,
    workers: int | None = None,
    storage: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> ConversionReport:
    """Convert sources of counts, of any format, to one CellStore.

    The store's genes are the union of the sources' genes in first-seen order; its cells are the sources' cells in
    order. Nothing that opens is at ``out`` unless all went well. A run that is stopped or loses the network leaves
    ``.NAME.partial`` beside it; the same call goes on from the shards that are complete there, to the same store, byte
    for byte. Memory grows with the number of workers, and by some 16 bytes a cell of the largest source.

    >>> import tempfile
    >>> import anndata, numpy, pandas
    >>> var = pandas.DataFrame(index=["CD3E", "CD8A", "MS4A1"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     data = anndata.AnnData(numpy.array([[1.0, 0.0, 3.0], [0.0, 2.0, 0.0]]), var=var)
    ...     data.write_h5ad(f"{folder}/a.h5ad")
    ...     report = convert(f"{folder}/a.h5ad", f"{folder}/a.store", shard_cells=1000)
    >>> report.num_cells, report.num_genes, report.nnz
    (2, 3, 3)

    Args:
        sources: files, folders, patterns or addresses; see `celltron.cells.ingest.open.expand_sources`.
        out: folder to make.
        replace: replace a store at ``out`` once the new one is complete.
        workers: shards written at once; None takes one a processor. The store does not depend on it.
        storage: options for fsspec's file systems of addresses.
        progress: called with (cells done, cells in all) after each block, in this thread.
        **options: how counts are read: the fields of `ConvertOptions`, such as ``layer="counts"``.
    """
    began = time.monotonic()
    checked = ConvertOptions(**options)
    workers, out = num_workers(workers), Path(out)
    with (
        tell_how_to_go_on(out),
        write_artefact(out, format=FORMAT, version=VERSION, replace=replace, resume=True) as artefact,
    ):
        place = Workplace(artefact.folder)
        artefact.leave = place.is_begun  # a slip in the options must not cost the shards that are there
        with open_pool(sources, checked, place, storage, workers) as pool:
            plan = make_plan(pool, checked, Base(), workers)
            is_dropped = place.adopt(plan)
            artefact.leave = False
            try:
                written = write_shards(plan, pool, place, workers=workers, progress=progress)
            except UnreachableError as error:
                artefact.leave = True
                raise with_how_to_go_on(error, out) from error
        genes = set_num_cells(plan.genes.table(), written)
        artefact.files |= written.files(0) | {GENE_FILE: write_tables([genes], artefact.folder / GENE_FILE)}
        artefact.remove.append(WORK)
        artefact.meta |= describe(plan, written)
    size, seconds = sum(entry["bytes"] for entry in artefact.files.values()), time.monotonic() - began
    return make_report(out, plan, written, num_bytes=size, seconds=seconds, is_dropped=is_dropped)


@contextmanager
def tell_how_to_go_on(out: Path) -> Iterator[None]:
    """Let Ctrl-C say that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"interrupted; {_how_to_go_on(out)}") from error


def with_how_to_go_on(error: UnreachableError, out: Path) -> UnreachableError:
    """An error that lost the network, saying also that nothing else is lost."""
    return UnreachableError(f"{error}; {_how_to_go_on(out)}")


def _how_to_go_on(out: Path) -> str:
    return f"the same command goes on with {out} from the shards that are complete"


@contextmanager
def open_pool(
    sources: str | Path | Sequence[str | Path],
    options: ConvertOptions,
    place: Workplace,
    storage: Mapping[str, Any] | None,
    workers: int,
) -> Iterator[SourcePool]:
    """The sources that a user named, for as many threads."""
    specs = expand_sources([sources] if isinstance(sources, str | Path) else sources, storage)
    wanted = SourceOptions(layer=options.layer, use_raw=options.use_raw, storage=storage)
    pool = SourcePool(specs, wanted, place.scratch, most_idle=workers)
    try:
        yield pool
    finally:
        pool.close()


def set_num_cells(genes: pa.Table, written: Written) -> pa.Table:
    """Add the cells that were written to the column ``num_cells`` of the store's whole table of genes."""
    column = pa.array(genes["num_cells"].to_numpy() + written.num_cells)
    return genes.set_column(genes.column_names.index("num_cells"), "num_cells", column)


def describe(plan: Plan, written: Written) -> dict[str, Any]:
    """What the manifest says of the shards written."""
    counts = sum(record.total_counts for record in written.records)
    return {
        "cells": plan.num_cells,
        "genes": len(plan.genes),
        "nnz": sum(record.nnz for record in written.records),
        "species": plan.options.species,
        "sources": plan.sources,
        "total_counts": counts,
        "unmapped_genes": len(plan.genes.unmapped),
        "unmapped_fraction": written.unmapped_counts / counts if counts else 0.0,
        "summed_columns": plan.genes.num_summed,
        "gene_file": GENE_FILE,
        "dtypes": {"indptr": "uint64", **written.types._asdict(), "totals": "float64"},
        "shards": [record.manifest_entry() for record in written.records],
    }


def make_report(  # noqa: PLR0913
    out: Path, plan: Plan, written: Written, *, num_bytes: int, seconds: float, is_dropped: bool, cells_before: int = 0
) -> ConversionReport:
    """The report of a plan carried out."""
    meta = describe(plan, written)
    return ConversionReport(
        out=str(out),
        num_cells=meta["cells"],
        num_genes=meta["genes"],
        nnz=meta["nnz"],
        num_bytes=num_bytes,
        sources=plan.sources,
        num_unmapped=meta["unmapped_genes"],
        unmapped_fraction=meta["unmapped_fraction"],
        unmapped_names=list(plan.genes.unmapped)[:SHOWN_NAMES],
        unmapped_kept=plan.options.keep_unmapped,
        num_summed=plan.genes.num_summed,
        notes=list(plan.obs.notes),
        seconds=seconds,
        cells_before=cells_before,
        genes_before=len(plan.base.gene_ids),
        shards_kept=written.num_kept,
        cells_kept=written.cells_kept,
        is_dropped=is_dropped,
    )
