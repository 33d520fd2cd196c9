"""The identity of a folder changes with any file in it."""

import os
from pathlib import Path

import fsspec

from celltron.cells.ingest.tree_identity import identity_of_tree


def test_any_change_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("x", "a/y", "a/b/z"):
        (tmp_path / name).write_bytes(b"1" * 5)
    first = identity_of_tree(str(tmp_path))
    assert first["files"] == 3 and first["bytes"] == 15
    assert identity_of_tree(str(tmp_path)) == first
    os.utime(tmp_path / "a/b/z", ns=(1, 1))
    second = identity_of_tree(str(tmp_path))
    assert second != first
    (tmp_path / "x").rename(tmp_path / "w")
    assert identity_of_tree(str(tmp_path)) not in (first, second)


def test_behind_an_address() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe({"/tree/a": b"12", "/tree/b/c": b"345"})
    try:
        first = identity_of_tree("memory://tree")
        assert (first["files"], first["bytes"]) == (2, 5)
        fs.pipe("/tree/a", b"123")
        assert identity_of_tree("memory://tree") != first
    finally:
        fs.rm("/tree", recursive=True)
