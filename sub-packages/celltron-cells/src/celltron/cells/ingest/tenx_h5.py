"""A Cell Ranger .h5 file of counts, of version 3 and later or of those before, as a source."""

from typing import Any

import h5py

from celltron.cells.ingest.anndata_matrix import CsrMatrix
from celltron.cells.ingest.damage import damaged, reading
from celltron.cells.ingest.hdf5_arrays import open_array
from celltron.cells.ingest.hdf5_file import Hdf5File, open_hdf5
from celltron.cells.ingest.hdf5_frame import DatasetFrame
from celltron.cells.ingest.matrix_source import MatrixSource, refuse_raw
from celltron.cells.ingest.source import SourceOptions
from celltron.cells.ingest.tenx_features import Features, choose_genome, keep_columns, select_genes
from celltron.core import InputError

PARTS = ("barcodes", "data", "indices", "indptr", "shape")
COLUMNS = ("id", "name", "feature_type", "genome")


def open_tenx_h5(spec: str, options: SourceOptions) -> MatrixSource:
    """Open a matrix of Cell Ranger such as ``filtered_feature_bc_matrix.h5``.

    The matrix is stored genes x cells by columns, so that rows of cells are read as they lie. Of several genomes
    ``options.layer`` names the one to take; features other than genes are left out, see `select_genes`.

    Source: "Feature-Barcode Matrices in HDF5", the Cell Ranger documentation.
    """
    hdf5 = open_hdf5(spec, options.storage)
    try:
        refuse_raw(hdf5.name, options.use_raw, "")
        with reading(hdf5.name):
            return _open(hdf5, options.layer)
    except BaseException:
        hdf5.close()
        raise


def _open(hdf5: Hdf5File, genome: str | None) -> MatrixSource:
    group, features, genome = _find(hdf5, genome)
    num_features, num_cells = (int(size) for size in group["shape"][()])
    var, places = select_genes(features, genome, hdf5.name)
    name = str(group.name).lstrip("/")
    arrays = [open_array(group[part], hdf5.bytes) for part in ("indptr", "indices", "data")]
    if arrays[2].dtype.kind not in "iuf":
        raise damaged(hdf5.name, f"{name}/data does not hold numbers")
    matrix = CsrMatrix(arrays[0], arrays[1], arrays[2], (num_cells, num_features), (hdf5.name, name))
    return MatrixSource(
        name=hdf5.name,
        matrix_name=name,
        matrix=keep_columns(matrix, places, hdf5.name),
        obs=DatasetFrame(hdf5.name, num_cells, group["barcodes"], {}),
        var=var,
        find_identity=lambda: dict(hdf5.identity),
        close_files=hdf5.close,
    )


def _find(hdf5: Hdf5File, genome: str | None) -> tuple[h5py.Group, Features, str | None]:
    """The group of the matrix, its features, and of which genome genes are still to be chosen from these."""
    root = hdf5.root
    if _is_matrix(root.get("matrix"), "features"):
        group = root["matrix"]
        listed = group["features"]
        texts = [_texts(listed[part], hdf5.name) if part in listed else [] for part in COLUMNS]
        features = Features(ids=texts[0], names=texts[1], types=texts[2], genomes=texts[3])
        return group, _same_lengths(features, hdf5.name), genome
    groups = {name: root[name] for name in root if _is_matrix(root.get(name), "genes")}
    if not groups:
        raise InputError(
            f"{hdf5.name} is HDF5 but holds no matrix of Cell Ranger: wanted a file such as "
            f"filtered_feature_bc_matrix.h5{_instead_of_molecules(root)}"
        )
    chosen = choose_genome(sorted(groups), genome, hdf5.name)
    group = groups[chosen]
    features = Features(ids=_texts(group["genes"], hdf5.name), names=_texts(group["gene_names"], hdf5.name))
    return group, _same_lengths(features, hdf5.name), None


def _is_matrix(node: Any, genes: str) -> bool:
    return isinstance(node, h5py.Group) and all(part in node for part in (*PARTS, genes))


def _instead_of_molecules(root: h5py.File) -> str:
    return ", not a list of molecules" if "barcode_idx" in root or "molecule_info" in root else ""


def _texts(dataset: h5py.Dataset, name: str) -> list[str]:
    texts: list[str] = DatasetFrame(name, dataset.size, dataset, {}).index().to_pylist()
    return texts


def _same_lengths(features: Features, name: str) -> Features:
    lengths = {len(features.ids), len(features.names)}
    lengths |= {len(texts) for texts in (features.types, features.genomes) if texts}
    if len(lengths) > 1:
        raise damaged(name, f"its lists of features have the lengths {sorted(lengths)}")
    return features
