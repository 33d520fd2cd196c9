"""A matrix of genes x cells as MatrixMarket text, read once and kept as rows of cells in a scratch folder.

C cells, K genes (features), N stored values; the text has a line ``gene cell value`` for each, counted from 1.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from celltron.cells.ingest.anndata_matrix import CsrMatrix
from celltron.cells.ingest.damage import reading
from celltron.cells.ingest.mtx_text import Entries, parse_entries
from celltron.cells.ingest.row_arrays import FlatArray, LocalFile
from celltron.cells.ingest.row_order import MATRIX, RUN_VALUES, Triples, deal_rows, open_dealt, order_triples
from celltron.cells.ingest.source import RowBlock
from celltron.cells.threads import map_in_order
from celltron.core import InputError, write_atomically
from celltron.core.durable import name_file_in_errors

TEXT_BYTES = 2**22
"""Text parsed at once."""
LINE_BYTES = 40
"""Room for one line where a number of them is wanted."""
LONGEST_LINE = 2**20
MARKER = "complete.json"
INDEX = np.dtype(np.int32)
VALUE = np.dtype(np.float64)
"""Whole numbers up to 2^53 are exact in it; larger ones are refused as counts in any case."""
FIELDS = ("integer", "real", "double", "unsigned-integer")


class _Chunk(NamedTuple):
    """Whole lines of text, and how many lines come before them."""

    text: bytes
    lines_before: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The size line of a matrix and how many lines there are up to it."""

    num_genes: int
    num_cells: int
    num_values: int
    num_lines: int


class MtxMatrix:
    """The counts of a MatrixMarket file as rows of cells; see `celltron.cells.ingest.anndata_matrix.Matrix`.

    Args:
        name: the file, for messages.
        open_text: opens its text, unpacked.
        shape: how many cells and genes are named beside it.
    """

    def __init__(self, name: str, open_text: Callable[[], BinaryIO], shape: tuple[int, int]) -> None:
        self.shape = shape
        self._name, self._open_text = name, open_text
        with reading(name), open_text() as stream:
            self._header = _read_header(stream, name)
        self._check_shape()
        self._rows: CsrMatrix | None = None
        self._files: list[LocalFile] = []

    def _check_shape(self) -> None:
        cells, genes = self.shape
        there = (self._header.num_cells, self._header.num_genes)
        if there == (genes, cells) != (cells, genes):
            raise InputError(f"{self._name} is cells x genes, wanted genes x cells as Cell Ranger writes: transpose it")
        if there != (cells, genes):
            raise InputError(
                f"{self._name} is {there[1]} genes x {there[0]} cells, but the files beside it name {genes} and "
                f"{cells}: copy all of them again"
            )

    def prepare(self, scratch: Path, identity: dict[str, Any]) -> None:
        """Write the values as rows into ``scratch``, unless they are there: 12 bytes each, 4 to 20 more meanwhile."""
        marker = _read_marker(scratch, identity)
        if marker is None:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            is_sorted = self._write_values(scratch)
            if not is_sorted:
                self._deal(scratch, identity)
            marker = _write_marker(scratch, identity, is_sorted=is_sorted)
        self._rows = CsrMatrix(*self._open_rows(scratch, marker["sorted"]), self.shape, (str(scratch), "its matrix"))

    def blocks(self, start: int, stop: int) -> Iterator[RowBlock]:
        """The rows ``start .. stop`` in order."""
        assert self._rows is not None, "prepare comes before blocks"
        return self._rows.blocks(start, stop)

    def head(self, num_values: int) -> RowBlock:
        """The first lines; in a file ordered by cells without the last cell, which may be cut."""
        with reading(self._name), self._open_text() as stream:
            _read_header(stream, self._name)
            text = _whole_lines(stream, num_values * LINE_BYTES)
        entries = self._parse(_Chunk(text, self._header.num_lines))
        genes, cells, values = entries.genes[:num_values], entries.cells[:num_values], entries.values[:num_values]
        num_rows = int(cells.max(initial=0)) + 1
        if num_rows > 1 and len(cells) < self._header.num_values and np.all(cells[1:] >= cells[:-1]):
            num_rows -= 1
            is_whole = cells < num_rows
            genes, cells, values = genes[is_whole], cells[is_whole], values[is_whole]
        rows = np.arange(num_rows, dtype=np.int32)
        indptr, (_, genes, values) = order_triples(cells, genes, values, rows, num_rows)
        return RowBlock(start=0, indptr=indptr, columns=genes, values=values)

    def close(self) -> None:
        """Close the files in the scratch folder."""
        for file in self._files:
            file.close()

    def _parse(self, chunk: _Chunk) -> Entries:
        return parse_entries(chunk.text, self.shape, self._name, chunk.lines_before)

    def _chunks(self) -> Iterator[_Chunk]:
        with reading(self._name), self._open_text() as stream:
            num_lines = _read_header(stream, self._name).num_lines
            while text := _whole_lines(stream, TEXT_BYTES):
                check_end(text, self._name)
                yield _Chunk(text, num_lines)
                num_lines += text.count(b"\n")

    def _write_values(self, scratch: Path) -> bool:
        """Write genes, cells and values as they come, and if they come by cells the rows' ends; whether they do."""
        num_values, last_cell, is_sorted = 0, 0, True
        sizes = np.zeros(self.shape[0], dtype=np.int64)
        with (
            (scratch / "genes").open("wb") as genes_file,
            (scratch / "cells").open("wb") as cells_file,
            (scratch / "values").open("wb") as values_file,
        ):
            for entries in map_in_order(self._parse, self._chunks(), 2):
                genes, cells, values = entries
                _append(genes_file, genes)
                _append(cells_file, cells)
                _append(values_file, values)
                if not len(cells):
                    continue
                num_values += len(cells)
                is_sorted = is_sorted and last_cell <= cells[0] and bool(np.all(cells[1:] >= cells[:-1]))
                first, last_cell = int(cells.min()), int(cells[-1])
                counts = np.bincount(cells - first)
                sizes[first : first + len(counts)] += counts
            for file in (genes_file, cells_file, values_file):
                _sync(file)
        if num_values != self._header.num_values:
            raise InputError(
                f"{self._name} holds {num_values} values, but its head says {self._header.num_values}: it is truncated "
                "or damaged, copy or download it again"
            )
        if is_sorted:
            (scratch / "cells").unlink()
            with (scratch / "indptr").open("wb") as file:
                _append(file, np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)]))
                _sync(file)
        return is_sorted

    def _deal(self, scratch: Path, identity: dict[str, Any]) -> None:
        """Bring values that come in another order into rows."""
        num_values = self._header.num_values
        dtypes: dict[str, np.dtype[Any]] = {"cells": INDEX, "genes": INDEX, "values": VALUE}
        files = [LocalFile(scratch / name) for name in dtypes]
        arrays = [FlatArray(file, 0, kind, (num_values,)) for file, kind in zip(files, dtypes.values(), strict=True)]
        starts = range(0, num_values, RUN_VALUES)

        def triples() -> Iterator[Triples]:
            for start in starts:
                cells, genes, values = (array[start : start + RUN_VALUES] for array in arrays)
                yield cells, genes, values

        def cells() -> Iterator[npt.NDArray[Any]]:
            return (arrays[0][start : start + RUN_VALUES] for start in starts)

        try:
            deal_rows(scratch / "rows", self.shape, VALUE, identity, count=cells, triples=triples).close()
        finally:
            for file in files:
                file.close()
        for name in dtypes:
            (scratch / name).unlink()

    def _open_rows(self, scratch: Path, is_sorted: bool) -> tuple[FlatArray, FlatArray, FlatArray]:
        """``indptr`` [C+1], ``columns`` [N] and ``values`` [N]."""
        if not is_sorted:
            self._files = [LocalFile(scratch / "rows" / MATRIX)]
            return open_dealt(self._files[0], scratch / "rows")
        self._files = [LocalFile(scratch / name) for name in ("indptr", "genes", "values")]
        num_values = (self._header.num_values,)
        return (
            FlatArray(self._files[0], 0, np.dtype(np.int64), (self.shape[0] + 1,)),
            FlatArray(self._files[1], 0, INDEX, num_values),
            FlatArray(self._files[2], 0, VALUE, num_values),
        )


