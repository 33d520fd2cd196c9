"""A small store of a dense matrix, written from the description of the format and not by the store's own writer."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from celltron.core import write_artefact
from celltron.core.manifest import digest_of_manifest

WHOLE_TYPES = ("uint8", "uint16", "uint32", "uint64")


def smallest_type(counts: np.ndarray) -> str:
    """The smallest type on disk that holds counts."""
    if counts.dtype.kind == "f":
        return "float32"
    return next(name for name in WHOLE_TYPES if counts.max(initial=0) <= np.iinfo(name).max)


def write_small_store(
    path: Path,
    counts_CG: np.ndarray,
    genes: list[str],
    *,
    shard_cells: int = 8,
    obs: pd.DataFrame | None = None,
    totals: np.ndarray | None = None,
    version: int = 2,
) -> Path:
    """Write a store of C cells and G genes; ``totals`` [C] are the sums of the rows unless they are given."""
    totals = counts_CG.sum(1).astype(np.float64) if totals is None else np.asarray(totals, np.float64)
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(len(counts_CG))]) if obs is None else obs
    indices = "uint16" if len(genes) <= 1 << 16 else "uint32"
    widest = smallest_type(counts_CG)
    shards = []
    with write_artefact(path, format="celltron-cellstore", version=version) as writer:
        for i, start in enumerate(range(0, len(counts_CG), shard_cells)):
            part = slice(start, start + shard_cells)
            shard = counts_CG[part]
            kind = smallest_type(shard) if version > 1 else widest
            folder = writer.folder / "shards" / f"{i:05d}"
            folder.mkdir(parents=True)
            rows, columns = np.nonzero(shard)
            ends = np.concatenate([[0], np.cumsum((shard > 0).sum(1))])
            ends.astype("<u8").tofile(folder / "indptr.bin")
            columns.astype(np.dtype(indices).newbyteorder("<")).tofile(folder / "indices.bin")
            shard[rows, columns].astype(np.dtype(kind).newbyteorder("<")).tofile(folder / "counts.bin")
            if version > 1:
                totals[part].astype("<f8").tofile(folder / "totals.bin")
            table = {"cell_id": obs.index[part], "source": pd.Categorical(["a.h5ad"] * len(shard))}
            table |= {"total_counts": totals[part]} | {name: obs[name].iloc[part].array for name in obs.columns}
            pq.write_table(pa.Table.from_pandas(pd.DataFrame(table), preserve_index=False), folder / "obs.parquet")
            entry: dict[str, Any] = {"cells": len(shard), "nnz": len(rows)}
            shards.append(entry | ({"indices": indices, "counts": kind} if version > 1 else {}))
        gene_table: dict[str, Any] = {"gene_id": genes, "gene_name": [gene.lower() for gene in genes]}
        gene_table["species"] = ["human"] * len(genes)
        if version > 1:
            gene_table["num_cells"] = (counts_CG > 0).sum(0)
        pq.write_table(pa.table(gene_table), writer.folder / "genes.parquet")
        dtypes = {"indptr": "uint64", "indices": indices, "counts": widest}
        source = {"name": "a.h5ad", "cells": len(counts_CG), "matrix": "X", "gene_column": "the index of var"}
        writer.meta |= {"cells": len(counts_CG), "genes": len(genes), "nnz": sum(shard["nnz"] for shard in shards)}
        writer.meta |= {"species": "human", "sources": [source], "unmapped_genes": 2, "unmapped_fraction": 0.25}
        writer.meta |= {"total_counts": float(totals.sum()), "summed_columns": 0, "shards": shards}
        writer.meta["dtypes"] = dtypes
        if version > 1:
            writer.meta["gene_file"] = "genes.parquet"
            dtypes["totals"] = "float64"
    return path


def seal(folder: Path) -> None:
    """Bring lengths and checksums of an artefact's manifest up to date, as if the files had been written so."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["manifest_sha256"] = digest_of_manifest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
