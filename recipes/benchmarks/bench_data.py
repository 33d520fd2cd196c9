"""The data of a benchmark, in a folder: a made .h5ad file as hard to read as real cells, or a look at a real one.

    python recipes/benchmarks/bench_data.py --out FOLDER --cells 40000
    python recipes/benchmarks/bench_data.py --out FOLDER --real FILE

Made cells: the number of genes of a cell is log-normal; a gene's counts are negative binomial around (depth of the
cell) x (abundance of the gene in the cell's type), so that the counts that are not zero are zero-truncated negative
binomial; abundances are log-normal, as skewed as in real tissue. C cells, G genes, K cell types, N non-zeros.

The folder then holds `cells.h5ad` (made cells only), `tokens.npz` (each column's Geneformer token and median, for peers
that tokenise) and `about.json`.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import anndata
import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd

from celltron.cells.compiled import compiled
from celltron.cells.sampler_kernel import bits_at
from celltron.cells.threads import map_in_order
from celltron.core import (
    GeneNames,
    InputError,
    ProgressLine,
    config_to_dict,
    keys_from,
    load_published_geneformer,
    parse_arguments,
    run_command,
    write_atomically,
)

VOCABULARY: Literal["gc95M"] = "gc95M"
MEDIAN_GENES, SIGMA_GENES = 1600, 0.54
FEWEST_GENES, MOST_GENES = 200, 8000
SIGMA_ABUNDANCE, SIGMA_TYPE = 2.2, 0.5
NUM_TYPES, NUM_DONORS = 8, 12
MOST_MEAN, MOST_COUNT = 50.0, 255
"""Largest mean of a gene, and where its counts are cut: those of real cells seldom reach 256."""
EMPTY_GROUPS = ("layers", "obsm", "obsp", "uns", "varm", "varp")  # no "raw": tiledbsoma reads it even where it is null
BLOCK_CELLS = 4096
CHUNK_VALUES = 1 << 18


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """What to make, and where."""

    out: str
    """Folder to write to; what lies there already is kept if it was made with the same settings."""
    real: str | None = None
    """A real .h5ad file with raw counts in X, to look at instead of making cells."""
    cells: int = 200_000
    """Cells to make."""
    genes: int = 20_000
    """Genes, all of them known to Geneformer's gc95M vocabulary."""
    seed: int = 0
    """Of everything that is drawn."""
    gzip: bool = False
    """Compress the counts, as many published files are."""
    threads: int = 2
    """Threads that make cells; the file does not depend on it."""


class Cells(NamedTuple):
    """What a cell's counts are drawn from: its key, its depth and its type, [C] each."""

    keys: npt.NDArray[np.uint64]
    depths: npt.NDArray[np.float64]
    types: npt.NDArray[np.int64]

    def part(self, start: int, stop: int) -> "Cells":
        """The cells from start to stop."""
        return Cells(self.keys[start:stop], self.depths[start:stop], self.types[start:stop])


def main(arguments: Sequence[str]) -> None:
    """Make cells, or look at a file."""
    config = parse_arguments(Config, arguments, flags={"--out": "out", "--cells": "cells", "--real": "real"}).config
    folder = Path(config.out)
    wanted = config_to_dict(config) | {"out": None, "threads": None}
    try:
        if json.loads((folder / "about.json").read_text(encoding="utf-8"))["config"] == wanted:
            return
    except (OSError, ValueError, KeyError):
        pass
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "cells.h5ad" if config.real is None else Path(config.real)
    if config.real is None:
        write_cells(path, config)
    about = describe(path)
    write_tokens(folder / "tokens.npz", about.pop("gene_names"))
    about |= {"path": str(path.resolve()), "file_bytes": path.stat().st_size, "config": wanted}
    write_atomically(folder / "about.json", json.dumps(about, indent=1) + "\n")


@compiled
def draw_count(key: np.uint64, gene: int, mean: float) -> int:
    """Negative binomial of dispersion 2: q = 1 / (1 + mean / 2), P(k) = (k + 1) q^2 (1 - q)^k, by inversion."""
    uniform = float(bits_at(key, gene) >> np.uint64(11)) * 2.0**-53
    q = 1.0 / (1.0 + 0.5 * min(mean, MOST_MEAN))
    mass = q * q
    below, count = mass, 0
    while uniform >= below and count < MOST_COUNT:
        count += 1
        mass *= (1.0 - q) * (count + 1) / count
        below += mass
    return count


