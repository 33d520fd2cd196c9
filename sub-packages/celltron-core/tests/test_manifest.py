import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from celltron.core.artefact import write_artefact
from celltron.core.errors import InputError
from celltron.core.manifest import (
    MANIFEST_NAME,
    digest_of_manifest,
    fits_own_checksum,
    is_sha256,
    list_files,
    read_manifest,
    seal_manifest,
    verify_artefact,
)

LENGTHS = {"a.bin": 1000, "sub/b.bin": 10, "sub/empty": 0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with write_artefact(tmp_path / "thing", format="test-thing", version=2) as writer:
        (writer.folder / "sub").mkdir()
        for name, length in LENGTHS.items():
            (writer.folder / name).write_bytes(bytes(range(256)) * 4)
            os.truncate(writer.folder / name, length)
        writer.meta["rows"] = 7
    return tmp_path / "thing"


def read(folder: Path) -> dict[str, Any]:
    return read_manifest(folder, format="test-thing", versions={1, 2})


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest as somebody with bad intent would, checksum included."""
    path = folder / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    change(manifest)
    manifest["manifest_sha256"] = digest_of_manifest(manifest)
    path.write_text(json.dumps(manifest))


def test_a_whole_artefact_is_read_and_verified_with_progress(folder: Path) -> None:
    assert read(folder)["rows"] == 7
    (folder / "unlisted").write_text("x")
    seen: list[int] = []
    read(folder)
    verify_artefact(folder, progress=seen.append)
    assert sum(seen) == sum(LENGTHS.values())


def test_a_sealed_manifest_fits_until_it_is_changed() -> None:
    sealed = seal_manifest({"b": [1.5, None], "a": "é"})
    assert list(sealed) == ["b", "a", "manifest_sha256"] and is_sha256(sealed["manifest_sha256"])
    assert fits_own_checksum(sealed) and fits_own_checksum(json.loads(json.dumps(sealed, indent=1, sort_keys=True)))
    assert seal_manifest(sealed) == sealed
    assert not fits_own_checksum(sealed | {"b": [1.25, None]})
    assert not fits_own_checksum({"b": [1.5, None], "a": "é"})
    assert not any(map(is_sha256, ("0" * 63, "0" * 65, "A" * 64, "0" * 63 + "\n", 0, None)))


def test_format_and_version_are_named(folder: Path) -> None:
    with pytest.raises(InputError, match="this is a 'test-thing', wanted a 'celltron-cellstore'"):
        read_manifest(folder, format="celltron-cellstore", versions={1})
    with pytest.raises(InputError, match="test-thing version 2 cannot be read here, wanted version 1, 3"):
        read_manifest(folder, format="test-thing", versions=[3, 1])


@pytest.mark.parametrize("version", [3, True, "2", None, 2.0, [2]])
def test_other_versions_are_refused(folder: Path, version: Any) -> None:
    edit(folder, lambda manifest: manifest.update(version=version))
    with pytest.raises(InputError, match="cannot be read here"):
        read(folder)


def test_what_is_no_artefact(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match="nothing does not exist; check the path"):
        read(tmp_path / "nothing")
    with pytest.raises(InputError, match="is a file, wanted an artefact folder"):
        read(folder / "a.bin")
    (tmp_path / "plain").mkdir()
    with pytest.raises(InputError, match=r"plain: it has no manifest.json"):
        verify_artefact(tmp_path / "plain")
    (tmp_path / "plain" / MANIFEST_NAME).symlink_to(folder / MANIFEST_NAME)
    with pytest.raises(InputError, match=r"it has no manifest.json"):
        read(tmp_path / "plain")


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (b"", "not readable as JSON"),
        (b"{", "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (b"[" * 100_000, "not readable as JSON"),
        (b"[1]", "wanted a JSON object"),
        (b"null", "wanted a JSON object"),
        (b"{}", "this is a None"),
        (b'{"format": {"a": 1}}', "this is a {'a': 1}"),
        (b'{"format": "test-thing", "version": 2}', "'files' must map names"),
        (b'{"format": "test-thing", "version": 2, "files": []}', "'files' must map names"),
    ],
)
def test_a_manifest_that_is_none_is_named(folder: Path, content: bytes, pattern: str) -> None:
    (folder / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(InputError, match=pattern) as caught:
        read(folder)
    assert str(folder / MANIFEST_NAME) in str(caught.value)
    with pytest.raises(InputError):
        verify_artefact(folder)


ENTRY = {"bytes": 0, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../x", "sub/../../x", "sub/..", "..", ".", "", "a//b", "./a", "sub/", "a\\..\\b", "C:/x", "a\0b"],
)
def test_names_that_leave_the_folder_are_refused(folder: Path, name: str) -> None:
    edit(folder, lambda manifest: manifest["files"].update({name: ENTRY}))
    for check in (read, verify_artefact):
        with pytest.raises(InputError, match="leaves the folder") as caught:
            check(folder)
        assert "\0" not in str(caught.value)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        3,
        [],
        {},
        {"bytes": 1},
        {**ENTRY, "bytes": -1},
        {**ENTRY, "bytes": True},
        {**ENTRY, "bytes": 1.5},
        {**ENTRY, "bytes": "1"},
        {**ENTRY, "sha256": None},
        {**ENTRY, "sha256": "0" * 63},
        {**ENTRY, "sha256": "G" * 64},
    ],
)
def test_odd_entries_are_refused(folder: Path, entry: Any) -> None:
    edit(folder, lambda manifest: manifest["files"].update({"a.bin": entry}))
    for check in (read, verify_artefact):
        with pytest.raises(InputError, match=r"the entry of 'a.bin' must hold bytes and sha256"):
            check(folder)


def remove(path: Path) -> None:
    path.unlink()


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b"x")


def link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (remove, "the file is missing"),
        (shorten, "it has 9 bytes where the manifest says 10"),
        (lengthen, "it has 11 bytes where the manifest says 10"),
        (link, "a symbolic link stands where"),
        (make_folder, "not a plain file"),
    ],
)
def test_damage_seen_without_reading(folder: Path, damage: Callable[[Path], None], pattern: str) -> None:
    damage(folder / "sub" / "b.bin")
    for check in (read, verify_artefact):
        with pytest.raises(InputError, match=pattern) as caught:
            check(folder)
        assert str(folder / "sub" / "b.bin") in str(caught.value)


def test_a_linked_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "sub").rename(tmp_path / "outside")
    (folder / "sub").symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="symbolic link"):
        read(folder)
    (folder / "sub").unlink()
    (folder / "sub").touch()
    with pytest.raises(InputError, match="missing"):
        read(folder)


@given(place=st.integers(0, 999), bit=st.integers(0, 7))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
def test_a_flipped_bit_passes_reading_and_fails_verifying(folder: Path, place: int, bit: int) -> None:
    path = folder / "a.bin"
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)
    read(folder)
    with pytest.raises(InputError, match=r"a.bin: its content does not fit its checksum; 1 of 4 files are bad"):
        verify_artefact(folder)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    verify_artefact(folder)


def test_all_bad_files_are_counted(folder: Path) -> None:
    lengthen(folder / "a.bin")
    remove(folder / "sub" / "empty")
    with pytest.raises(InputError, match=r"a.bin: it has 1001 bytes .*; 2 of 4 files are bad"):
        verify_artefact(folder)


def test_a_changed_manifest_fails_verifying(folder: Path) -> None:
    path = folder / MANIFEST_NAME
    path.write_text(path.read_text().replace('"rows": 7', '"rows": 8'))
    assert read(folder)["rows"] == 8
    with pytest.raises(InputError, match=r"manifest.json: it does not fit its own checksum; 1 of 4"):
        verify_artefact(folder)


def test_no_byte_of_a_manifest_can_change_unseen(folder: Path) -> None:
    path = folder / MANIFEST_NAME
    original = path.read_bytes()
    content = json.loads(original)
    for place in range(0, len(original), 7):
        damaged = bytearray(original)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        try:
            is_same = json.loads(damaged.decode("utf-8")) == content
        except ValueError:
            is_same = False
        if not is_same:
            with pytest.raises(InputError):
                verify_artefact(folder)


def test_listing_is_sorted_and_leaves_out_the_manifest(folder: Path) -> None:
    assert list_files(folder) == ["a.bin", "sub/b.bin", "sub/empty"]
    with pytest.raises(FileNotFoundError):
        list_files(folder / "nothing")
