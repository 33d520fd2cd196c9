"""MatrixMarket text becomes the rows that scipy reads: in any order, in small pieces, again after a broken-off run."""

import gzip
import io
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp

from celltron.cells.ingest import mtx
from celltron.cells.ingest.mtx import MtxMatrix
from celltron.cells.ingest.source import RowBlock
from celltron.core import InputError

IDENTITY = {"bytes": 1}


def text_of(matrix: sp.coo_matrix, field: str = "integer") -> bytes:
    """Cells x genes as a file of genes x cells, in the order of the matrix."""
    lines = [f"{g + 1} {c + 1} {v}" for c, g, v in zip(matrix.row, matrix.col, matrix.data, strict=True)]
    cells, genes = matrix.shape
    head = f"%%MatrixMarket matrix coordinate {field} general\n%\n%more\n{genes} {cells} {len(lines)}\n"
    return (head + "".join(f"{line}\n" for line in lines)).encode()


def matrix_of(text: bytes, shape: tuple[int, int]) -> MtxMatrix:
    return MtxMatrix("a.mtx", lambda: io.BytesIO(text), shape)


def rows(matrix: MtxMatrix, start: int = 0, stop: int | None = None) -> sp.csr_matrix:
    blocks = list(matrix.blocks(start, matrix.shape[0] if stop is None else stop))
    return sp.vstack([as_matrix(block, matrix.shape[1]) for block in blocks]).tocsr()


def as_matrix(block: RowBlock, num_genes: int) -> sp.csr_matrix:
    return sp.csr_matrix((block.values, block.columns, block.indptr), shape=(len(block.indptr) - 1, num_genes))


def some_counts(num_cells: int = 90, seed: int = 0) -> sp.coo_matrix:
    dense = np.random.default_rng(seed).poisson(0.4, (num_cells, 30))
    dense[[0, 5, num_cells - 1]] = 0
    return sp.coo_matrix(dense)


def reordered(matrix: sp.coo_matrix, order: Any) -> sp.coo_matrix:
    return sp.coo_matrix((matrix.data[order], (matrix.row[order], matrix.col[order])), shape=matrix.shape)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtx, "TEXT_BYTES", 300)
    monkeypatch.setattr(mtx, "RUN_VALUES", 50)


@pytest.mark.parametrize("order", ["cells", "genes", "random"])
def test_any_order_gives_the_rows_of_scipy(tmp_path: Path, order: str) -> None:
    counts = some_counts()
    orders = {"cells": np.lexsort((counts.col, counts.row)), "genes": np.lexsort((counts.row, counts.col))}
    orders["random"] = np.random.default_rng(1).permutation(counts.nnz)
    text = text_of(reordered(counts, orders[order]))
    wanted = scipy.io.mmread(io.BytesIO(text)).T.tocsr()
    matrix = matrix_of(text, counts.shape)
    matrix.prepare(tmp_path / "scratch", IDENTITY)
    assert (rows(matrix) != wanted).nnz == 0
    assert (rows(matrix, 17, 61) != wanted[17:61]).nnz == 0
    kept = {path.name for path in (tmp_path / "scratch").rglob("*") if path.is_file()}
    assert kept == ({"genes", "values", "indptr", "complete.json"} if order == "cells" else {"matrix", "complete.json"})
    matrix.close()


@pytest.mark.parametrize("field", ["real", "integer", "unsigned-integer"])
def test_what_scipy_writes(tmp_path: Path, field: str) -> None:
    dtype = {"real": np.float64, "integer": np.int64, "unsigned-integer": np.uint32}[field]
    counts = some_counts().astype(dtype)
    if field == "real":
        counts.data *= np.pi
    scipy.io.mmwrite(tmp_path / "a.mtx", counts.T, field=None)
    text = (tmp_path / "a.mtx").read_bytes()
    assert f"coordinate {field} general" in text.decode()
    matrix = matrix_of(text, counts.shape)
    matrix.prepare(tmp_path / "scratch", IDENTITY)
    assert (rows(matrix) != scipy.io.mmread(tmp_path / "a.mtx").T).nnz == 0
    matrix.close()


