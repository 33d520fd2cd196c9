"""An .h5ad file, here or behind an address, as a source of counts."""

from celltron.cells.ingest.anndata_source import AnndataSource
from celltron.cells.ingest.hdf5_arrays import open_array
from celltron.cells.ingest.hdf5_file import open_hdf5
from celltron.cells.ingest.source import SourceOptions
from celltron.core import InputError


def open_h5ad(spec: str, options: SourceOptions) -> AnndataSource:
    """Open an .h5ad file read-only and find the wanted matrix: ``X``, a layer, or ``raw`` with its own genes."""
    hdf5 = open_hdf5(spec, options.storage)
    try:
        if "obs" not in hdf5.root or "var" not in hdf5.root:
            raise InputError(
                f"{hdf5.name} is HDF5 but not an .h5ad file (it has no obs and var): write it with anndata's write_h5ad"
            )
        return AnndataSource(
            hdf5.name,
            hdf5.root,
            options,
            lambda node: open_array(node, hdf5.bytes),
            identity=lambda: dict(hdf5.identity),
            close=hdf5.close,
        )
    except BaseException:
        hdf5.close()
        raise