def _read_header(stream: BinaryIO, name: str) -> Header:
    """Read up to the size line."""
    words = stream.readline(LONGEST_LINE).decode("ascii", "replace").lower().split()
    if words[:1] != ["%%matrixmarket"] or len(words) != 5:
        raise InputError(f"{name} is no MatrixMarket file (its first line does not say so): copy it again")
    if words[1:3] != ["matrix", "coordinate"] or words[3] not in FIELDS or words[4] != "general":
        raise InputError(
            f"{name} is a MatrixMarket file of kind {' '.join(words[1:])!r}: wanted 'matrix coordinate integer "
            "general' or 'real', write it so"
        )
    num_lines = 1
    while True:
        line = stream.readline(LONGEST_LINE)
        num_lines += 1
        if line and (line.startswith(b"%") or not line.strip()):
            continue
        sizes = line.split()
        if len(sizes) != 3 or not all(size.isdigit() and len(size) <= 18 for size in sizes):
            shown = line[:60].decode("ascii", "replace").strip()
            raise InputError(f"line {num_lines} of {name} is {shown!r}: wanted genes, cells and values; copy it again")
        genes, cells, values = (int(size) for size in sizes)
        return Header(num_genes=genes, num_cells=cells, num_values=values, num_lines=num_lines)


def _whole_lines(stream: BinaryIO, num_bytes: int) -> bytes:
    """About so many bytes up to the end of a line."""
    text = stream.read(num_bytes)
    return text + stream.readline(LONGEST_LINE) if text and not text.endswith(b"\n") else text


def check_end(text: bytes, name: str) -> None:
    """Refuse text whose last line has no end: a number or name may have been cut there, and nothing else would show."""
    if not text.endswith(b"\n"):
        raise InputError(
            f"the last line of {name} has no end, so it may be truncated: copy it again, or end the line if it is whole"
        )


def _append(file: BinaryIO, array: npt.NDArray[Any]) -> None:
    with name_file_in_errors(Path(file.name)):
        file.write(np.ascontiguousarray(array).data)


def _sync(file: BinaryIO) -> None:
    with name_file_in_errors(Path(file.name)):
        file.flush()
        os.fsync(file.fileno())


def _sizes(scratch: Path) -> dict[str, int]:
    found = (path for path in scratch.rglob("*") if path.is_file() and path != scratch / MARKER)
    return {str(path.relative_to(scratch)): path.stat().st_size for path in found}


def _write_marker(scratch: Path, identity: dict[str, Any], *, is_sorted: bool) -> dict[str, Any]:
    marker = {"identity": identity, "sorted": is_sorted, "bytes": _sizes(scratch)}
    write_atomically(scratch / MARKER, json.dumps(marker))
    return marker


def _read_marker(scratch: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """What `_write_marker` left, if it still holds."""
    try:
        marker: dict[str, Any] = json.loads((scratch / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    holds = marker.get("identity") == json.loads(json.dumps(identity)) and marker.get("bytes") == _sizes(scratch)
    return marker if holds else None