def test_values_named_twice_add_up_and_large_ones_stay(tmp_path: Path) -> None:
    head = b"%%MatrixMarket matrix coordinate integer general\n3 2 4\n"
    matrix = matrix_of(head + b"1 1 2\n1 1 3\n3 2 9007199254740991\n2 2 0\n", (2, 3))
    matrix.prepare(tmp_path / "scratch", IDENTITY)
    assert rows(matrix).toarray().tolist() == [[5, 0, 0], [0, 0, 2**53 - 1]]
    matrix.close()


def test_nothing_stored(tmp_path: Path) -> None:
    matrix = matrix_of(b"%%MatrixMarket matrix coordinate integer general\n3 2 0\n", (2, 3))
    assert len(matrix.head(10).values) == 0
    matrix.prepare(tmp_path / "scratch", IDENTITY)
    assert rows(matrix).shape == (2, 3) and rows(matrix).nnz == 0
    matrix.close()


def test_head_comes_before_prepare() -> None:
    counts = some_counts().tocsr()
    head = matrix_of(text_of(counts.tocoo()), counts.shape).head(60)
    found = as_matrix(head, 30)
    assert 0 < len(head.values) <= 60
    assert (found != counts[: found.shape[0]]).nnz == 0  # whole cells only
    by_genes = counts.T.tocsr().T.tocoo()
    head = matrix_of(text_of(reordered(by_genes, np.lexsort((by_genes.row, by_genes.col)))), counts.shape).head(60)
    assert len(head.values) == 60 and head.columns.max() < 10
    whole = matrix_of(text_of(counts.tocoo()), counts.shape).head(10**6)
    assert (as_matrix(whole, 30) != counts[: len(whole.indptr) - 1]).nnz == 0 and len(whole.values) == counts.nnz


class Openings:
    """Counts how often the text is opened, and may end early."""

    def __init__(self, text: bytes) -> None:
        self.text, self.count = text, 0

    def __call__(self) -> BinaryIO:
        self.count += 1
        return io.BytesIO(self.text)


@pytest.mark.parametrize("order", ["cells", "genes"])
def test_a_complete_scratch_folder_is_used_again(tmp_path: Path, order: str) -> None:
    counts = some_counts()
    if order == "genes":
        counts = reordered(counts, np.lexsort((counts.row, counts.col)))
    opened = Openings(text_of(counts))
    first = MtxMatrix("a.mtx", opened, counts.shape)
    first.prepare(tmp_path / "scratch", IDENTITY)
    first.close()
    wanted, count = rows_of_scratch(tmp_path), opened.count
    again = MtxMatrix("a.mtx", opened, counts.shape)
    again.prepare(tmp_path / "scratch", IDENTITY)
    assert opened.count == count + 1  # for the head line alone
    assert rows_of_scratch(tmp_path) == wanted
    assert (rows(again) != counts.tocsr()).nnz == 0
    again.close()
    changed = MtxMatrix("a.mtx", opened, counts.shape)
    changed.prepare(tmp_path / "scratch", {"bytes": 2})
    assert opened.count == count + 3
    changed.close()


