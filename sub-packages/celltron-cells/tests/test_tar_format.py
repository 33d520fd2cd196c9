"""The bytes of a block: what tarfile, numpy and webdataset's rules make of them."""

import io
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celltron.cells.reader import Rows
from celltron.cells.tar_format import (
    TAR_END,
    Block,
    decode_block,
    encode_block,
    layout_of,
    make_block,
    problem_of_block,
    sample_key,
)
from celltron.core import InputError


def rows_of(dense: np.ndarray) -> Rows:
    """Compressed rows of dense counts, the plain way."""
    genes = [np.flatnonzero(row) for row in dense]
    indptr = np.concatenate([[0], np.cumsum([len(g) for g in genes])])
    counts = np.concatenate([row[g] for row, g in zip(dense, genes, strict=True)])
    return Rows(indptr.astype(np.int64), np.concatenate(genes).astype(np.int64), counts)


def block_of(dense: np.ndarray, first_cell: int = 0) -> Block:
    cells = np.arange(first_cell, first_cell + len(dense), dtype=np.int64)
    return make_block(cells, rows_of(dense), dense.sum(1).astype(np.float64), dense.shape[1])


@settings(max_examples=60, deadline=None)
@given(
    num_cells=st.integers(1, 9),
    num_genes=st.integers(1, 40),
    highest=st.sampled_from([1, 255, 256, 65_535, 65_536, 2**32]),
    seed=st.integers(0, 99),
)
def test_tarfile_and_numpy_read_what_was_written(num_cells: int, num_genes: int, highest: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    dense = random.integers(1, highest + 1, (num_cells, num_genes)) * (random.random((num_cells, num_genes)) < 0.5)
    block = block_of(dense, first_cell=10**9)
    data = encode_block(sample_key(12, 7), block)
    with tarfile.open(fileobj=io.BytesIO(data + TAR_END), mode="r:") as tar:
        members = tar.getmembers()
        arrays = {m.name: np.load(io.BytesIO(tar.extractfile(m).read()), allow_pickle=False) for m in members}  # type: ignore[union-attr]
    names = [f"000012-0007.{name}.npy" for name in ("indptr", "indices", "counts", "totals", "cells")]
    assert [m.name for m in members] == names
    assert {(m.mtime, m.uid, m.gid, m.mode, m.uname, m.gname) for m in members} == {(0, 0, 0, 0o644, "", "")}
    indptr, indices, counts, totals, cells = (arrays[name] for name in names)
    back = np.zeros_like(dense)
    for i in range(num_cells):
        back[i, indices[indptr[i] : indptr[i + 1]]] = counts[indptr[i] : indptr[i + 1]]
    assert np.array_equal(back, dense)
    assert np.array_equal(totals, dense.sum(1)) and totals.dtype == np.float64
    assert np.array_equal(cells, 10**9 + np.arange(num_cells)) and cells.dtype == np.int64
    largest = dense.max()
    fitting = next(t for t in ("uint8", "uint16", "uint32", "uint64") if largest <= np.iinfo(t).max)
    assert (indices.dtype, counts.dtype.name, indptr.dtype) == (np.uint16, fitting, np.uint32)
    layout = layout_of(num_cells, int((dense > 0).sum()), 2, counts.dtype.itemsize)
    assert layout.length == len(data)
    assert all(begin % 8 == 0 for begin in layout)
    buffer = np.frombuffer(data, dtype=np.uint8)
    for found, wanted in zip(
        decode_block(buffer, num_cells, len(counts), ("uint16", counts.dtype.name)), block, strict=True
    ):
        assert found.dtype == wanted.dtype and np.array_equal(found, wanted)
    assert problem_of_block(block, num_genes) == ""


def test_wide_and_fractional_values() -> None:
    wide = Rows(np.array([0, 2]), np.array([1, 69_999]), np.array([1, 2]))
    assert make_block(np.array([0]), wide, np.array([3.0]), 70_000).indices.dtype == np.uint32
    half = Rows(np.array([0, 2]), np.array([1, 2]), np.array([0.5, 2.0], dtype=np.float32))
    assert make_block(np.array([0]), half, np.array([2.5]), 3).counts.dtype == np.float32
    for values in (np.array([0.1, 2.0]), np.array([-1, 2]), np.array([np.nan, 1.0])):
        with pytest.raises(InputError, match="cells 4 to 4 hold counts that"):
            make_block(np.array([4]), half._replace(counts=values), np.array([2.1]), 3)
    with pytest.raises(InputError, match="or genes beyond 3"):
        make_block(np.array([4]), half._replace(gene_index=np.array([1, 65_538])), np.array([2.5]), 3)


def test_problems_of_blocks() -> None:
    dense = np.array([[1, 0, 2], [0, 0, 0], [3, 4, 5]])
    good = block_of(dense)
    assert problem_of_block(good, 3) == ""
    assert "do not rise below 2" in problem_of_block(good, 2)
    assert "do not rise" in problem_of_block(good._replace(indices=good.indices[::-1]), 3)
    assert "do not rise" in problem_of_block(good._replace(indices=np.array([0, 0, 0, 1, 2], dtype="u2")), 3)
    assert "above zero" in problem_of_block(good._replace(counts=good.counts * np.uint8(0)), 3)
    for ends in ([0, 2, 2, 4], [1, 2, 2, 5], [0, 3, 2, 5], [0, 2, 9, 5]):
        assert "follow each other" in problem_of_block(good._replace(indptr=np.array(ends, dtype="u4")), 3)
    for total in (-1.0, np.nan, np.inf):
        assert "total" in problem_of_block(good._replace(totals=np.array([1.0, total, 2.0])), 3)
    # Cells may begin with a lower gene than the one before ended with, and empty ones may come at either end.
    assert problem_of_block(block_of(np.array([[0, 0, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0]])), 3) == ""
    assert problem_of_block(block_of(np.zeros((4, 3), dtype=int)), 3) == ""
