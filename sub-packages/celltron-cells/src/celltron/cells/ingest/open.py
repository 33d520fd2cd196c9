"""From what a user names (files, folders, patterns, addresses) to open sources of counts, whatever their format."""

import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import h5py

from celltron.cells.ingest.h5ad import open_h5ad
from celltron.cells.ingest.hdf5_file import open_hdf5
from celltron.cells.ingest.remote import is_address, network, open_file_system
from celltron.cells.ingest.source import Source, SourceOptions
from celltron.core import InputError

FILE_SUFFIXES = (".h5ad", ".h5", ".loom", ".zarr.zip")
ZARR_FILES = ("zarr.json", ".zgroup", ".zattrs", ".zmetadata")
MAGIC = "*?["
WEB = ("http://", "https://")
WANTED = "an .h5ad, 10x .h5 or .loom file, a .zarr or 10x folder, a soma:// or census:// address"


def expand_sources(specs: Sequence[str | Path], storage: Mapping[str, Any] | None = None) -> list[str]:
    """Files, folders, patterns and addresses as one entry a source, sorted, none twice.

    A folder gives what it and its folders hold of the known kinds: files by suffix, ``.zarr`` folders, SOMA experiments
    and 10x folders (``matrix.mtx`` with barcodes and genes). What is named itself is taken whatever its name.

    Args:
        specs: what the user named; a pattern (``*``, ``?``, ``[…]``, ``**``) gives all that fit.
        storage: options for fsspec's file systems of addresses.
    """
    found: dict[str, str] = {}
    for spec in specs:
        text = os.fspath(spec)
        names = _expand_address(text, storage) if is_address(text) else _expand_path(text)
        if not names:
            raise InputError(f"{text} holds nothing that can be converted: wanted {WANTED}")
        for name in names:
            found.setdefault(name if is_address(name) else os.path.realpath(name), name)
    if not found:
        raise InputError(f"no source was named: wanted {WANTED}")
    return sorted(found.values())


def _expand_path(text: str) -> list[str]:
    if os.path.exists(text):
        matches = [text]
    elif any(sign in text for sign in MAGIC):
        matches = glob.glob(text, recursive=True)
        if not matches:
            raise InputError(f"no file fits the pattern {text}: check it, and quote it so that the shell leaves it")
    else:
        raise InputError(f"no file at {text}: wanted {WANTED}; check the name")
    listed = _LocalFolders()
    return [name for match in sorted(matches) for name in (_walk(match, listed) if os.path.isdir(match) else [match])]


def _expand_address(text: str, storage: Mapping[str, Any] | None) -> list[str]:
    scheme = text.split("://")[0]
    if scheme == "census" or scheme.startswith("soma"):
        return [text]
    if text.startswith(WEB):
        return [text]
    fs, path = open_file_system(text, storage)
    listed = _RemoteFolders(fs, text)
    with network(text):
        if any(sign in path for sign in MAGIC):
            matches = sorted(fs.glob(path))
            if not matches:
                raise InputError(f"nothing fits the pattern {text}: check it")
        else:
            matches = [path]
        names: list[str] = []
        for match in matches:
            names += _walk(match, listed) if fs.isdir(match) else [match]
    return [str(fs.unstrip_protocol(name)) for name in names]


class _Folders(Protocol):
    def __call__(self, folder: str) -> tuple[list[str], list[str]]:
        """The names of the files and of the folders in a folder."""


