"""Artefact folders: written aside, checksummed file by file, and renamed into place at the end.

A folder that carries a `manifest.json` is complete. Until then it is called `.<name>.partial` and nothing opens it.
Long work can go on in the partial folder that a broken-off run left (`resume`).
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from celltron.core.durable import (
    FileEntry,
    exchange_folders,
    hash_file,
    lock_folder,
    name_file_in_errors,
    sync_folder,
    sync_tree,
)
from celltron.core.durable import write_atomically as write_atomically
from celltron.core.errors import BeingWrittenError, InputError
from celltron.core.manifest import MANIFEST_NAME as MANIFEST_NAME
from celltron.core.manifest import list_files, seal_manifest
from celltron.core.manifest import read_manifest as read_manifest
from celltron.core.manifest import verify_artefact as verify_artefact
from celltron.core.version import __version__

_RESERVED = ("format", "version", "celltron_version", "files", "manifest_sha256")


@dataclass(slots=True)
class _OpenPartial:
    """What this process knows of a partial folder that it began."""

    replace: bool
    resume: bool
    lock: int | None


_open_partials: dict[Path, _OpenPartial] = {}


def begin_artefact(final: Path, *, replace: bool = False, resume: bool = False) -> Path:
    """Make the folder `.<name>.partial` beside `final` and hold it until it is finished, left or discarded.

    Args:
        final: where the artefact will stand.
        replace: allow `final` to be an artefact already; it stays readable until the new one is complete.
        resume: keep what a broken-off run left in the partial folder, for the caller to check; Ctrl-C keeps it too.

    Returns:
        The partial folder, empty unless `resume` found something.

    Raises:
        InputError: `final` is in use, is no folder, or another process is writing it now.
    """
    final = _absolute(final)
    _recover(final)
    _check_target(final, replace=replace)
    partial = _partial_of(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    _release(partial)
    if partial.is_symlink() or partial.is_file():
        partial.unlink()
    elif partial.exists() and not resume:
        _unlock(_lock_or_refuse(partial, final))
        shutil.rmtree(partial)
    partial.mkdir(exist_ok=resume)
    _open_partials[partial] = _OpenPartial(replace=replace, resume=resume, lock=_lock_or_refuse(partial, final))
    if resume:  # a run that broke off on its last step left a manifest, or a part of one
        for path in (partial / MANIFEST_NAME, *partial.glob(f".{MANIFEST_NAME}.*.tmp")):
            path.unlink(missing_ok=True)
    return partial


def finish_artefact(
    partial: Path,
    final: Path,
    *,
    format: str,
    version: int,
    meta: Mapping[str, Any] | None = None,
    files: Mapping[str, FileEntry] | None = None,
    remove: Collection[str] = (),
) -> None:
    """Hash every file, write the manifest, push all to the disk, and rename the folder to its final name.

    Whatever fails, the partial folder is removed (Ctrl-C leaves one that was begun with `resume`) and an older artefact
    at `final` is left as it was.

    Args:
        partial: the folder from `begin_artefact`.
        final: the name given to `begin_artefact`.
        format: what kind of artefact this is, such as "celltron-cellstore".
        version: version of that format.
        meta: more keys for the manifest; JSON values only.
        files: files, by relative name, that this run hashed while it wrote or checked them.
        remove: names in the folder that are no part of the artefact; they go last, right before the renaming.
    """
    partial, final = _absolute(partial), _absolute(final)
    _check_partial(partial)
    opened = _open_partials.get(partial, _OpenPartial(replace=False, resume=False, lock=None))
    try:
        with name_file_in_errors(final):
            if (partial / MANIFEST_NAME).exists():
                raise ValueError(f"{partial / MANIFEST_NAME} is written by finish_artefact; give its keys as meta")
            entries = _hash_files(partial, files or {}, remove)
            write_manifest(partial, new_manifest(format=format, version=version, meta=meta or {}, files=entries))
            sync_tree(partial, leave_out=remove)
            _check_target(final, replace=opened.replace)
            _remove(partial, remove)
            _move_into_place(partial, final)
    except BaseException as error:
        _abandon(partial, error)
        raise
    _release(partial)


def discard_artefact(partial: Path) -> None:
    """Remove a partial folder and everything in it; nothing happens when it is gone already."""
    partial = _absolute(partial)
    _check_partial(partial)
    shutil.rmtree(partial, ignore_errors=True)
    _release(partial)


def leave_artefact(partial: Path) -> None:
    """Let go of a partial folder as it is, for a later `begin_artefact` with `resume`."""
    _release(_absolute(partial))


def new_manifest(
    *, format: str, version: int, meta: Mapping[str, Any], files: Mapping[str, FileEntry]
) -> dict[str, Any]:
    """A manifest with its own checksum.

    Args:
        format: what kind of artefact this is.
        version: version of that format.
        meta: more keys; JSON values only.
        files: every file of the artefact, by its relative name.
    """
    clashes = [key for key in _RESERVED if key in meta]
    if clashes:
        raise ValueError(f"the manifest writes {', '.join(clashes)} itself; rename that key of meta")
    # Through JSON and back, so that what is hashed is what a reader will find (tuples, integer keys).
    meta = json.loads(json.dumps(dict(meta), allow_nan=False))
    listed = {name: dict(files[name]) for name in sorted(files)}
    manifest = {"format": format, "version": version, "celltron_version": __version__, **meta, "files": listed}
    return seal_manifest(manifest)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write an artefact's manifest in one step: readers find the old one or the new one.

    The one point at which an artefact that is changed in place turns into another: the files of both are there before.
    """
    write_atomically(folder / MANIFEST_NAME, json.dumps(manifest, indent=1, allow_nan=False) + "\n")