def rows_of_scratch(folder: Path) -> dict[str, tuple[int, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize(
    ("fails_in", "order"),
    [("_sync", "cells"), ("_write_values", "cells"), ("_write_marker", "cells"), ("_write_values", "genes")]
    + [("_deal", "genes"), ("_write_marker", "genes")],
)
def test_a_broken_off_run_is_made_anew(tmp_path: Path, fails_in: str, order: str, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    counts = some_counts()
    if order == "genes":
        counts = reordered(counts, np.lexsort((counts.row, counts.col)))
    holder = MtxMatrix if hasattr(MtxMatrix, fails_in) else mtx
    whole = getattr(holder, fails_in)

    def broken_off(*arguments: Any, **more: Any) -> Any:
        if fails_in != "_write_marker":
            whole(*arguments, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(holder, fails_in, broken_off)
        matrix = matrix_of(text_of(counts), counts.shape)
        with pytest.raises(KeyboardInterrupt):
            matrix.prepare(tmp_path / "scratch", IDENTITY)
    assert not (tmp_path / "scratch" / "complete.json").exists()
    matrix = matrix_of(text_of(counts), counts.shape)
    matrix.prepare(tmp_path / "scratch", IDENTITY)
    assert (rows(matrix) != counts.tocsr()).nnz == 0
    matrix.close()


def test_a_cut_or_missing_scratch_file_is_made_anew(tmp_path: Path) -> None:
    counts = some_counts()
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:-1]), Path.unlink):
        for name in ("values", "genes", "indptr"):
            matrix = matrix_of(text_of(counts), counts.shape)
            matrix.prepare(tmp_path / "scratch", IDENTITY)
            matrix.close()
            damage(tmp_path / "scratch" / name)
            matrix = matrix_of(text_of(counts), counts.shape)
            matrix.prepare(tmp_path / "scratch", IDENTITY)
            assert (rows(matrix) != counts.tocsr()).nnz == 0
            matrix.close()


HEAD = "%%MatrixMarket matrix coordinate integer general\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "a.mtx is no MatrixMarket file"),
        ("1 1 1\n", "a.mtx is no MatrixMarket file"),
        ("%%MatrixMarket matrix array real general\n3 2\n", "of kind 'matrix array real general'"),
        ("%%MatrixMarket matrix coordinate pattern general\n3 2 0\n", "of kind 'matrix coordinate pattern general'"),
        (
            "%%MatrixMarket matrix coordinate integer symmetric\n3 3 0\n",
            "of kind 'matrix coordinate integer symmetric'",
        ),
        (HEAD, "line 2 of a.mtx is '': wanted genes, cells and values"),
        (f"{HEAD}%\n3 2\n", "line 3 of a.mtx is '3 2'"),
        (f"{HEAD}3 -2 1\n", "line 2 of a.mtx is '3 -2 1'"),
        (f"{HEAD}2 3 0\n", "a.mtx is cells x genes, wanted genes x cells"),
        (f"{HEAD}4 2 0\n", "a.mtx is 4 genes x 2 cells, but the files beside it name 3 and 2"),
    ],
)
def test_heads_that_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        matrix_of(text.encode(), (2, 3))


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("1 1 1\n", "a.mtx holds 1 values, but its head says 2: it is truncated"),
        ("1 1 1\n2 2 2\n3 2 2\n", "a.mtx holds 3 values, but its head says 2"),
        ("1 1 1\n2 2\n", "line 4 of a.mtx is '2 2': wanted a gene, a cell and a number"),
        ("1 1 1\n4 2 7\n", "line 4 of a.mtx is '4 2 7': it has 3 genes and 2 cells"),
    ],
)
def test_bodies_that_are_refused(tmp_path: Path, body: str, sentence: str) -> None:
    matrix = matrix_of(f"{HEAD}3 2 2\n{body}".encode(), (2, 3))
    with pytest.raises(InputError, match=sentence):
        matrix.prepare(tmp_path / "scratch", IDENTITY)


def test_a_bad_line_far_into_the_text_is_named(tmp_path: Path) -> None:
    counts = some_counts()
    lines = text_of(counts).splitlines()
    lines[200] = b"1 2 nothing"
    matrix = matrix_of(b"\n".join([*lines, b""]), counts.shape)
    with pytest.raises(InputError, match="line 201 of a.mtx is '1 2 nothing'"):
        matrix.prepare(tmp_path / "scratch", IDENTITY)


def test_a_last_number_may_not_be_cut(tmp_path: Path) -> None:
    matrix = matrix_of(f"{HEAD}3 2 1\n1 1 1".encode(), (2, 3))  # of "1 1 17\n"
    with pytest.raises(InputError, match="the last line of a.mtx has no end, so it may be truncated"):
        matrix.prepare(tmp_path / "scratch", IDENTITY)


def test_packed_text_in_several_members(tmp_path: Path) -> None:
    """As bgzip and cat write it."""
    text = text_of(some_counts())
    packed = gzip.compress(text[:500]) + gzip.compress(text[500:])
    matrix = MtxMatrix("a.mtx.gz", lambda: gzip.GzipFile(fileobj=io.BytesIO(packed)), (90, 30))  # type: ignore[arg-type]
    matrix.prepare(tmp_path / "scratch", IDENTITY)
    assert (rows(matrix) != some_counts().tocsr()).nnz == 0
    matrix.close()
