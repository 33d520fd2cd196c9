"""Trim PBMCs to the small file that the quickstart trains on: see recipes/data/pbmc_citeseq/README.md."""

import argparse
from pathlib import Path

import anndata
import h5py
import numpy as np
import scipy.sparse

OBS_COLUMNS = ["batch"]
VAR_COLUMNS = ["gene_symbol"]


def trim(source: Path, out: Path, num_genes: int) -> None:
    """Write the `num_genes` genes found in most cells, of those with an Ensembl id, in the source's order."""
    adata = anndata.read_h5ad(source)
    counts_CG = adata.X
    num_cells_G = np.asarray((counts_CG > 0).sum(axis=0)).ravel()
    num_cells_G[(adata.var["ensembl_id"] == "").to_numpy()] = 0
    genes = np.sort(np.argsort(-num_cells_G, kind="stable")[:num_genes])
    kept_CG = scipy.sparse.csr_matrix(counts_CG[:, genes])
    if (kept_CG.data != np.rint(kept_CG.data)).any():
        raise ValueError(
            f"{source}: X holds values that are no integers, raw counts were wanted; give the file of counts"
        )
    kept_CG.sort_indices()
    trimmed = anndata.AnnData(
        kept_CG.astype(np.int32),
        obs=adata.obs[OBS_COLUMNS],
        var=adata.var.iloc[genes].set_index("ensembl_id")[VAR_COLUMNS],
    )
    with h5py.File(out, "w") as file:  # byte shuffling, which write_h5ad does not offer, halves the file
        settings = {"compression": "gzip", "compression_opts": 9, "shuffle": True}
        anndata.io.write_elem(file, "/", trimmed, dataset_kwargs=settings)


def main() -> None:
    """Read the arguments and trim."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="h5ad file of all genes, with var column ensembl_id")
    parser.add_argument("out", type=Path, help="h5ad file to write")
    parser.add_argument("--num-genes", type=int, default=4000, help="genes to keep")
    arguments = parser.parse_args()
    trim(arguments.source, arguments.out, arguments.num_genes)


if __name__ == "__main__":
    main()
