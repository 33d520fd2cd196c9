"""What every source of counts can do, whatever its file format: one matrix of counts, its genes and its cells.

R rows (cells) and N stored values of a block, K columns (genes) of the source.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

BLOCK_VALUES = 2**19
"""A block of rows holds about so many stored values, or one row: memory does not grow with the source."""
HEAD_VALUES = 50_000
"""How many stored values are looked at before a conversion begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBlock:
    """Rows of a matrix from ``start`` on: ``indptr`` int64 [R+1], from 0; ``columns`` and ``values`` [N].

    Columns may come in any order and more than once (they add up); explicit zeros may be there.
    """

    start: int
    indptr: npt.NDArray[np.int64]
    columns: npt.NDArray[np.integer]
    values: npt.NDArray[np.generic]


class Frame(Protocol):
    """A table (obs or var) read column by column in runs of rows, as arrow arrays; see `AnndataFrame`, `ArrowFrame`."""

    num_rows: int
    notes: dict[str, str]
    """Columns that were turned into text, and why."""

    @property
    def columns(self) -> list[str]:
        """The column names, the row names left out."""

    def index(self, start: int = 0, stop: int | None = None) -> pa.Array:
        """The row names as text."""

    def column(self, name: str, start: int = 0, stop: int | None = None) -> pa.Array:
        """A run of one column: numbers, truth values, text, or dictionaries (int32 -> text) for categories."""


class ObsmArray(Protocol):
    """One array of obsm: ``shape`` [C, D], rows read by slicing."""

    shape: tuple[int, ...]

    def __getitem__(self, rows: slice, /) -> npt.NDArray[Any]:
        """Rows ``start .. stop`` as a dense array."""


class Source(Protocol):
    """An open source. After `prepare`, `blocks` may be called from several threads at once."""

    name: str
    """The path or address by which the user knows it."""
    matrix_name: str
    """Where in it the counts are, such as ``layers/counts``."""
    shape: tuple[int, int]
    """Cells and genes, both above zero."""
    obs: Frame
    var: Frame
    obsm: Mapping[str, ObsmArray]

    def identity(self) -> dict[str, Any]:
        """What changes when the source does (bytes, time of change, ETag): a conversion goes on only if it agrees."""

    def prepare(self, scratch: Path) -> None:
        """Make rows readable where the format is ordered otherwise (by genes, as text): fills the folder ``scratch``.

        Called once, before `blocks`, with a folder of its own for this source, that may not exist yet. What an earlier,
        complete call left there is used again; what a broken-off one left is made anew. Formats that are ordered by
        cells do nothing.
        """

    def head(self, num_values: int) -> RowBlock:
        """About ``num_values`` stored values from the beginning of the source, as rows; works before `prepare`."""

    def blocks(self, start: int, stop: int) -> Iterator[RowBlock]:
        """The rows ``start .. stop`` in order, in blocks of about `BLOCK_VALUES` stored values."""

    def advice(self) -> str:
        """Where else in the source whole, not negative counts are, as options, such as ``--layer counts``; or empty."""

    def close(self) -> None:
        """Let go of files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceOptions:
    """What to take from a source."""

    layer: str | None = None
    """Layer that holds the counts; None takes the main matrix."""
    use_raw: bool = False
    """Read ``raw``, which has its own genes."""
    storage: Mapping[str, Any] | None = None
    """Options for fsspec's file system of a remote source."""


class ArrowFrame:
    """A table held in memory; row names and columns as arrow arrays of one length."""

    def __init__(self, index: pa.Array, columns: Mapping[str, pa.Array], notes: dict[str, str] | None = None) -> None:
        self.num_rows = len(index)
        self.notes = dict(notes or {})
        self._index = index
        self._columns = dict(columns)

    @property
    def columns(self) -> list[str]:
        """The column names."""
        return list(self._columns)

    def index(self, start: int = 0, stop: int | None = None) -> pa.Array:
        """The row names as text."""
        return self._index[start:stop]

    def column(self, name: str, start: int = 0, stop: int | None = None) -> pa.Array:
        """A run of one column."""
        return self._columns[name][start:stop]
