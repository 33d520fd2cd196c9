"""Values of genes, more of them than fit in memory: held in runs that are ordered by gene, and found by their rank.

G genes. Values are positive and finite, float64. They come in any order and from several threads. When 2^22 have come
they are ordered by gene, which makes a run: offsets int64 [G+1], then the values. Runs stay in memory up to 2^25 values
and go to a scratch file beyond, which has no name, so that it is gone when the process ends, however it ends. In a run
the values of neighbouring genes lie together, so that as many genes as fit in memory are read at once.
"""

import errno
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from celltron.cells.compiled import compiled
from celltron.cells.threads import map_in_order
from celltron.core import InputError

RUN_VALUES = 2**22
VALUES_IN_MEMORY = 2**25
DIGIT_BITS = 16

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]


class _Run(Protocol):
    """Values ordered by gene."""

    def read(self, first: int, last: int) -> tuple[Int64Array, Float64Array]:
        """The genes ``first`` to ``last - 1``: where each begins, and where the last one ends; their values."""


class _RunInMemory(NamedTuple):
    offsets: Int64Array
    values: Float64Array

    def read(self, first: int, last: int) -> tuple[Int64Array, Float64Array]:
        offsets = self.offsets[first : last + 1]
        return offsets - offsets[0], self.values[offsets[0] : offsets[-1]]


class _RunOnDisk(NamedTuple):
    descriptor: int
    begin: int
    """Where the offsets are, in bytes."""
    num_genes: int

    def read(self, first: int, last: int) -> tuple[Int64Array, Float64Array]:
        offsets = np.empty(last - first + 1, dtype=np.int64)
        _read_at(self.descriptor, self.begin + 8 * first, offsets)
        values = np.empty(offsets[-1] - offsets[0], dtype=np.float64)
        _read_at(self.descriptor, self.begin + 8 * (self.num_genes + 1 + int(offsets[0])), values)
        return offsets - offsets[0], values


def _bytes_of(array: npt.NDArray[Any]) -> memoryview:
    return array.data.cast("B") if array.size else memoryview(b"")


def _read_at(descriptor: int, begin: int, array: npt.NDArray[Any]) -> None:
    """Fill an array from a file; the calls of several threads do not meet."""
    left = _bytes_of(array)
    while left:
        num_bytes = os.preadv(descriptor, [left], begin)
        assert num_bytes > 0, f"the scratch file ends before {begin}"
        left, begin = left[num_bytes:], begin + num_bytes


@compiled
def _deal(genes: npt.NDArray[np.uint32], values: Float64Array, ends: Int64Array, dealt: Float64Array) -> None:
    """Put each value where its gene's values end so far."""
    for i in range(genes.shape[0]):
        gene = genes[i]
        dealt[ends[gene]] = values[i]
        ends[gene] += 1


@compiled
def _deal_run(offsets: Int64Array, values: Float64Array, ends: Int64Array, dealt: Float64Array) -> None:
    """Put the values of a run, gene by gene, where each gene's values end so far."""
    for gene in range(ends.shape[0]):
        size = offsets[gene + 1] - offsets[gene]
        dealt[ends[gene] : ends[gene] + size] = values[offsets[gene] : offsets[gene + 1]]
        ends[gene] += size


