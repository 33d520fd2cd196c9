"""AnnData of every kind that hypothesis thinks of: converted exactly, or refused in one sentence with nothing left."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from celltron.cells import CellStore, convert
from celltron.core import InputError

# Two names of one gene (a symbol, an id with its version), a copy on Y, names that no table knows, and plain ids.
GENES = {
    "ENSG00000000003": "ENSG00000000003",
    "TSPAN6": "ENSG00000000003",
    "ENSG00000000005.6": "ENSG00000000005",
    "ENSG00000000419": "ENSG00000000419",
    "ENSG00000182378": "ENSG00000182378",
    "ENSG00000182378.15_PAR_Y": "ENSG00000182378",
    "CD4": "ENSG00000010610",
    "no such gene": None,
    "ÄÖ-1 β": None,
    "ERCC-00002": None,
}
MEMORY = Path("/dev/shm")  # where pushing a file to the disk costs nothing
DTYPES = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", ">i4", ">f8", ">u2"]


@dataclass(frozen=True)
class Made:
    """An AnnData and what a conversion must make of it."""

    adata: anndata.AnnData
    dense: np.ndarray
    names: list[str]
    layer: str | None


@st.composite
def matrices(draw: Any) -> tuple[Any, np.ndarray]:
    """A matrix in some form and type, and its values in float64."""
    shape = draw(st.tuples(st.integers(0, 6), st.integers(0, 7)))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    values = st.integers(0, 3) | st.integers(0, 300 if dtype.itemsize > 1 else 100)
    if draw(st.integers(0, 9)) == 0:
        strange = [-1.0, 0.5, np.nan, np.inf] if dtype.kind == "f" else [-1] if dtype.kind == "i" else [7]
        values = values | st.sampled_from(strange)
    form = draw(st.sampled_from(["dense", "csr", "csc", "csr_array", "csc_array", "disordered"]))
    plain_dtype = dtype if form == "dense" else np.dtype("f4") if dtype == np.float16 else dtype.newbyteorder("=")
    if form == "disordered":  # rows whose columns come in any order and more than once, zeros among the values
        rows = (
            [draw(st.lists(st.tuples(st.integers(0, shape[1] - 1), values), max_size=9)) for _ in range(shape[0])]
            if shape[1]
            else [[]] * shape[0]
        )
        indices = np.array([column for row in rows for column, _ in row], dtype=draw(st.sampled_from(["i4", "i8"])))
        data = np.array([value for row in rows for _, value in row]).astype(plain_dtype)
        indptr = np.cumsum([0] + [len(row) for row in rows]).astype(indices.dtype)
        matrix = sp.csr_matrix(shape, dtype=plain_dtype)
        matrix.data, matrix.indices, matrix.indptr = data, indices, indptr
        dense = np.zeros(shape)
        np.add.at(dense, (np.repeat(np.arange(shape[0]), np.diff(indptr)), indices), data.astype(np.float64))
        return matrix, dense
    cells = draw(st.lists(st.lists(values, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]))
    plain = np.array(cells, dtype=np.float64).reshape(shape).astype(dtype)
    make = {"dense": np.asarray, "csr": sp.csr_matrix, "csc": sp.csc_matrix}
    make |= {"csr_array": sp.csr_array, "csc_array": sp.csc_array}
    return make[form](plain.astype(plain_dtype)), plain.astype(np.float64)


@st.composite
def made(draw: Any) -> Made:
    matrix, dense = draw(matrices())
    num_cells, num_genes = dense.shape
    names = draw(st.lists(st.sampled_from(sorted(GENES)), min_size=num_genes, max_size=num_genes))
    text = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=4)
    unique = draw(st.integers(0, 9)) > 0
    cells = draw(st.lists(text, min_size=num_cells, max_size=num_cells, unique=unique))
    obs = pd.DataFrame(index=pd.Index(cells, dtype=object))
    if draw(st.booleans()):
        obs["kind"] = pd.Categorical(
            draw(st.lists(st.sampled_from(["T", "B", "ß 細胞", None]), min_size=num_cells, max_size=num_cells))
        )
    if draw(st.booleans()):
        obs["note"] = draw(st.lists(text, min_size=num_cells, max_size=num_cells))
    if draw(st.booleans()):
        obs["depth"] = np.array(
            draw(st.lists(st.integers(-5, 2**40), min_size=num_cells, max_size=num_cells)), dtype=">i8"
        )
    if draw(st.booleans()):
        obs["flag"] = pd.array(
            draw(st.lists(st.sampled_from([True, False, None]), min_size=num_cells, max_size=num_cells)),
            dtype="boolean",
        )
    var = pd.DataFrame(index=pd.Index(names, dtype=object))
    layer = draw(st.sampled_from([None, "counts"]))
    if layer is None:
        return Made(anndata.AnnData(X=matrix, obs=obs, var=var), dense, names, None)
    return Made(anndata.AnnData(obs=obs, var=var, layers={"counts": matrix}), dense, names, "counts")


def reason_to_refuse(case: Made, keep_unmapped: bool) -> bool:
    """Whether a careful reader would have to refuse the file."""
    dense = case.dense
    whole = np.isfinite(dense).all() and (dense >= 0).all() and (dense == np.floor(dense)).all()
    known = [GENES[name] for name in case.names if GENES[name] is not None]
    return 0 in dense.shape or not whole or case.adata.obs_names.has_duplicates or not known


def expected(case: Made, keep_unmapped: bool) -> tuple[list[str], np.ndarray]:
    """The store's genes in first-seen order and the counts in them."""
    sums: dict[str, np.ndarray] = {}
    for name, column in zip(case.names, case.dense.T, strict=True):
        gene = GENES[name] or (name if keep_unmapped else None)
        if gene is not None:
            sums[gene] = sums.get(gene, 0) + column
    return list(sums), np.stack(list(sums.values()), axis=1)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    case=made(),
    keep_unmapped=st.booleans(),
    shard_cells=st.integers(1, 4),
    compression=st.sampled_from([None, "gzip", "lzf"]),
)
def test_converted_exactly_or_refused(
    case: Made, keep_unmapped: bool, shard_cells: int, compression: str | None
) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name:
        folder = Path(name)
        try:
            case.adata.write_h5ad(folder / "a.h5ad", compression=compression)
        except (TypeError, ValueError, NotImplementedError):
            assume(False)  # anndata itself cannot write it
        options: dict[str, Any] = {"keep_unmapped": keep_unmapped, "shard_cells": shard_cells, "layer": case.layer}
        if reason_to_refuse(case, keep_unmapped):
            with pytest.raises(InputError) as caught:
                convert([folder / "a.h5ad"], folder / "a.store", workers=2, **options)
            assert str(caught.value).count("\n") == 0 and "a.h5ad" in str(caught.value)
            assert [path.name for path in folder.iterdir()] == ["a.h5ad"]
            return
        convert([folder / "a.h5ad"], folder / "a.store", workers=2, **options)
        store = CellStore.open(folder / "a.store")
        store.verify()
        genes, dense = expected(case, keep_unmapped)
        assert list(store.gene_ids) == genes
        indptr, gene_index, counts = store.rows(np.arange(len(store)))
        got = np.zeros(dense.shape)
        got[np.repeat(np.arange(len(store)), np.diff(indptr)), gene_index] = counts
        assert np.array_equal(got, dense)
        assert np.array_equal(store.total_counts, case.dense.sum(1))
        check_obs(store, case.adata.obs)


def check_obs(store: CellStore, obs: pd.DataFrame) -> None:
    assert store.obs["cell_id"].tolist() == obs.index.tolist()
    for column in obs.columns:
        got = [None if pd.isna(value) else value for value in store.obs[column]]
        assert got == [None if pd.isna(value) else value for value in obs[column]]