@dataclass(slots=True)
class ArtefactWriter:
    """What `write_artefact` hands out."""

    folder: Path
    """Where to put the files."""
    meta: dict[str, Any] = field(default_factory=dict)
    """More keys for the manifest; JSON values only."""
    files: dict[str, FileEntry] = field(default_factory=dict)
    """Files, by relative name, that need not be hashed again."""
    remove: list[str] = field(default_factory=list)
    """Names in the folder that are no part of the artefact."""
    leave: bool = False
    """Whether an error leaves the folder as it is: until the block knows that what was in it is of no more use."""


@contextlib.contextmanager
def write_artefact(
    final: Path, *, format: str, version: int, replace: bool = False, resume: bool = False
) -> Iterator[ArtefactWriter]:
    """Write an artefact inside a `with`: finished when the block ends, discarded when it raises.

    With `resume`, what a broken-off run left is in the folder, and Ctrl-C leaves it for the next; see `begin_artefact`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with write_artefact(Path(folder) / "a", format="example", version=1) as writer:
    ...         _ = (writer.folder / "numbers.txt").write_text("1 2 3")
    ...         writer.meta["count"] = 3
    ...     read_manifest(Path(folder) / "a", format="example", versions={1})["count"]
    3
    """
    partial = begin_artefact(final, replace=replace, resume=resume)
    writer = ArtefactWriter(folder=partial)
    try:
        # Only a full disk is surely about this folder: the block reads other files too.
        with name_file_in_errors(final, only=(errno.ENOSPC, errno.EDQUOT)):
            yield writer
    except BaseException as error:
        if writer.leave:
            leave_artefact(partial)
        else:
            _abandon(partial, error)
        raise
    finish_artefact(
        partial, final, format=format, version=version, meta=writer.meta, files=writer.files, remove=writer.remove
    )


def _absolute(path: Path) -> Path:
    """Make a path absolute without following its last link."""
    absolute = Path(os.path.abspath(path))
    if not absolute.name:
        raise InputError(f"{absolute} cannot be written as an artefact folder; give a folder below it")
    return absolute


def _partial_of(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


def _check_partial(partial: Path) -> None:
    """Hold to the name that `begin_artefact` gives: a partial folder may be deleted, and no other must be."""
    if not (partial.name.startswith(".") and partial.name.endswith(".partial")):
        raise ValueError(f"{partial} is not a folder that begin_artefact made")


def _old_of(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def _recover(final: Path) -> None:
    """Put the old artefact back if a crash fell between the two renames of a swap."""
    old = _old_of(final)
    if not final.exists() and (old / MANIFEST_NAME).is_file():
        os.rename(old, final)


def _check_target(final: Path, *, replace: bool) -> None:
    """Refuse a target that is in use, or that would be destroyed though it is no artefact."""
    if final.is_symlink():
        raise InputError(f"{final} is a symbolic link; give the folder that it points to, or another name")
    if not final.exists():
        return
    if not final.is_dir():
        raise InputError(f"{final} exists and is a file; choose another name for the folder")
    if not any(final.iterdir()):
        return
    if not replace:
        raise InputError(f"{final} exists already; choose another name, remove it, or ask for it to be replaced")
    if not (final / MANIFEST_NAME).is_file():
        raise InputError(
            f"{final} holds files but no {MANIFEST_NAME}, so it is not an artefact and will not be replaced; "
            "choose another name or remove it yourself"
        )


def _lock_or_refuse(partial: Path, final: Path) -> int | None:
    lock = lock_folder(partial)
    if lock is False:
        raise BeingWrittenError(f"{final} is being written by another process; wait for it or choose another name")
    return lock


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _release(partial: Path) -> None:
    """Forget a partial folder and let others write it."""
    opened = _open_partials.pop(partial, None)
    if opened is not None:
        _unlock(opened.lock)


def _abandon(partial: Path, error: BaseException) -> None:
    """Discard a partial folder, or leave one that can be gone on with if a person stopped the work."""
    opened = _open_partials.get(partial)
    if opened is not None and opened.resume and isinstance(error, KeyboardInterrupt):
        leave_artefact(partial)
    else:
        discard_artefact(partial)


def _hash_files(partial: Path, known: Mapping[str, FileEntry], leave_out: Collection[str]) -> dict[str, FileEntry]:
    entries = {}
    for name in list_files(partial, leave_out=leave_out):
        if name in known:
            size = (partial / name).stat().st_size
            assert size == known[name]["bytes"], f"{partial / name}: {size} bytes, hashed were {known[name]['bytes']}"
        entries[name] = known[name] if name in known else hash_file(partial / name)
    return entries


def _remove(folder: Path, names: Collection[str]) -> None:
    for name in names:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def _move_into_place(partial: Path, final: Path) -> None:
    """Rename the folder to its final name, swapping with an older artefact, and make the names durable."""
    if not final.exists() or not any(final.iterdir()):
        os.rename(partial, final)
    elif exchange_folders(partial, final):
        shutil.rmtree(partial, ignore_errors=True)
    else:
        # Without an atomic exchange the old artefact stands as `.<name>.old` for a moment; `_recover` knows the name.
        old = _old_of(final)
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
        try:
            os.rename(partial, final)
        except BaseException:
            os.rename(old, final)
            raise
        shutil.rmtree(old, ignore_errors=True)
    sync_folder(final.parent)
