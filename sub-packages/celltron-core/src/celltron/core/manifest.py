"""Reading and checking `manifest.json`, which is untrusted: it may come from anywhere."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from celltron.core.errors import InputError

MANIFEST_NAME = "manifest.json"

_MAX_MANIFEST_BYTES = 256 * 1024 * 1024
_CHUNK_BYTES = 4 * 1024 * 1024
_SHA256 = re.compile(r"[0-9a-f]{64}")


def read_manifest(folder: Path, *, format: str, versions: Collection[int]) -> dict[str, Any]:
    """Read an artefact's manifest and check format, version, and the presence and length of every listed file.

    Args:
        folder: the artefact.
        format: the format that is wanted.
        versions: the versions that the caller can read.

    Returns:
        The manifest. Files in the folder that it does not list are ignored.

    Raises:
        InputError: anything differs; the sentence names the file.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    path = folder / MANIFEST_NAME
    check_format(manifest, path, format=format, versions=versions)
    for name, entry in file_entries(manifest, path).items():
        problem = length_problem(folder, name, entry["bytes"])
        if problem:
            raise InputError(f"{folder / name}: {problem}; the folder is damaged or was copied only in part")
    return manifest


def verify_artefact(folder: Path, *, progress: Callable[[int], None] | None = None) -> None:
    """Check every checksum of an artefact, the manifest's own among them.

    Args:
        folder: the artefact, of any format.
        progress: called with the number of bytes hashed since its last call.

    Raises:
        InputError: it names the first bad file and says how many are bad.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    bad: list[tuple[Path, str]] = []
    if not fits_own_checksum(manifest):
        bad.append((folder / MANIFEST_NAME, "it does not fit its own checksum"))
    entries = file_entries(manifest, folder / MANIFEST_NAME)
    for name, entry in entries.items():
        problem = length_problem(folder, name, entry["bytes"])
        if not problem and hash_with_progress(folder / name, progress) != entry["sha256"]:
            problem = "its content does not fit its checksum"
        if problem:
            bad.append((folder / name, problem))
    if bad:
        path, problem = bad[0]
        raise InputError(
            f"{path}: {problem}; {len(bad)} of {len(entries) + 1} files are bad, copy or write the artefact again"
        )


def list_files(folder: Path, *, leave_out: Collection[str] = ()) -> list[str]:
    """List the files below a folder as sorted relative names with `/`; links and special files are refused.

    Args:
        folder: the folder.
        leave_out: names right in it that are not looked at.
    """
    names = []
    for parent, folders, files in os.walk(folder, onerror=_raise):
        if parent == os.fspath(folder):
            folders[:] = [name for name in folders if name not in leave_out]
            files = [name for name in files if name not in leave_out]
        for name in [*folders, *files]:
            path = Path(parent) / name
            mode = path.lstat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                kind = "a symbolic link" if stat.S_ISLNK(mode) else "not a plain file"
                raise InputError(f"{path}: it is {kind}, and an artefact holds plain files only; copy the file instead")
        names += [(Path(parent) / name).relative_to(folder).as_posix() for name in files]
    strange = [name for name in names if not _is_safe(name)]
    if strange:
        raise InputError(f"{folder}: the file name {strange[0]!r} cannot stand in a manifest; rename the file")
    return sorted(name for name in names if name != MANIFEST_NAME)


def _raise(error: OSError) -> None:
    raise error


def digest_of_manifest(manifest: Mapping[str, Any]) -> str:
    """Hash the manifest's content, whatever its spacing and order, without the digest itself."""
    content = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def is_sha256(value: object) -> bool:
    """Whether a value is a sha256 in lower-case hex."""
    return isinstance(value, str) and bool(_SHA256.fullmatch(value))


def seal_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with its own checksum as its last key."""
    return {**manifest, "manifest_sha256": digest_of_manifest(manifest)}


def fits_own_checksum(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest carries the checksum of its content."""
    return digest_of_manifest(manifest) == manifest.get("manifest_sha256")