class ValueRuns:
    """Collects values of G genes, then gives those of wanted ranks; for use in a ``with``.

    Args:
        num_genes: G.
        scratch: folder for the scratch file; None takes the system's, which the variable TMPDIR names.
    """

    def __init__(self, num_genes: int, scratch: str | Path | None = None) -> None:
        self.file_bytes = 0
        self._num_values = np.zeros(num_genes, dtype=np.int64)
        self._scratch = Path(scratch) if scratch is not None else Path(tempfile.gettempdir())
        if not self._scratch.is_dir():
            raise InputError(f"there is no folder {self._scratch} for scratch: make it or name another")
        self._file: IO[bytes] | None = None
        self._runs: list[_Run] = []
        self._pieces: list[tuple[npt.NDArray[np.uint32], Float64Array]] = []
        self._in_pieces = self._in_memory = 0
        self._lock = threading.Lock()

    def __enter__(self) -> "ValueRuns":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, genes: npt.NDArray[np.uint32], values: Float64Array) -> None:
        """Add values and the gene of each; the arrays are kept for a while."""
        with self._lock:
            self._pieces.append((genes, values))
            self._in_pieces += len(values)
            if self._in_pieces >= RUN_VALUES:
                self._make_run()

    def counts(self) -> Int64Array:
        """How many values each gene has, int64 [G]."""
        with self._lock:
            if self._in_pieces:
                self._make_run()
        return self._num_values

    def _make_run(self) -> None:
        """Order what has come by gene; the lock is held."""
        offsets = np.zeros(len(self._num_values) + 1, dtype=np.int64)
        for genes, _ in self._pieces:
            offsets[1:] += np.bincount(genes, minlength=len(self._num_values))
        self._num_values += offsets[1:]
        np.cumsum(offsets, out=offsets)
        values, ends = np.empty(self._in_pieces, dtype=np.float64), offsets[:-1].copy()
        for piece in self._pieces:
            _deal(*piece, ends, values)
        self._pieces, self._in_pieces = [], 0
        self._runs.append(_RunInMemory(offsets, values))
        self._in_memory += len(values)
        if self._in_memory > VALUES_IN_MEMORY:
            self._move_to_disk()

    def _move_to_disk(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._scratch, buffering=0)
        for i, run in enumerate(self._runs):
            if isinstance(run, _RunInMemory):
                begin = self.file_bytes
                self._write(run.offsets)
                self._write(run.values)
                self._runs[i] = _RunOnDisk(self._file.fileno(), begin, len(self._num_values))
        # With a file there is no use in keeping some: all memory is there for the genes that are read at once.
        self._in_memory = VALUES_IN_MEMORY

    def _write(self, array: npt.NDArray[Any]) -> None:
        assert self._file is not None
        left = _bytes_of(array)
        try:
            while left:
                num_bytes = os.write(self._file.fileno(), left)
                left, self.file_bytes = left[num_bytes:], self.file_bytes + num_bytes
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InputError(
                f"{self._scratch} is full: {self.file_bytes / 1e9:,.1f} GB of values were written there so far; free "
                "some space, or name another folder by scratch or the variable TMPDIR"
            ) from error

    def select(self, low: Int64Array, high: Int64Array, workers: int) -> Float64Array:
        """The values of two ranks of each gene, 0 for its smallest value.

        Args:
            low: int64 [G], the first rank; -1 for a gene that is not asked for.
            high: int64 [G], the second rank, the same or higher.
            workers: threads.

        Returns:
            float64 [G, 2]; NaN for genes that are not asked for.
        """
        num_values = self.counts()
        selected = np.full((len(num_values), 2), np.nan)
        limit = max(1, (RUN_VALUES if self._file is None else VALUES_IN_MEMORY) // workers)

        def select_some(bounds: tuple[int, int]) -> None:
            first, last = bounds
            if num_values[first:last].sum() > limit:
                ranks = [int(low[first]), int(high[first])] if low[first] >= 0 else []
                selected[first, : len(ranks)] = [_stream_rank(lambda: self._pieces_of(first), rank) for rank in ranks]
                return
            offsets, values = self._gather(first, last)
            for gene in range(first, last):
                if low[gene] >= 0:
                    own = values[offsets[gene - first] : offsets[gene - first + 1]]
                    own.partition((low[gene], high[gene]))
                    selected[gene] = own[low[gene]], own[high[gene]]

        for _ in map_in_order(select_some, _cut_genes(num_values, limit), workers):
            pass
        return selected

    def _gather(self, first: int, last: int) -> tuple[Int64Array, Float64Array]:
        """The values of some genes, of all runs: where each gene begins, and the last one ends; the values."""
        offsets = np.concatenate([[0], np.cumsum(self._num_values[first:last])])
        values, ends = np.empty(offsets[-1], dtype=np.float64), offsets[:-1].copy()
        for run in self._runs:
            _deal_run(*run.read(first, last), ends, values)
        return offsets, values

    def _pieces_of(self, gene: int) -> Iterator[Float64Array]:
        for run in self._runs:
            yield run.read(gene, gene + 1)[1]


def _cut_genes(num_values: Int64Array, limit: int) -> list[tuple[int, int]]:
    """Cut genes into stretches ``(first, last + 1)`` of at most ``limit`` values, or of one gene."""
    ends = np.concatenate([[0], np.cumsum(num_values)])
    bounds = [0]
    while bounds[-1] < len(num_values):
        stop = int(np.searchsorted(ends, ends[bounds[-1]] + limit, side="right")) - 1
        bounds.append(max(stop, bounds[-1] + 1))
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def _stream_rank(pieces: Callable[[], Iterator[Float64Array]], rank: int) -> float:
    """The value of a rank among more values than fit in memory, found 16 bits at a time.

    The bits of positive floating-point numbers order as the numbers do.
    """
    leading = 0
    for shift in range(64 - DIGIT_BITS, -1, -DIGIT_BITS):
        histogram = np.zeros(1 << DIGIT_BITS, dtype=np.int64)
        for piece in pieces():
            bits = piece.view(np.uint64)
            if shift + DIGIT_BITS < 64:
                bits = bits[bits >> np.uint64(shift + DIGIT_BITS) == leading]
            digits = (bits >> np.uint64(shift)) & np.uint64((1 << DIGIT_BITS) - 1)
            histogram += np.bincount(digits.astype(np.int64), minlength=len(histogram))
        ends = np.cumsum(histogram)
        digit = int(np.searchsorted(ends, rank, side="right"))
        rank -= int(ends[digit] - histogram[digit])
        leading = leading << DIGIT_BITS | digit
    return float(np.uint64(leading).view(np.float64))
