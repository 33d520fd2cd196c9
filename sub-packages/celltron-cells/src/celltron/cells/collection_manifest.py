"""The file that names the stores of a collection, their weights and what they held when it was written.

JSON of format ``celltron-collection``, version 1: ``stores`` is a list of ``path`` (relative to the file's folder,
with ``/``, or an address), ``fingerprint`` and ``weight`` (null when no store has one); ``manifest_sha256`` is the
checksum of the rest, as in an artefact.
"""

import json
import numbers
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from celltron.core import InputError, write_atomically
from celltron.core.manifest import fits_own_checksum, is_sha256, seal_manifest

FORMAT = "celltron-collection"
VERSION = 1
LARGEST_WEIGHT = 1e100


@dataclass(frozen=True, slots=True)
class NamedStore:
    """A store that a collection's file names: its path or address, its fingerprint, its weight."""

    path: str
    fingerprint: str
    weight: float | None


def is_address(path: str) -> bool:
    """Whether a path is an address such as ``s3://bucket/shards``."""
    return "://" in path


def absolute_path(path: str | Path) -> str:
    """A path from the root with its links followed, so that each store has one; an address as it is."""
    return str(path) if is_address(str(path)) else str(Path(path).resolve())


def write_collection(path: Path, stores: Sequence[NamedStore]) -> None:
    """Write the file, at once or not at all."""
    folder = path.parent.resolve()
    entries = [
        {"path": _relative(store.path, folder), "fingerprint": store.fingerprint, "weight": store.weight}
        for store in stores
    ]
    manifest = seal_manifest({"format": FORMAT, "version": VERSION, "stores": entries})
    write_atomically(path, json.dumps(manifest, indent=1) + "\n")


def _relative(path: str, folder: Path) -> str:
    if is_address(path):
        return path
    try:
        return Path(os.path.relpath(absolute_path(path), folder)).as_posix()
    except ValueError:  # another drive
        return Path(absolute_path(path)).as_posix()


def read_collection(path: Path) -> list[NamedStore]:
    """The stores that a collection's file names, their paths from the root; the file is untrusted."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no collection at {path}: check the name") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no {FORMAT} file, for it is no JSON: name the file that was written") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is no {FORMAT} file: name the file that CellCollection.write made")
    version = manifest.get("version")
    if type(version) is not int or version != VERSION:
        raise InputError(f"{path} has {FORMAT} version {version!r}, wanted {VERSION}: write the collection again")
    if not fits_own_checksum(manifest):
        raise InputError(f"{path} is damaged: it does not fit its own checksum; write the collection again")
    entries = manifest.get("stores")
    if not isinstance(entries, list) or not entries or not all(map(_is_good, entries)):
        raise InputError(
            f"{path} is damaged: each of its stores must have a path, a fingerprint and a weight; write the collection "
            "again"
        )
    if len({entry["weight"] is None for entry in entries}) > 1:
        raise InputError(f"{path} is damaged: some of its stores have no weight; write the collection again")
    folder = path.parent.resolve()
    return [
        NamedStore(
            entry["path"] if is_address(entry["path"]) else str(folder / entry["path"]),
            entry["fingerprint"],
            entry["weight"] if entry["weight"] is None else float(entry["weight"]),
        )
        for entry in entries
    ]


def is_weight(value: Any) -> bool:
    """Whether a value is a number that can be a weight."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    return 0 <= cast(float, value) <= LARGEST_WEIGHT


def _is_good(entry: Any) -> bool:
    if not isinstance(entry, dict) or set(entry) != {"path", "fingerprint", "weight"}:
        return False
    path, fingerprint, weight = entry["path"], entry["fingerprint"], entry["weight"]
    is_path = isinstance(path, str) and bool(path) and "\0" not in path
    return is_path and is_sha256(fingerprint) and (weight is None or is_weight(weight))