def load_manifest(folder: Path) -> dict[str, Any]:
    """Read a folder's manifest as a JSON object; nothing else of it is checked."""
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        if folder.exists():
            raise InputError(f"{folder} is a file, wanted an artefact folder; check the path")
        old = folder.with_name(f".{folder.name}.old")
        advice = f"a replacement that broke off left it as {old}" if old.is_dir() else "check the path"
        raise InputError(f"{folder} does not exist; {advice}")
    if path.is_symlink() or not path.is_file():
        raise InputError(f"{folder}: it has no {MANIFEST_NAME}, so it is no complete artefact; check the path")
    if path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise InputError(f"{path}: larger than {_MAX_MANIFEST_BYTES} bytes, no manifest is; write the artefact again")
    return parse_manifest(path.read_bytes(), path)


def parse_manifest(data: bytes, where: Path | str) -> dict[str, Any]:
    """Read bytes as a JSON object.

    Args:
        data: a file's content.
        where: its path or address, for messages.
    """
    try:
        manifest = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not readable as JSON ({error}); copy or write the artefact again") from error
    if not isinstance(manifest, dict):
        raise InputError(f"{where}: wanted a JSON object, found {_show(manifest)}; copy or write the artefact again")
    return manifest


def check_format(manifest: Mapping[str, Any], where: Path | str, *, format: str, versions: Collection[int]) -> None:
    """Refuse a manifest of another format or version; see `read_manifest`."""
    found = manifest.get("format")
    if found != format:
        raise InputError(f"{where}: this is a {_show(found)}, wanted a {_show(format)}; give another folder")
    version = manifest.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or version not in versions:
        known = ", ".join(str(number) for number in sorted(versions))
        raise InputError(
            f"{where}: {format} version {_show(version)} cannot be read here, wanted version {known}; "
            "use the celltron that wrote it, or write it again"
        )


def file_entries(manifest: Mapping[str, Any], where: Path | str) -> dict[str, dict[str, Any]]:
    """The files of an untrusted manifest by name, each with ``bytes`` and ``sha256``; no name leaves the folder.

    Args:
        manifest: the manifest.
        where: its path or address, for messages.
    """
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise InputError(f"{where}: 'files' must map names to lengths and checksums; write the artefact again")
    for name, entry in files.items():
        if not _is_safe(name):
            raise InputError(f"{where}: the file name {name!r} leaves the folder; do not trust this artefact")
        num_bytes = entry.get("bytes") if isinstance(entry, dict) else None
        digest = entry.get("sha256") if isinstance(entry, dict) else None
        is_length = isinstance(num_bytes, int) and not isinstance(num_bytes, bool) and num_bytes >= 0
        if not is_length or not is_sha256(digest):
            raise InputError(f"{where}: the entry of {name!r} must hold bytes and sha256; write the artefact again")
    return files


def _is_safe(name: str) -> bool:
    """Whether a listed name is relative, normal, and stays inside the folder on every system."""
    if not name or "\\" in name or "\0" in name or ":" in name.split("/")[0]:
        return False
    parts = name.split("/")
    return not PurePosixPath(name).is_absolute() and all(part not in ("", ".", "..") for part in parts)


def length_problem(folder: Path, name: str, num_bytes: int) -> str | None:
    """What is wrong with a listed file, by its kind and length alone; None if nothing is."""
    path = folder
    for part in name.split("/"):
        path = path / part
        try:
            state = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return "the file is missing"
        if stat.S_ISLNK(state.st_mode):
            return "a symbolic link stands where a plain file was written"
    if not stat.S_ISREG(state.st_mode):
        return "it is not a plain file"
    if state.st_size != num_bytes:
        return f"it has {state.st_size} bytes where the manifest says {num_bytes}"
    return None


def hash_with_progress(path: Path, progress: Callable[[int], None] | None) -> str:
    """The sha256 (hex) of a file; ``progress`` is called with the number of bytes hashed since its last call."""
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
        if progress:
            progress(len(chunk))
    return digest.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            yield chunk


def _show(value: object) -> str:
    """Show an untrusted value in few letters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
