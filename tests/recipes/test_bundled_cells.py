"""The bundled real cells, tokenised with both published dictionaries, against a reference in plain numpy."""

import csv
import gzip
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import anndata
import numpy as np
import pytest

from celltron.cells import CellStore, RankTokenizer, convert
from celltron.core import load_published_geneformer

CELLS = Path(__file__).resolve().parents[2] / "recipes" / "data" / "pbmc_citeseq" / "pbmc_citeseq.h5ad"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CellStore:
    path = tmp_path_factory.mktemp("bundled") / "cells.store"
    convert([CELLS], path)
    return CellStore.open(path)


def reference_tokens(name: str, max_length: int) -> list[list[int]]:
    """Tokens of every cell, straight from the published table and the definition, with nothing of celltron."""
    table = files("celltron.core") / "tables" / f"geneformer_{name}.tsv.gz"
    with table.open("rb") as raw, gzip.open(raw, "rt", encoding="utf-8") as text:
        rows = list(csv.DictReader(text, delimiter="\t"))
    token = {row["ensembl_id"]: int(row["token_id"]) for row in rows if row["token_id"]}
    median = {row["ensembl_id"]: float(row["median"]) for row in rows if row["median"]}
    adata = anndata.read_h5ad(CELLS)
    counts_CG = adata.X.toarray().astype(np.float64)
    known = np.array([gene in token and gene in median for gene in adata.var_names])
    ids = np.array([token.get(gene, -1) for gene in adata.var_names])
    medians = np.array([median.get(gene, np.nan) for gene in adata.var_names])
    cells = []
    for counts in counts_CG:
        genes = np.flatnonzero((counts > 0) & known)
        values = counts[genes] / counts.sum() * 10_000 / medians[genes]
        order = sorted(range(len(genes)), key=lambda i: (-values[i], ids[genes[i]]))
        cells.append([int(ids[genes[i]]) for i in order])
    if "<cls>" in token:
        return [[token["<cls>"], *cell[: max_length - 2], token["<eos>"]] for cell in cells]
    return [cell[:max_length] for cell in cells]


@pytest.mark.parametrize(("name", "max_length"), [("gc30M", 2048), ("gc95M", 4096), ("gc30M", 512), ("gc95M", 512)])
def test_tokens_equal_the_reference(store: CellStore, name: str, max_length: int) -> None:
    vocabulary, medians = load_published_geneformer(name)
    tokenizer = RankTokenizer(vocabulary, medians, store.gene_ids, max_length=max_length)
    tokens, lengths = tokenizer.tokenize(store, np.arange(len(store)))
    found = [list(map(int, cell)) for cell in np.split(tokens, np.cumsum(lengths)[:-1])]
    assert found == reference_tokens(name, max_length)


def test_counts_equal_anndata_cell_by_cell(store: CellStore) -> None:
    adata = anndata.read_h5ad(CELLS)
    column = {gene: i for i, gene in enumerate(adata.var_names)}
    columns = np.array([column[gene] for gene in store.gene_ids])
    for cell in range(len(store)):
        gene_index, counts = store[cell]
        row = np.zeros(adata.n_vars, dtype=np.int64)
        row[columns[gene_index]] = counts
        np.testing.assert_array_equal(row, adata.X[cell].toarray().ravel())


def test_tie_order_is_the_same_in_another_process(store: CellStore) -> None:
    """Ties are common in counts: another process, with another number of threads, must order them alike."""
    program = (
        "import sys, zlib, numpy as np\n"
        "from celltron.cells import CellStore, RankTokenizer\n"
        "store = CellStore.open(sys.argv[1])\n"
        "tokens, lengths = RankTokenizer.from_store(store, max_length=2048).tokenize(store, np.arange(len(store)))\n"
        "print(zlib.crc32(tokens.tobytes()), zlib.crc32(lengths.tobytes()))\n"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", program, str(store.path)],
            capture_output=True,
            text=True,
            check=True,
            env={"PATH": "", "PYTHONPATH": ":".join(sys.path), "NUMBA_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
        ).stdout
        for threads in ("1", "2")
    }
    assert len(answers) == 1 and answers.pop().strip()
