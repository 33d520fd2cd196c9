"""An HDF5 file, here or behind an address, open both for h5py and for reading its bytes."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py

from celltron.cells.ingest.damage import damaged, reading
from celltron.cells.ingest.remote import BlockReader, RemoteFile, is_address
from celltron.cells.ingest.row_arrays import ByteRanges, LocalFile
from celltron.core import InputError

CHUNK_CACHE_BYTES = 2**25  # of what is read through h5py


@dataclass(frozen=True, slots=True, kw_only=True)
class Hdf5File:
    """An open HDF5 file: ``root`` is h5py's view of it, ``bytes`` the file itself."""

    name: str
    root: h5py.File
    bytes: ByteRanges
    identity: dict[str, Any]

    def close(self) -> None:
        """Let go of the file."""
        self.root.close()
        self.bytes.close()


def open_hdf5(spec: str, storage: Mapping[str, Any] | None = None) -> Hdf5File:
    """Open an HDF5 file read-only; what is none, or a broken one, is an InputError.

    Args:
        spec: a path or an address.
        storage: options for fsspec's file system of an address.
    """
    return _open_remote(spec, storage) if is_address(spec) else _open_local(spec)


def _open_local(spec: str) -> Hdf5File:
    path = Path(spec)
    _check_path(path)
    file = LocalFile(path)
    try:
        if not h5py.is_hdf5(path):
            raise _no_hdf5(spec)
        status = os.stat(path)
        with reading(spec):
            root = h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE_BYTES, locking="best-effort")
        if status.st_size != file.size:
            raise damaged(spec, "it is being written")
    except BaseException:
        file.close()
        raise
    identity = {"bytes": status.st_size, "changed": str(status.st_mtime_ns)}
    return Hdf5File(name=spec, root=root, bytes=file, identity=identity)


def _check_path(path: Path) -> None:
    if not path.exists():
        raise InputError(f"no file at {path}: wanted an .h5ad file, check the name")
    if path.is_dir():
        raise InputError(f"{path} is a folder: wanted an .h5ad file, name the files inside it")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is an empty file of 0 bytes: wanted an .h5ad file, copy it again")


def _open_remote(spec: str, storage: Mapping[str, Any] | None) -> Hdf5File:
    file = RemoteFile(spec, storage)
    blocks = BlockReader(file)
    try:
        with reading(spec):
            root = h5py.File(blocks, "r", rdcc_nbytes=CHUNK_CACHE_BYTES)
    except InputError as error:
        raise blocks.error or (_no_hdf5(spec) if "signature not found" in str(error) else error) from error
    return Hdf5File(name=spec, root=root, bytes=file, identity=file.identity)


def _no_hdf5(spec: str) -> InputError:
    return InputError(f"{spec} is not an .h5ad file (it is not HDF5): write it with anndata's write_h5ad")
