"""What lies in a run's `checkpoints` folder: finding the newest complete checkpoint, checking one, clearing away.

A folder `step_00001000` is there as a whole or not at all; its `manifest.json` says whether it still is what was
written. Names that begin with a point are not looked at: a save, or a removal, that goes on or was killed.
"""

import json
import os
import shutil
import stat
from dataclasses import dataclass, field
from pathlib import Path

from celltron.core import InputError, build_config, read_manifest, tell, verify_artefact
from celltron.core.durable import lock_folder, sync_folder
from celltron.core.manifest import MANIFEST_NAME, list_files
from celltron.train.spike import SpikeState
from celltron.train.torch_dist import check_torch_dist

CHECKPOINT_FORMAT = "celltron-checkpoint"
CHECKPOINT_VERSION = 1
LATEST_NAME = "latest"
STATE_FOLDER = "state"
RUN_STATE_NAME = "run.json"

_said_to_stay: set[Path] = set()
"""What this process has said it cannot remove."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """What continues a run besides parameters and optimizer."""

    step: int
    """Steps taken."""
    seed: int
    """The run's seed: with the step, the whole state of dropout's generators."""
    loader: dict[str, int]
    """Where the training batches stand, as the stream gave it."""
    distributed_optimizer: bool
    """Whether the optimizer's state was split between data-parallel processes."""
    dtype: str
    """Of the parameters."""
    has_optimizer: bool = True
    """Whether the optimizer's state is there too; without it, as after an import, no run can be resumed."""
    validation_loss: float | None = None
    """In nats, of these parameters; None where it was not measured."""
    spike: SpikeState = field(default_factory=SpikeState)
    """What tells spikes of the loss."""
    skipped_in_a_row: int = 0
    """Steps up to this one that changed nothing, since their loss or gradient was no finite number."""

    def __post_init__(self) -> None:
        if self.skipped_in_a_row < 0:
            raise ValueError(f"skipped_in_a_row is {self.skipped_in_a_row}, but must not be negative")


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first; whether they are undamaged is not checked."""
    return sorted(path for path in folder.glob("step_????????") if path.is_dir() and path.name[5:].isdecimal())


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step_"))


def newest_complete_step(folder: Path) -> int:
    """Step of the newest complete checkpoint, -1 where there is none; damaged newer ones are named on stderr.

    Raises:
        InputError: there are checkpoints, but all are damaged.
    """
    problems = []
    for path in reversed(_up_to_latest(folder)):
        try:
            verify_checkpoint(path)
            _check_name(path)
        except InputError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            tell(f"{problem}; using the older {path.name} instead")
        return step_of(path)
    if problems:
        raise InputError(f"no checkpoint in {folder} is complete: {problems[0]}")
    return -1


def _check_name(path: Path) -> None:
    step = read_run_state(path).step
    if step != step_of(path):
        raise InputError(f"{path / RUN_STATE_NAME} is of step {step}, so {path.name} was moved or renamed; undo that")


def _up_to_latest(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first, up to the one that `latest` names: later ones are of an abandoned run."""
    found = list_checkpoints(folder)
    pointer = folder / LATEST_NAME
    name = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""
    names = [path.name for path in found]
    return found[: names.index(name) + 1] if name in names else found


def find_checkpoint(path: Path) -> Path:
    """The newest checkpoint of a run, given the run's folder or its `checkpoints`; any other path is given back.

    Raises:
        InputError: `latest` does not hold the name of a checkpoint.
    """
    for folder in (path, path / "checkpoints"):
        pointer = folder / LATEST_NAME
        if pointer.is_file():
            name = pointer.read_text(encoding="utf-8", errors="replace").strip()
            if not name or Path(name).name != name:
                raise InputError(f"{pointer} holds {name[:60]!r}, no checkpoint's name; give a checkpoint instead")
            return folder / name
    return path


def verify_checkpoint(path: Path) -> None:
    """Check format, version, every file's length and checksum, and that the shards hold nothing but tensors.

    Raises:
        InputError: names the first thing that is wrong, a file too many among them.
    """
    if not path.is_dir():
        raise InputError(f"{path} is no checkpoint folder; give a folder such as RUN/checkpoints/step_00001000")
    manifest = read_manifest(path, format=CHECKPOINT_FORMAT, versions=[CHECKPOINT_VERSION])
    for name in list_files(path):
        if name not in manifest["files"]:
            raise InputError(f"{path / name}: the checkpoint was written without this file; move it elsewhere")
    verify_artefact(path)
    check_torch_dist(path / STATE_FOLDER)


