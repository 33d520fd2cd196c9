"""A matrix and its names fit together, or that is said."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from celltron.cells.ingest.matrix_source import MatrixSource, looks_like_counts, refuse_raw
from celltron.cells.ingest.source import ArrowFrame, RowBlock
from celltron.core import InputError


class Rows:
    """A matrix whose one row holds some values; reading fails with ``error``."""

    def __init__(self, values: list[float], shape: tuple[int, int] = (1, 3), error: Exception | None = None) -> None:
        self.shape, self._values, self._error = shape, np.array(values, dtype=np.float64), error
        self.prepared: list[dict[str, Any]] = []

    def prepare(self, scratch: Path, identity: dict[str, Any]) -> None:
        self.prepared.append(identity)

    def blocks(self, start: int, stop: int) -> Iterator[RowBlock]:
        yield self.head(0)

    def head(self, num_values: int) -> RowBlock:
        if self._error is not None:
            raise self._error
        indptr = np.array([0, len(self._values)])
        return RowBlock(start=0, indptr=indptr, columns=np.arange(len(self._values)), values=self._values)

    def close(self) -> None: ...


def source_of(matrix: Rows, num_cells: int = 1, num_genes: int = 3) -> MatrixSource:
    frames = [ArrowFrame(pa.array([str(i) for i in range(n)], pa.string()), {}) for n in (num_cells, num_genes)]
    return MatrixSource(
        name="a.x", matrix_name="X", matrix=matrix, obs=frames[0], var=frames[1], find_identity=lambda: {"bytes": 7}
    )


def test_shapes() -> None:
    assert source_of(Rows([1])).shape == (1, 3)
    with pytest.raises(InputError, match="a.x is truncated or damaged .X is 1 x 3, but 2 cells and 3 genes are named"):
        source_of(Rows([1]), num_cells=2)
    with pytest.raises(InputError, match="a.x holds 0 cells and 3 genes: nothing to convert, leave it out"):
        source_of(Rows([], (0, 3)), num_cells=0)


def test_the_scratch_folder_is_of_one_matrix_of_one_file(tmp_path: Path) -> None:
    matrix = Rows([1])
    source_of(matrix).prepare(tmp_path)
    assert matrix.prepared == [{"bytes": 7, "matrix": "X"}]


def test_what_breaks_while_reading_becomes_a_sentence() -> None:
    source = source_of(Rows([1], error=KeyError("chunk 3")))
    for read in (lambda: source.head(1), lambda: next(source.blocks(0, 1))):
        with pytest.raises(InputError, match="a.x is truncated or damaged .chunk 3."):
            read()


@pytest.mark.parametrize(
    ("values", "wanted"),
    [([1, 2, 0], True), ([], True), ([1.5], False), ([-1], False), ([np.nan], False), ([np.inf], False)],
)
def test_counts_are_told(values: list[float], wanted: bool) -> None:
    assert looks_like_counts(Rows(values), "a") is wanted
    assert not looks_like_counts(Rows(values, error=ValueError("broken")), "a")


def test_raw_is_anndatas() -> None:
    refuse_raw("a", False, "")
    with pytest.raises(InputError, match="^a has no raw, which is anndata's: leave --use-raw out or so$"):
        refuse_raw("a", True, " or so")