class _LocalFolders:
    """Shows a folder once: links may lead back to it."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, folder: str) -> tuple[list[str], list[str]]:
        if os.path.realpath(folder) in self._seen:
            return [], []
        self._seen.add(os.path.realpath(folder))
        with os.scandir(folder) as entries:
            kinds = [(entry.name, entry.is_dir()) for entry in entries]
        return sorted(n for n, is_dir in kinds if not is_dir), sorted(n for n, is_dir in kinds if is_dir)


class _RemoteFolders:
    def __init__(self, fs: Any, spec: str) -> None:
        self._fs, self._spec = fs, spec

    def __call__(self, folder: str) -> tuple[list[str], list[str]]:
        with network(self._spec):
            entries = self._fs.ls(folder, detail=True)
        kinds = [(str(e["name"]).rstrip("/").rsplit("/", 1)[-1], e["type"] == "directory") for e in entries]
        return sorted(n for n, is_dir in kinds if not is_dir and n), sorted(n for n, is_dir in kinds if is_dir)


def _walk(folder: str, list_folder: _Folders) -> list[str]:
    """The sources in a folder; a folder that is one itself is not looked into."""
    files, folders = list_folder(folder)
    if _folder_kind(folder, files, folders):
        return [folder]
    base = folder.rstrip("/")
    names = [f"{base}/{name}" for name in files if name.endswith(FILE_SUFFIXES)]
    for name in folders:
        if not name.startswith("."):
            names += _walk(f"{base}/{name}", list_folder)
    return names


def _folder_kind(folder: str, files: Sequence[str], folders: Sequence[str]) -> str:
    """``zarr``, ``soma``, ``10x``, or nothing for a folder that is no source itself."""
    if folder.rstrip("/").endswith(".zarr") or any(name in files for name in ZARR_FILES):
        return "zarr"
    if "__group" in folders:
        return "soma"
    stems = {name.removesuffix(".gz") for name in files}
    has_genes = "features.tsv" in stems or "genes.tsv" in stems
    return "10x" if {"matrix.mtx", "barcodes.tsv"} <= stems and has_genes else ""


def open_source(spec: str, options: SourceOptions) -> Source:
    """Open one source, its format decided by its address, its content, and where that does not tell by its suffix."""
    scheme = spec.split("://")[0] if is_address(spec) else ""
    if scheme == "census":
        from celltron.cells.ingest.census import open_census

        return open_census(spec, options)
    if scheme.startswith("soma"):
        return _open_folder("soma", spec, options)
    bare = spec.split("?")[0].rstrip("/")
    if bare.endswith((".zarr", ".zarr.zip")) and (scheme or bare.endswith(".zip") or os.path.isdir(spec)):
        return _open_folder("zarr", spec, options)
    folder = None if bare.endswith(FILE_SUFFIXES) else _list_if_folder(spec, options.storage)
    if folder is not None:
        kind = _folder_kind(spec, *folder)
        if not kind:
            raise InputError(f"{spec} is a folder, but none of counts: wanted {WANTED}; name what is inside it")
        return _open_folder(kind, spec, options)
    if scheme and bare.endswith(".h5ad"):
        return open_h5ad(spec, options)  # saves a look into the file
    return _open_hdf5_kind(spec, options)


def _list_if_folder(spec: str, storage: Mapping[str, Any] | None) -> tuple[list[str], list[str]] | None:
    """The names of the files and of the folders in a folder; None for a file."""
    if not is_address(spec):
        return _LocalFolders()(spec) if os.path.isdir(spec) else None
    if spec.startswith(WEB):  # such servers list no folders
        return None
    fs, path = open_file_system(spec, storage)
    with network(spec):
        is_folder = fs.isdir(path)
    return _RemoteFolders(fs, spec)(path) if is_folder else None


def _open_folder(kind: str, spec: str, options: SourceOptions) -> Source:
    if kind == "zarr":
        from celltron.cells.ingest.zarr import open_zarr

        return open_zarr(spec, options)
    if kind == "soma":
        from celltron.cells.ingest.soma import open_soma

        return open_soma(spec, options)
    from celltron.cells.ingest.tenx_folder import open_tenx_folder

    return open_tenx_folder(spec, options)


def _open_hdf5_kind(spec: str, options: SourceOptions) -> Source:
    hdf5 = open_hdf5(spec, options.storage)
    try:
        kind = _hdf5_kind(hdf5.root)
    finally:
        hdf5.close()
    if kind == "loom":
        from celltron.cells.ingest.loom import open_loom

        return open_loom(spec, options)
    if kind == "10x":
        from celltron.cells.ingest.tenx_h5 import open_tenx_h5

        return open_tenx_h5(spec, options)
    return open_h5ad(spec, options)


def _hdf5_kind(root: h5py.File) -> str:
    """``h5ad``, ``loom`` or ``10x`` (Cell Ranger 3 and later: ``matrix``; before: a group for each genome)."""
    if "obs" in root and "var" in root:
        return "h5ad"
    matrix = root.get("matrix")
    if isinstance(matrix, h5py.Dataset) and "row_attrs" in root:
        return "loom"
    groups = [root[name] for name in root if isinstance(root.get(name), h5py.Group)]
    is_tenx = any(all(part in group for part in ("barcodes", "data", "indices", "indptr")) for group in groups)
    return "10x" if is_tenx or isinstance(matrix, h5py.Group) else "h5ad"
