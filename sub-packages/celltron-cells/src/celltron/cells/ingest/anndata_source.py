"""What anndata stores, in HDF5 or zarr alike, as a source of counts: one matrix, its genes and its cells."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from celltron.cells.ingest.anndata_frame import AnndataFrame, is_array
from celltron.cells.ingest.anndata_matrix import Matrix, open_matrix
from celltron.cells.ingest.damage import reading
from celltron.cells.ingest.row_arrays import RowArray
from celltron.cells.ingest.source import HEAD_VALUES, Frame, ObsmArray, RowBlock, SourceOptions
from celltron.core import InputError


class AnndataSource:
    """An open file or store and the matrix in it that holds the counts; see `celltron.cells.ingest.source.Source`.

    ``obsm_notes`` says of each array of obsm that is not in ``obsm`` why.

    Args:
        name: the path or address by which the user knows it.
        root: its root group, of h5py or zarr.
        open_array: how an array of it is read.
        identity: what changes when the source does.
        close: lets go of its files.
    """

    def __init__(
        self,
        name: str,
        root: Any,
        options: SourceOptions,
        open_array: Callable[[Any], RowArray],
        *,
        identity: Callable[[], dict[str, Any]],
        close: Callable[[], None],
    ) -> None:
        self.name = name
        self._root, self._open_array, self._identity, self._close = root, open_array, identity, close
        with reading(name):
            self.matrix_name, var_name = _matrix_name(name, root, options)
            self._matrix: Matrix = open_matrix(root[self.matrix_name], name, open_array)
            self.shape = self._matrix.shape
            self.obs: Frame = AnndataFrame(root["obs"], name)
            self.var: Frame = AnndataFrame(root[var_name], name)
            self._check_shape(var_name)
            self.obsm_notes: dict[str, str] = {}
            self.obsm: Mapping[str, ObsmArray] = self._find_obsm()

    def _check_shape(self, var_name: str) -> None:
        cells, genes = self.obs.num_rows, self.var.num_rows
        if self.shape != (cells, genes):
            raise InputError(
                f"{self.name} is damaged: {self.matrix_name} is {self.shape[0]} x {self.shape[1]}, "
                f"but obs names {cells} cells and {var_name} {genes} genes; write it again with anndata"
            )
        if cells == 0 or genes == 0:
            raise InputError(
                f"{self.name} holds {cells} cells and {genes} genes: nothing to convert, leave the file out"
            )

    def _find_obsm(self) -> dict[str, ObsmArray]:
        found: dict[str, ObsmArray] = {}
        for key in _names(self._root, "obsm"):
            node = self._root["obsm"][key]
            if not is_array(node) or node.ndim != 2 or node.dtype.kind not in "iufb":
                self.obsm_notes[key] = "no dense array of numbers with a row a cell"
            elif node.shape[0] == self.shape[0]:
                found[key] = self._open_array(node)
            else:
                self.obsm_notes[key] = f"{node.shape[0]} rows for {self.shape[0]} cells"
        return found

    def identity(self) -> dict[str, Any]:
        """What changes when the source does: bytes, time of change, ETag."""
        return self._identity()

    def prepare(self, scratch: Path) -> None:
        """Deal out into rows, in the folder ``scratch``, what is ordered by genes."""
        with reading(self.name):
            self._matrix.prepare(scratch, self._identity() | {"matrix": self.matrix_name})

    def head(self, num_values: int) -> RowBlock:
        """About ``num_values`` stored values from the beginning, as rows."""
        with reading(self.name):
            return self._matrix.head(num_values)

    def blocks(self, start: int, stop: int) -> Iterator[RowBlock]:
        """The rows ``start .. stop`` in order; several threads may read at once."""
        blocks = self._matrix.blocks(start, stop)
        while True:
            with reading(self.name):
                block = next(blocks, None)
            if block is None:
                return
            yield block

    def advice(self) -> str:
        """The other matrices whose first values are whole and not negative, as options: ``--layer counts``."""
        options = {"X": "X (leave --layer and --use-raw out)"}
        options |= {f"layers/{name}": f"--layer {name}" for name in _names(self._root, "layers")}
        options |= {"raw/X": "--use-raw", "raw.X": "--use-raw"}
        return " or ".join(option for name, option in options.items() if self._holds_counts(name))

    def _holds_counts(self, name: str) -> bool:
        if name == self.matrix_name or name not in self._root:
            return False
        try:
            with reading(self.name):
                values = open_matrix(self._root[name], self.name, self._open_array).head(HEAD_VALUES).values
        except (InputError, OSError):
            return False  # an unreadable matrix is no advice
        numbers = values.astype(np.float64)
        return bool(np.isfinite(numbers).all() and (numbers >= 0).all() and (numbers == np.floor(numbers)).all())

    def close(self) -> None:
        """Let go of files."""
        self._matrix.close()
        self._close()


def _matrix_name(name: str, root: Any, options: SourceOptions) -> tuple[str, str]:
    """The paths of the wanted matrix and of its var."""
    if options.layer is not None and options.use_raw:
        raise InputError(f"both --layer {options.layer} and --use-raw were asked of {name}: choose one of them")
    layers = _names(root, "layers")
    if options.use_raw:
        for matrix, var in (("raw/X", "raw/var"), ("raw.X", "raw.var")):
            if matrix in root and var in root:
                return matrix, var
        there = f" or pass --layer NAME (it has {', '.join(layers)})" if layers else ""
        raise InputError(f"{name} has no raw: leave --use-raw out{there}")
    if options.layer is not None:
        if options.layer not in layers:
            there = f"it has {', '.join(layers)}" if layers else "it has none"
            raise InputError(
                f"{name} has no layer {options.layer!r}: {there}; name one of these or leave layer out for X"
            )
        return f"layers/{options.layer}", "var"
    if "X" not in root or (is_array(root["X"]) and root["X"].shape in (None, ())):
        ways = [f"--layer {layer}" for layer in layers] + ["--use-raw"] * _has_raw(root)
        raise InputError(f"{name} has no X: pass {' or '.join(ways) if ways else 'a file that holds counts'}")
    return "X", "var"


def _has_raw(root: Any) -> bool:
    return "raw/X" in root or "raw.X" in root


def _names(root: Any, group: str) -> list[str]:
    return sorted(root[group].keys()) if group in root and not is_array(root[group]) else []
