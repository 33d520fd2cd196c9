"""What changes when a source does that is a folder of many files."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from celltron.cells.ingest.remote import identity_of, is_address, network, open_file_system


def identity_of_tree(spec: str, storage: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Files, their bytes, and a digest of all names, lengths and times of change (or ETags)."""
    num_files, num_bytes = 0, 0
    digest = hashlib.sha256()
    for name, size, changed in sorted(_remote_files(spec, storage) if is_address(spec) else _local_files(spec)):
        num_files += 1
        num_bytes += size
        digest.update(f"{name}\0{size}\0{changed}\0".encode())
    return {"files": num_files, "bytes": num_bytes, "changed": digest.hexdigest()}


def _local_files(spec: str) -> Iterator[tuple[str, int, str]]:
    for folder, _, names in os.walk(spec):
        for name in names:
            status = os.stat(os.path.join(folder, name))
            yield os.path.relpath(os.path.join(folder, name), spec), status.st_size, str(status.st_mtime_ns)


def _remote_files(spec: str, storage: Mapping[str, Any] | None) -> Iterator[tuple[str, int, str]]:
    fs, path = open_file_system(spec, storage)
    with network(spec):
        found = fs.find(path, detail=True)
    for name, info in found.items():
        entry = identity_of(info)
        yield str(name), int(entry["bytes"] or 0), str(entry["changed"])
