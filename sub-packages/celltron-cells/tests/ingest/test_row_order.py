"""Values ordered by column come out ordered by row; what a killed run left is made anew, what is complete is used."""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from celltron.cells.ingest import row_order
from celltron.cells.ingest.row_order import MARKER, deal_rows, open_dealt

SHAPE = (50, 30)
IDENTITY = {"bytes": 10}


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch) -> sp.csc_matrix:
    """Some hundreds of values, dealt out in runs of 40; an empty row and one longer than a run."""
    monkeypatch.setattr(row_order, "RUN_VALUES", 20)
    dense = np.random.default_rng(0).poisson(0.4, SHAPE)
    dense[3], dense[7] = 0, 5
    return sp.csc_matrix(dense)


class Dealer:
    """Deals a matrix out, ten columns a run, and counts how often it is asked."""

    def __init__(self, matrix: sp.csc_matrix, *, fail_after: int | None = None) -> None:
        self.matrix, self.asked, self.fail_after = matrix, 0, fail_after

    def triples(self) -> Any:
        self.asked += 1
        for start in range(0, SHAPE[1], 10):
            if self.fail_after is not None and start >= self.fail_after:
                raise KeyboardInterrupt
            part = self.matrix[:, start : start + 10].tocsc()
            columns = np.repeat(np.arange(start, start + part.shape[1]), np.diff(part.indptr))
            yield part.indices, columns, part.data.astype(np.float32)

    def deal(self, scratch: Path, identity: dict[str, Any] = IDENTITY) -> sp.csr_matrix:
        file = deal_rows(
            scratch,
            SHAPE,
            np.dtype(np.float32),
            identity,
            count=lambda: (rows for rows, _, _ in self.triples()),
            triples=self.triples,
        )
        with closing(file):
            indptr, columns, values = open_dealt(file, scratch)
            parts = indptr[0 : SHAPE[0] + 1], columns[0 : columns.shape[0]], values[0 : values.shape[0]]
        return sp.csr_matrix((parts[2], parts[1], parts[0]), shape=SHAPE)


def test_rows_are_the_matrix_and_their_columns_rise(tmp_path: Path, matrix: sp.csc_matrix) -> None:
    found = Dealer(matrix).deal(tmp_path / "a" / "scratch")
    assert np.array_equal(found.toarray(), matrix.toarray())
    assert all(
        np.all(np.diff(found.indices[a:b]) > 0) for a, b in zip(found.indptr[:-1], found.indptr[1:], strict=True)
    )
    assert sorted(path.name for path in (tmp_path / "a" / "scratch").iterdir()) == ["complete.json", "matrix"]


def test_a_complete_folder_is_used_again_only_for_the_same_source(tmp_path: Path, matrix: sp.csc_matrix) -> None:
    dealer = Dealer(matrix)
    dealer.deal(tmp_path / "scratch")
    assert dealer.asked == 2
    assert np.array_equal(dealer.deal(tmp_path / "scratch").toarray(), matrix.toarray()) and dealer.asked == 2
    dealer.deal(tmp_path / "scratch", {"bytes": 11})
    assert dealer.asked == 4


def test_a_broken_off_folder_is_made_anew(tmp_path: Path, matrix: sp.csc_matrix) -> None:
    for fail_after in (0, 10, 20):
        with pytest.raises(KeyboardInterrupt):
            Dealer(matrix, fail_after=fail_after).deal(tmp_path / "scratch")
    (tmp_path / "scratch" / "rows").write_bytes(b"left")
    assert np.array_equal(Dealer(matrix).deal(tmp_path / "scratch").toarray(), matrix.toarray())
    (tmp_path / "scratch" / MARKER).unlink()
    (tmp_path / "scratch" / "matrix").write_bytes(b"left")
    assert np.array_equal(Dealer(matrix).deal(tmp_path / "scratch").toarray(), matrix.toarray())


def test_a_matrix_without_values(tmp_path: Path) -> None:
    assert Dealer(sp.csc_matrix(SHAPE)).deal(tmp_path / "scratch").nnz == 0
