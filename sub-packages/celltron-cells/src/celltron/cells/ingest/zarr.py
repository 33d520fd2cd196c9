"""AnnData as zarr (format 2 or 3), a folder, a .zip file or behind an address, as a source of counts.

Where a chunk of zeros is no sensible content, in the three arrays of a sparse matrix and in the row names, a missing
chunk is refused; in a dense matrix it cannot be told from a chunk without counts, which zarr does not write.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore, ZipStore

from celltron.cells.ingest.anndata_source import AnndataSource
from celltron.cells.ingest.damage import reading
from celltron.cells.ingest.remote import identity_of, is_address, network, open_file_system
from celltron.cells.ingest.row_arrays import ChunkedArray, RowArray, plain_dtype
from celltron.cells.ingest.source import SourceOptions
from celltron.cells.ingest.tree_identity import identity_of_tree
from celltron.cells.ingest.zarr_store import METADATA, CheckedStore
from celltron.core import InputError


def open_zarr(spec: str, options: SourceOptions) -> AnndataSource:
    """Open what anndata's write_zarr made and find the wanted matrix: ``X``, a layer, or ``raw`` with its own genes."""
    store = _open_store(spec, options.storage)
    try:
        root = _open_root(spec, store)
        with reading(spec):
            _require_row_names(root, store)
        return AnndataSource(
            spec,
            root,
            options,
            lambda node: _open_array(node, root, store),
            identity=lambda: _identity(spec, options.storage),
            close=store.close,
        )
    except BaseException:
        store.close()
        raise


def _open_store(spec: str, storage: Mapping[str, Any] | None) -> CheckedStore:
    if is_address(spec):
        if spec.endswith(".zip"):
            raise InputError(f"{spec} is a .zip file behind an address: download it and name the copy")
        open_file_system(spec, storage)  # says what is missing
        with network(spec):
            remote = FsspecStore.from_url(spec.rstrip("/"), storage_options=dict(storage or {}), read_only=True)
        return CheckedStore(remote, spec)
    path = Path(spec)
    if not path.exists():
        raise InputError(f"no file at {path}: wanted a .zarr folder or a .zarr.zip file, check the name")
    store: Store = LocalStore(path, read_only=True) if path.is_dir() else ZipStore(path, mode="r")
    return CheckedStore(store, spec)


def _open_root(spec: str, store: CheckedStore) -> zarr.Group:
    try:
        with reading(spec):
            root = zarr.open_group(store, mode="r")
            is_anndata = "obs" in root and "var" in root
    except InputError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise InputError(
                f"{spec} holds no zarr group: wanted what anndata's write_zarr makes, check the name"
            ) from error
        raise
    if not is_anndata:
        raise InputError(f"{spec} is zarr but not of anndata (it has no obs and var): write it with anndata")
    return root


def _require_row_names(root: zarr.Group, store: CheckedStore) -> None:
    for table in ("obs", "var", "raw/var"):
        path = f"{table}/{root[table].attrs.get('_index')}" if table in root else table
        if path in root and getattr(getattr(root[path], "dtype", None), "kind", "") == "T":
            store.require(path)


class _ZarrArray:
    """A zarr array in the machine's byte order."""

    def __init__(self, array: Any) -> None:
        self.shape: tuple[int, ...] = array.shape
        self.dtype = plain_dtype(array.dtype)
        self._array = array

    def __getitem__(self, part: Any, /) -> npt.NDArray[Any]:
        """A run of rows (a slice), or of rows and columns (two slices)."""
        return np.asarray(self._array[part]).astype(self.dtype, copy=False)


def _open_array(node: Any, root: zarr.Group, store: CheckedStore) -> RowArray:
    array = _ZarrArray(node)
    if len(array.shape) != 1:
        return array
    matrix = node.path.rpartition("/")[0]
    if root[f"{matrix}/data"].shape[0] > 0:  # type: ignore[union-attr]
        store.require(node.path)
    length = int(node.chunks[0])

    def load(numbers: list[int]) -> list[npt.NDArray[Any]]:
        """Chunks by number; those that follow one another are read at once."""
        chunks = []
        for first, last in _runs(numbers):
            read = array[first * length : (last + 1) * length]
            chunks += [read[i * length : (i + 1) * length] for i in range(last + 1 - first)]
        return chunks

    return ChunkedArray(array.shape, array.dtype, (length,), load)


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """The first and the last number of each run without gaps."""
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[start], numbers[i - 1]
            start = i


def _identity(spec: str, storage: Mapping[str, Any] | None) -> dict[str, Any]:
    """That of all files; for one .zip file its own, and for the web, where no files are listed, those of the root."""
    if not is_address(spec) and not os.path.isdir(spec):
        status = os.stat(spec)
        return {"bytes": status.st_size, "changed": str(status.st_mtime_ns)}
    if not spec.startswith(("http://", "https://")):
        return identity_of_tree(spec, storage)
    fs, path = open_file_system(spec, storage)
    found = {}
    for name in METADATA:
        with network(spec), suppress(FileNotFoundError):
            found[name] = identity_of(fs.info(f"{path.rstrip('/')}/{name}"))
    return found