@compiled
def count_genes(cells: Cells, abundances_KG: npt.NDArray[np.float64], sizes_C: npt.NDArray[np.int64]) -> None:
    """How many genes of each cell will not be zero."""
    for c in range(sizes_C.shape[0]):
        depth, abundances_G, size = cells.depths[c], abundances_KG[cells.types[c]], 0
        for g in range(abundances_G.shape[0]):
            q = 1.0 / (1.0 + 0.5 * min(depth * abundances_G[g], MOST_MEAN))
            size += float(bits_at(cells.keys[c], g) >> np.uint64(11)) * 2.0**-53 >= q * q
        sizes_C[c] = size


@compiled
def draw_counts(
    cells: Cells,
    abundances_KG: npt.NDArray[np.float64],
    indices_N: npt.NDArray[np.int32],
    counts_N: npt.NDArray[np.float32],
) -> None:
    """The counts of cells one after the other, genes rising."""
    n = 0
    for c in range(cells.keys.shape[0]):
        key, depth, abundances_G = cells.keys[c], cells.depths[c], abundances_KG[cells.types[c]]
        for g in range(abundances_G.shape[0]):
            count = draw_count(key, g, depth * abundances_G[g])
            if count > 0:
                indices_N[n] = g
                counts_N[n] = count
                n += 1


def plan_cells(config: Config) -> tuple[Cells, npt.NDArray[np.float64], pd.DataFrame]:
    """What the cells are drawn from, the abundances [K, G], and obs."""
    rng = np.random.default_rng(config.seed)
    logs_KG = SIGMA_ABUNDANCE * rng.standard_normal(config.genes)
    logs_KG = logs_KG + SIGMA_TYPE * rng.standard_normal((NUM_TYPES, config.genes))
    abundances_KG = np.exp(logs_KG) / np.exp(logs_KG).sum(axis=1, keepdims=True)
    types_C = rng.integers(NUM_TYPES, size=config.cells)
    wanted_C = MEDIAN_GENES * np.exp(SIGMA_GENES * rng.standard_normal(config.cells))
    wanted_C = np.clip(wanted_C, FEWEST_GENES, min(MOST_GENES, 0.4 * config.genes))
    grid = np.geomspace(10.0, 1e7, 100)
    depths_C = np.empty(config.cells)
    for k in range(NUM_TYPES):
        q = 1.0 / (1.0 + 0.5 * np.minimum(grid[:, None] * abundances_KG[k], MOST_MEAN))
        expected = (1.0 - q * q).sum(axis=1)
        of_type = types_C == k
        depths_C[of_type] = np.exp(np.interp(np.log(wanted_C[of_type]), np.log(expected), np.log(grid)))
    donors_C = rng.integers(NUM_DONORS, size=config.cells)
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical.from_codes(types_C, pd.Index([f"type {k}" for k in range(NUM_TYPES)])),
            "donor": pd.Categorical.from_codes(donors_C, pd.Index([f"donor {i}" for i in range(NUM_DONORS)])),
        },
        index=[f"cell {i}" for i in range(config.cells)],
    )
    keys = keys_from(config.seed, np.arange(config.cells))
    return Cells(keys, depths_C, types_C), abundances_KG, obs


