"""A loom file, of version 2 or 3, as a source of counts.

Source: the Loom file format specification, https://linnarssonlab.org/loompy/format
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from celltron.cells.ingest.anndata_matrix import DenseMatrix
from celltron.cells.ingest.damage import damaged, reading
from celltron.cells.ingest.hdf5_arrays import open_array
from celltron.cells.ingest.hdf5_file import Hdf5File, open_hdf5
from celltron.cells.ingest.hdf5_frame import DatasetFrame, is_plain
from celltron.cells.ingest.matrix_source import MatrixSource, looks_like_counts, refuse_raw
from celltron.cells.ingest.row_arrays import RowArray
from celltron.cells.ingest.source import ObsmArray, RowBlock, SourceOptions
from celltron.core import InputError

CELL_NAMES = ("CellID", "obs_names", "cell_id", "cell_names", "barcode", "Barcode", "index")
GENE_NAMES = ("Accession", "ensembl_id", "gene_id", "gene_ids", "var_names", "Gene", "gene_name", "gene_names", "index")
UNICODE_SINCE = (3,)
"""Before this version texts are ASCII with the entities of XML."""


def open_loom(spec: str, options: SourceOptions) -> MatrixSource:
    """Open ``/matrix``, or the layer that ``options.layer`` names.

    The matrix is stored genes x cells and not by rows; a block of cells is a run of whole chunks across all genes, and
    what lies otherwise is dealt out into rows first. Cells are named by the first of `CELL_NAMES` that there is, and
    numbered without one, genes likewise by `GENE_NAMES`; all other attributes of numbers or texts, and the format knows
    no others, stay columns. Attributes with several numbers a cell, such as an embedding, are arrays of ``obsm``.
    """
    hdf5 = open_hdf5(spec, options.storage)
    try:
        refuse_raw(hdf5.name, options.use_raw, _instead(hdf5.root))
        with reading(hdf5.name):
            return _open(hdf5, options.layer)
    except BaseException:
        hdf5.close()
        raise


def _instead(root: h5py.File) -> str:
    layers = _nodes(root, "layers")
    return f" or pass --layer NAME (it has {', '.join(layers)})" if layers else ""


def _open(hdf5: Hdf5File, layer: str | None) -> MatrixSource:
    root = hdf5.root
    if not isinstance(root.get("matrix"), h5py.Dataset) or "row_attrs" not in root or "col_attrs" not in root:
        raise InputError(f"{hdf5.name} is HDF5 but no loom file (it lacks matrix, row_attrs or col_attrs)")
    layers = _nodes(root, "layers")
    if layer is not None and layer not in layers:
        there = f"it has {', '.join(layers)}" if layers else "it has none"
        raise InputError(f"{hdf5.name} has no layer {layer!r}: {there}; name one of these or leave --layer out")
    name = "matrix" if layer is None else f"layers/{layer}"
    num_genes, num_cells = root["matrix"].shape if root["matrix"].ndim == 2 else (0, 0)
    columns, rows = _nodes(root, "col_attrs"), _nodes(root, "row_attrs")
    return MatrixSource(
        name=hdf5.name,
        matrix_name=name,
        matrix=_matrix(hdf5, name),
        obs=_frame(hdf5, columns, num_cells, CELL_NAMES),
        var=_frame(hdf5, rows, num_genes, GENE_NAMES),
        find_identity=lambda: dict(hdf5.identity),
        obsm=_obsm(hdf5, columns, num_cells),
        find_advice=lambda: _advice(hdf5, name, layers),
        close_files=hdf5.close,
    )


def _nodes(root: h5py.File, group: str) -> dict[str, h5py.Dataset]:
    node = root.get(group)
    if not isinstance(node, h5py.Group):
        return {}
    return {name: node[name] for name in sorted(node) if isinstance(node.get(name), h5py.Dataset)}


def _frame(hdf5: Hdf5File, nodes: Mapping[str, h5py.Dataset], num_rows: int, names: Sequence[str]) -> DatasetFrame:
    columns = {name: node for name, node in nodes.items() if node.ndim == 1 and is_plain(node)}
    index = next((columns.pop(name) for name in names if name in columns), None)
    is_old = _version(hdf5.root) < UNICODE_SINCE
    return DatasetFrame(hdf5.name, num_rows, index, columns, _without_entities if is_old else None)


def _version(root: h5py.File) -> tuple[int, ...]:
    """The version of the format, which version 3 keeps in a dataset and those before in an attribute."""
    there = root.get("attrs/LOOM_SPEC_VERSION")
    found = there[()] if isinstance(there, h5py.Dataset) else root.attrs.get("LOOM_SPEC_VERSION", b"2")
    text = found.decode("ascii", "replace") if isinstance(found, bytes) else str(found)
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _without_entities(texts: pa.Array) -> pa.Array:
    words = [None if word is None else html.unescape(word) for word in texts.to_pylist()]
    return pa.array(words, type=pa.string())


def _obsm(hdf5: Hdf5File, nodes: Mapping[str, h5py.Dataset], num_cells: int) -> dict[str, ObsmArray]:
    wide = {name: node for name, node in nodes.items() if node.ndim == 2 and node.dtype.kind in "iufb"}
    return {name: open_array(node, hdf5.bytes) for name, node in wide.items() if node.shape[0] == num_cells}


class _Turned:
    """An array [K, C] as one of [C, K]."""

    def __init__(self, array: RowArray) -> None:
        self.shape: tuple[int, ...] = array.shape[::-1]
        self.dtype = array.dtype
        self._array = array

    def __getitem__(self, part: Any, /) -> npt.NDArray[Any]:
        """A run of rows (a slice), or of rows and columns (two slices)."""
        rows, columns = part if isinstance(part, tuple) else (part, slice(None))
        return np.ascontiguousarray(self._array[columns, rows].T)


class _GeneMajor(DenseMatrix):
    """A dense matrix whose head, where its chunks are tall, is that of its first genes: of all it is the whole file."""

    def head(self, num_values: int) -> RowBlock:
        """The first rows; where these cut all chunks, all rows of the first genes."""
        if not self._is_tall:
            return super().head(num_values)
        cells, genes, values = next(self._tiles())
        ends = np.cumsum(np.bincount(cells, minlength=1))
        return RowBlock(start=0, indptr=np.concatenate([[0], ends]), columns=genes, values=values)


def _matrix(hdf5: Hdf5File, name: str) -> _GeneMajor:
    dataset = hdf5.root[name]
    if dataset.ndim != 2 or dataset.dtype.kind not in "iufb":
        raise damaged(hdf5.name, f"{name} is no matrix of numbers (shape {dataset.shape}, type {dataset.dtype})")
    # What lies flat lies by genes: like chunks as long as a row and one gene high.
    chunks = dataset.chunks or (1, dataset.shape[1])
    return _GeneMajor(_Turned(open_array(dataset, hdf5.bytes)), chunks[::-1], (hdf5.name, name))


def _advice(hdf5: Hdf5File, chosen: str, layers: Mapping[str, h5py.Dataset]) -> str:
    options = {"matrix": "matrix (leave --layer out)"} | {f"layers/{layer}": f"--layer {layer}" for layer in layers}
    found = []
    for name, option in options.items():
        if name != chosen and looks_like_counts(_matrix(hdf5, name), hdf5.name):
            found.append(option)
    return " or ".join(found)
