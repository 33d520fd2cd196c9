"""A matrix of any kind with the names of its cells and genes, as a source of counts."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from celltron.cells.ingest.anndata_matrix import Matrix
from celltron.cells.ingest.damage import damaged, reading
from celltron.cells.ingest.source import HEAD_VALUES, Frame, ObsmArray, RowBlock
from celltron.core import InputError


def no_other_matrix() -> str:
    """The advice of a source that has one matrix."""
    return ""


def no_files() -> None:
    """There is nothing to let go of."""


@dataclass(slots=True, kw_only=True)
class MatrixSource:
    """See `celltron.cells.ingest.source.Source`; the fields without a comment are those of it."""

    name: str
    matrix_name: str
    matrix: Matrix
    """The counts; what it raises for broken content becomes an InputError."""
    obs: Frame
    var: Frame
    find_identity: Callable[[], dict[str, Any]]
    obsm: Mapping[str, ObsmArray] = field(default_factory=dict)
    find_advice: Callable[[], str] = no_other_matrix
    close_files: Callable[[], None] = no_files
    shape: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.shape = self.matrix.shape
        there = (self.obs.num_rows, self.var.num_rows)
        if self.shape != there:
            sizes = " x ".join(str(size) for size in self.shape)
            raise damaged(
                self.name, f"{self.matrix_name} is {sizes}, but {there[0]} cells and {there[1]} genes are named"
            )
        if 0 in there:
            raise InputError(
                f"{self.name} holds {there[0]} cells and {there[1]} genes: nothing to convert, leave it out"
            )

    def identity(self) -> dict[str, Any]:
        """What changes when the source does."""
        return self.find_identity()

    def prepare(self, scratch: Path) -> None:
        """Bring into rows, in the folder ``scratch``, what is ordered otherwise."""
        with reading(self.name):
            self.matrix.prepare(scratch, self.find_identity() | {"matrix": self.matrix_name})

    def head(self, num_values: int) -> RowBlock:
        """About ``num_values`` stored values from the beginning, as rows."""
        with reading(self.name):
            return self.matrix.head(num_values)

    def blocks(self, start: int, stop: int) -> Iterator[RowBlock]:
        """The rows ``start .. stop`` in order; several threads may read at once."""
        blocks = self.matrix.blocks(start, stop)
        while True:
            with reading(self.name):
                block = next(blocks, None)
            if block is None:
                return
            yield block

    def advice(self) -> str:
        """Where else in the source counts are."""
        return self.find_advice()

    def close(self) -> None:
        """Let go of files."""
        self.matrix.close()
        self.close_files()


def looks_like_counts(matrix: Matrix, name: str) -> bool:
    """Whether the first values of a matrix are whole and not negative; one that cannot be read is no advice."""
    try:
        with reading(name):
            numbers = matrix.head(HEAD_VALUES).values.astype(np.float64)
    except (InputError, OSError):
        return False
    return bool(np.isfinite(numbers).all() and (numbers >= 0).all() and (numbers == np.floor(numbers)).all())


def refuse_raw(name: str, use_raw: bool, instead: str) -> None:
    """Refuse ``--use-raw`` for a format that has no ``raw``; ``instead`` is what to do, as in "leave it out"."""
    if use_raw:
        raise InputError(f"{name} has no raw, which is anndata's: leave --use-raw out{instead}")