def write_cells(path: Path, config: Config) -> None:
    """Write the made cells, a block at a time: CSR, float32 counts, int32 indices."""
    vocabulary, _ = load_published_geneformer(VOCABULARY)
    if not NUM_TYPES <= config.genes <= len(vocabulary.genes):
        raise InputError(f"genes is {config.genes}: wanted {NUM_TYPES} to {len(vocabulary.genes)}")
    cells, abundances_KG, obs = plan_cells(config)
    starts = range(0, config.cells, BLOCK_CELLS)

    def sizes_of(start: int) -> npt.NDArray[np.int64]:
        part = cells.part(start, start + BLOCK_CELLS)
        sizes = np.empty(len(part.keys), dtype=np.int64)
        count_genes(part, abundances_KG, sizes)
        return sizes

    sizes_C = np.concatenate(list(map_in_order(sizes_of, starts, config.threads)))
    indptr = np.concatenate([[0], np.cumsum(sizes_C)])

    def block_of(start: int) -> tuple[int, npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        stop = min(start + BLOCK_CELLS, config.cells)
        size = int(indptr[stop] - indptr[start])
        indices, counts = np.empty(size, dtype=np.int32), np.empty(size, dtype=np.float32)
        draw_counts(cells.part(start, stop), abundances_KG, indices, counts)
        return start, indices, counts

    progress = ProgressLine("making cells", "cells")
    partial = path.with_suffix(".partial")
    with h5py.File(partial, "w") as file:
        var = pd.DataFrame(index=list(vocabulary.genes[: config.genes]))
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for name, value in {"obs": obs, "var": var, **dict.fromkeys(EMPTY_GROUPS, {})}.items():
            anndata.io.write_elem(file, name, value)
        matrix = add_matrix(file, (config.cells, config.genes), indptr, gzip=config.gzip)
        for start, indices, counts in map_in_order(block_of, starts, config.threads):
            there = slice(int(indptr[start]), int(indptr[start]) + len(indices))
            matrix["indices"][there], matrix["data"][there] = indices, counts
            progress(min(start + BLOCK_CELLS, config.cells), config.cells)
    partial.replace(path)


def add_matrix(file: h5py.File, shape: tuple[int, int], indptr: npt.NDArray[np.int64], *, gzip: bool) -> h5py.Group:
    """An empty CSR matrix as X, in anndata's layout: contiguous arrays unless they are compressed."""
    matrix = file.create_group("X")
    matrix.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape})
    num_values = int(indptr[-1])
    how = {"compression": "gzip", "chunks": (min(CHUNK_VALUES, max(num_values, 1)),)} if gzip else {}
    matrix.create_dataset("indptr", data=indptr.astype(np.int32 if num_values < 2**31 else np.int64))
    matrix.create_dataset("indices", (num_values,), np.int32, **how)
    matrix.create_dataset("data", (num_values,), np.float32, **how)
    return matrix


def describe(path: Path) -> dict[str, Any]:
    """Size and spread of a file's counts, and its gene names."""
    adata = anndata.read_h5ad(path, backed="r")
    sizes, largest = [np.zeros(0, dtype=np.int64)], 0.0
    for block in blocks_of(adata):
        sizes.append(np.diff(block.indptr))
        largest = max(largest, float(block.data.max(initial=0)))
    sizes_C = np.concatenate(sizes)
    about = {
        "cells": int(adata.n_obs),
        "genes": int(adata.n_vars),
        "non_zeros": int(sizes_C.sum()),
        "median_non_zeros_a_cell": float(np.median(sizes_C)),
        "largest_count": largest,
        "gene_names": list(adata.var_names),
    }
    adata.file.close()
    return about


def blocks_of(adata: anndata.AnnData) -> Iterator[Any]:
    """The rows of X as scipy CSR matrices without stored zeros."""
    matrix = adata.X
    if not isinstance(matrix, anndata.abc.CSRDataset):
        raise InputError(f"{adata.filename}: X is not a CSR matrix, which the peers need; write it as one")
    for start in range(0, adata.n_obs, BLOCK_CELLS):
        block = matrix[start : start + BLOCK_CELLS]
        block.eliminate_zeros()
        yield block


def write_tokens(path: Path, gene_names: Sequence[str]) -> None:
    """Each column's token and median in Geneformer's vocabulary, -1 and NaN without one, and the special tokens."""
    vocabulary, medians = load_published_geneformer(VOCABULARY)
    genes = [gene or "" for gene in GeneNames.for_species("human").resolve(gene_names)]
    tokens_G = vocabulary.ids_of(genes)
    medians_G = np.where(tokens_G >= 0, medians.for_vocabulary(vocabulary)[tokens_G], np.nan)
    special = np.array([vocabulary.pad_id, vocabulary.mask_id, vocabulary.cls_id, vocabulary.eos_id], dtype=np.int64)
    np.savez(path, tokens=tokens_G, medians=medians_G, special=special, vocabulary=len(vocabulary))


if __name__ == "__main__":
    sys.exit(run_command(main))