def describe_checkpoint(path: Path) -> str:
    """A few lines on what a checkpoint holds."""
    manifest = read_manifest(path, format=CHECKPOINT_FORMAT, versions=[CHECKPOINT_VERSION])
    state = read_run_state(path)
    num_bytes = sum(entry["bytes"] for entry in manifest["files"].values())
    loss = "" if state.validation_loss is None else f"validation loss {state.validation_loss:.4f} nats; "
    return (
        f"{path}: checkpoint of step {state.step:,}, {state.dtype} parameters, {num_bytes / 1e6:,.1f} MB in "
        f"{len(manifest['files'])} files\nwritten by celltron {manifest['celltron_version']}; {loss}"
        f"next cell: place {state.loader.get('position', 0):,} of epoch {state.loader.get('epoch', 0):,}"
    )


def read_run_state(path: Path) -> RunState:
    """Read `run.json` of a verified checkpoint."""
    try:
        values = json.loads((path / RUN_STATE_NAME).read_text(encoding="utf-8"))
        return build_config(RunState, values, where=RUN_STATE_NAME)
    except ValueError as error:
        raise InputError(
            f"{path} does not hold the run.json that this celltron writes ({error}); use the version that wrote it"
        ) from None


def read_resumable(path: Path) -> RunState:
    """Read `run.json` of a verified checkpoint that a run is to go on from.

    Raises:
        InputError: it holds no optimizer's state.
    """
    state = read_run_state(path)
    if not state.has_optimizer:
        raise InputError(
            f"{path} holds a model without an optimizer's state, as an import writes it, so no run can be resumed from "
            "it; give a checkpoint of a run"
        )
    return state


def remove_checkpoint(path: Path) -> bool:
    """Remove a checkpoint, but not one whose folder a person made read-only to protect it.

    A removal that is killed on the way leaves nothing that looks like a checkpoint; one that fails is said once.

    Returns:
        Whether there is no checkpoint of that name any more.
    """
    try:
        is_protected = not path.stat().st_mode & stat.S_IWUSR  # asking for access would not do: root has it anyway
    except OSError:
        is_protected = False
    if is_protected:
        _say_it_stays(path, "its folder is read-only")
        return False
    return _put_away(path)


def make_way(path: Path) -> None:
    """Remove what has the name of a checkpoint that is about to be written, but cannot be replaced by it.

    That is a folder without manifest, a file or a link; what has a manifest stays until the new one is complete.
    """
    is_link = path.is_symlink()
    if not os.path.lexists(path) or (not is_link and (path / MANIFEST_NAME).is_file()):
        return
    reason = "is a link" if is_link else f"has no {MANIFEST_NAME}"
    tell(f"{path} {reason}; it is removed to make way for this step's checkpoint")
    _put_away(path)


def clear_leftovers(folder: Path) -> None:
    """Remove what killed saves and removals left, and what could not be removed before; what cannot is said once.

    What another process is writing now stays.
    """
    for pattern in (".step_????????.partial", ".step_????????.removed", f".{LATEST_NAME}.*.tmp"):
        for left in folder.glob(pattern):
            _clear(left)


def _put_away(path: Path) -> bool:
    """Take a checkpoint's name away, which is one step, and remove it; False where not even its name can be taken."""
    removed = path.with_name(f".{path.name}.removed")
    try:
        if os.path.lexists(removed):
            _clear(removed)
        os.rename(path, removed)
        sync_folder(path.parent)
    except OSError as error:
        _say_it_stays(path, error.strerror or str(error))
        return False
    _clear(removed)
    return True


def _clear(left: Path) -> None:
    """Remove a file, a link, or a folder that no process is writing."""
    try:
        if left.is_symlink() or not left.is_dir():
            left.unlink()
            return
        lock = lock_folder(left)
        if lock is not False:
            try:
                shutil.rmtree(left)
            finally:
                if lock is not None:
                    os.close(lock)
    except OSError as error:
        _say_it_stays(left, f"{Path(error.filename or left).name}: {error.strerror or error}")


def _say_it_stays(path: Path, reason: str) -> None:
    """Say so once; a run must not end for what it could do without."""
    if path not in _said_to_stay and os.path.lexists(path):
        _said_to_stay.add(path)
        tell(f"{path} cannot be removed ({reason}); every save tries again")
