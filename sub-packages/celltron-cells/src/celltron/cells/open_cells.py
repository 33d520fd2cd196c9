"""Whatever holds cells, opened by its path or address: a store, tar shards, a collection, or several as one."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from celltron.cells import collection, tar_format
from celltron.cells.collection import CellCollection
from celltron.cells.reader import CellReader
from celltron.cells.store import CellStore
from celltron.cells.tar_store import TarStore
from celltron.core import MANIFEST_NAME, InputError


def is_converted(path: str) -> bool:
    """Whether a path names what :func:`open_cells` opens, or refuses with a reason, and not files to convert."""
    return is_address(path) and not Path(path).suffix or format_of(Path(path)).startswith("celltron-")


def is_address(path: str) -> bool:
    """Whether a path is an address of fsspec, such as ``s3://bucket/shards``."""
    return "://" in path


def parse_storage(pairs: Sequence[str]) -> dict[str, Any] | None:
    """Options of fsspec's file system out of words such as ``anon=true``; None without any.

    >>> parse_storage(["anon=true", "endpoint_url=http://localhost:9000"])
    {'anon': True, 'endpoint_url': 'http://localhost:9000'}
    """
    storage: dict[str, Any] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not (key and sign):
            raise InputError(f"the storage option {pair!r} has no value: wanted KEY=VALUE, such as anon=true")
        storage[key] = {"true": True, "false": False}.get(value.lower(), value)
    return storage or None


def open_cells(paths: str | Path | Sequence[str | Path], *, storage: Mapping[str, Any] | None = None) -> CellReader:
    """Open a store folder, a folder or address of tar shards, a collection file, or several as one collection.

    Args:
        paths: one or several of these.
        storage: options for fsspec's file system, where a path is an address.
    """
    names = [str(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    if len(names) != 1:
        return CellCollection.open(names, open_member=partial(open_cells, storage=storage))
    name = names[0]
    if is_address(name) or format_of(Path(name)) == tar_format.FORMAT:
        return TarStore.open(name, storage=storage)
    if format_of(Path(name)) == collection.FORMAT:
        return CellCollection.open(name, open_member=partial(open_cells, storage=storage))
    return CellStore.open(name)


def format_of(path: Path) -> str:
    """The format that a folder's manifest or a .json file names, unchecked; empty where there is none."""
    manifest_path = path if path.suffix == ".json" else path / MANIFEST_NAME
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    return str(manifest.get("format", "")) if isinstance(manifest, dict) else ""
