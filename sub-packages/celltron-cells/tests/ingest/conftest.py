"""What the tests of sources share."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from celltron.cells.ingest.checks import check_cell_ids, describe_bad_value
from celltron.cells.ingest.source import RowBlock, Source
from celltron.cells.map_rows import BAD_COLUMN, NEGATIVE, NOT_FINITE, NOT_INTEGER, BadValue
from celltron.core import InputError

REAL = Path(__file__).parents[4] / "recipes" / "data" / "pbmc_citeseq" / "pbmc_citeseq.h5ad"
ReadSource = Callable[..., sp.csr_matrix]


def rows_of(block: RowBlock, num_genes: int) -> sp.csr_matrix:
    """A block as a matrix; repeated columns add up."""
    values = block.values.astype(np.float64)
    matrix = sp.csr_matrix((values, block.columns, block.indptr), shape=(len(block.indptr) - 1, num_genes))
    matrix.sum_duplicates()
    return matrix


def first_bad(block: RowBlock, num_genes: int) -> BadValue | None:
    """The first value that is no count."""
    values = block.values.astype(np.float64)
    wrong = {
        BAD_COLUMN: (block.columns < 0) | (block.columns >= num_genes),
        NOT_FINITE: ~np.isfinite(values),
        NEGATIVE: values < 0,
        NOT_INTEGER: values != np.floor(values),
    }
    places = [(int(np.flatnonzero(mask)[0]), problem) for problem, mask in wrong.items() if mask.any()]
    if not places:
        return None
    place, problem = min(places, key=lambda found: found[0])
    return BadValue(problem=problem, row=int(np.searchsorted(block.indptr, place, side="right")) - 1, place=place)


@pytest.fixture(scope="session")
def real() -> anndata.AnnData:
    """400 measured cells x 4,000 genes, counts in X."""
    return anndata.read_h5ad(REAL)


@pytest.fixture(scope="session")
def in_all_forms(real: anndata.AnnData) -> anndata.AnnData:
    """The measured cells, 1,500 genes: CSR in X, ``columns`` CSC and ``dense`` in layers; raw CSC with 2,000 genes."""
    some = real[:, :2000]
    whole = anndata.AnnData(sp.csc_matrix(some.X.astype(np.float32)), obs=some.obs, var=some.var)
    data = whole[:, :1500].copy()
    data.X = sp.csr_matrix(data.X)
    data.layers["columns"] = sp.csc_matrix(data.X * 2)
    data.layers["dense"] = data.X.toarray() * 3
    data.raw = whole
    data.obsm["X_pca"] = np.random.default_rng(0).normal(size=(400, 7)).astype(np.float32)
    data.obsm["sparse"] = sp.csr_matrix(np.eye(400))
    return data


@pytest.fixture
def read_source(tmp_path: Path) -> ReadSource:
    """Reads all counts of a source as a conversion does, from three threads; what is wrong raises."""

    def read(source: Source, *, check: bool = True) -> sp.csr_matrix:
        num_cells, num_genes = source.shape
        assert source.obs.num_rows == num_cells and source.var.num_rows == num_genes
        if check:
            check_cell_ids(source)
        assert isinstance(source.head(10), RowBlock)
        source.prepare(tmp_path / "scratch" / str(id(source)))

        def part(start: int) -> list[sp.csr_matrix]:
            stop = min(start + 57, num_cells)
            parts, row = [], start
            for block in source.blocks(start, stop):
                assert block.start == row and block.indptr[0] == 0 and len(block.values) == len(block.columns)
                row += len(block.indptr) - 1
                bad = first_bad(block, num_genes) if check else None
                if bad is not None:
                    raise InputError(describe_bad_value(source, block, bad))
                parts.append(rows_of(block, num_genes))
            assert row == stop
            return parts

        with ThreadPoolExecutor(3) as pool:
            parts = [block for blocks in pool.map(part, range(0, num_cells, 57)) for block in blocks]
        return sp.csr_matrix(sp.vstack(parts))

    return read
