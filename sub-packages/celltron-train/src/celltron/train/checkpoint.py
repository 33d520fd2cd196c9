"""Checkpoints: written by every process through Megatron's `dist_checkpointing`, complete or not there at all.

    <run>/checkpoints/step_00001000/state/        torch_dist shards of parameters and optimizer
                                    run.json      step, loader state, what the shards need to be read
                                    ...           the run's own files: config, vocabulary, medians, split manifest
                                    manifest.json format, version, checksum and length of every file; written last
    <run>/checkpoints/latest                      names the newest complete checkpoint

A checkpoint written under one layout is read under any other.
"""

import errno
import json
import logging
import os
import queue
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.api import CheckpointException

from celltron.core import (
    InputError,
    begin_artefact,
    build_config,
    discard_artefact,
    finish_artefact,
    read_manifest,
    verify_artefact,
    write_atomically,
)
from celltron.core.durable import name_file_in_errors
from celltron.train.distributed_optimizer import allocate_moments, load_distributed_optimizer
from celltron.train.launch import Launch
from celltron.train.precision import name_dtype
from celltron.train.together import do_on_main, share_from_main
from celltron.train.torch_dist import check_torch_dist

CHECKPOINT_FORMAT = "celltron-checkpoint"
CHECKPOINT_VERSION = 1
LATEST_NAME = "latest"
STATE_FOLDER = "state"
# Layers are stored one by one, and the optimizer's state in the parameters' shapes, so that any layout reads both.
MODEL_METADATA = {"non_homogeneous_layers": True}
OPTIMIZER_METADATA = {**MODEL_METADATA, "distrib_optim_sharding_type": "fully_reshardable"}
# What PyTorch says when its archive meets a full disk; what the system said is lost.
_ARCHIVE_CUT_SHORT = re.compile(r"inline_container\.cc|iostream error")


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


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: `<run>/checkpoints`.
        launch: This process's place.
        keep: How many of the newest to keep; 0 keeps all.
        files: The run's own files that travel in every checkpoint: name to text.
    """

    def __init__(
        self, folder: Path, *, launch: Launch, keep: int = 0, files: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.launch = launch
        self.keep = keep
        self.files = dict(files or {})

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.folder / f"step_{step:08d}"

    def save(self, state: RunState, model: DistributedDataParallel, optimizer: MegatronOptimizer) -> Path:
        """Write a checkpoint; every process calls this.

        Raises:
            OSError: the disk is full or not writable; no half-written checkpoint is left.
        """
        final = self.path(state.step)
        sharded = _sharded_state(model.module, optimizer, is_loading=False)
        _write(final, state, sharded, files=self.files, launch=self.launch, replace=True)
        do_on_main(self.launch, lambda: self._point_to(final))
        return final

    def _point_to(self, final: Path) -> None:
        write_atomically(self.folder / LATEST_NAME, final.name + "\n")
        if self.keep:
            others = [path for path in list_checkpoints(self.folder) if path != final]
            for old in others[: max(0, len(others) + 1 - self.keep)]:
                shutil.rmtree(old)

    def newest(self) -> Path | None:
        """The newest complete checkpoint; every process calls this, the main one verifies every checksum.

        Raises:
            InputError: there are checkpoints, but all are damaged.
        """
        step = share_from_main(self.launch, lambda: _newest_complete_step(self.folder))
        return None if step < 0 else self.path(step)


def _newest_complete_step(folder: Path) -> int:
    """Step of the newest complete checkpoint, -1 where there is none; damaged newer ones are named."""
    problems = []
    for path in reversed(_up_to_latest(folder)):
        try:
            verify_checkpoint(path)
        except InputError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            print(f"{problem}; using the older {path.name} instead", file=sys.stderr)
        return int(path.name.removeprefix("step_"))
    if problems:
        raise InputError(f"no checkpoint in {folder} is complete: {problems[0]}")
    return -1


def save_model(
    path: Path,
    state: RunState,
    model: MegatronModule,
    *,
    files: Mapping[str, str],
    launch: Launch,
    replace: bool = False,
) -> None:
    """Write a checkpoint of parameters alone, which belongs to no run; every process calls this.

    Args:
        path: The checkpoint's folder.
        state: Its `has_optimizer` is False.
        model: This process's part of the model.
        files: What explains the checkpoint: name to text.
        launch: This process's place.
        replace: Whether `path` may be a checkpoint already.

    Raises:
        InputError: the folder is in use.
        OSError: the disk is full or not writable; no half-written checkpoint is left.
    """
    assert not state.has_optimizer, state
    sharded = {"model": _model_state(model)}
    _write(path, state, sharded, files=files, launch=launch, replace=replace)


def _write(
    final: Path,
    state: RunState,
    sharded: dict[str, Any],
    *,
    files: Mapping[str, str],
    launch: Launch,
    replace: bool,
) -> None:
    partial = final.with_name(f".{final.name}.partial")

    def finish() -> None:
        for name, text in files.items():
            (partial / name).write_text(text, encoding="utf-8")
        (partial / "run.json").write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
        finish_artefact(partial, final, format=CHECKPOINT_FORMAT, version=CHECKPOINT_VERSION, meta={"step": state.step})

    do_on_main(launch, lambda: (begin_artefact(final, replace=replace) / STATE_FOLDER).mkdir())
    try:
        with name_file_in_errors(final):
            _save_shards(sharded, partial / STATE_FOLDER)
            do_on_main(launch, finish)
    except BaseException:
        if launch.is_main:
            discard_artefact(partial)
        raise


def _save_shards(sharded: dict[str, Any], folder: Path) -> None:
    # Megatron would serve this queue from a process of its own, which dies of a signal sent to the whole run and
    # outlives a run that is killed. Saving is synchronous here, so the writers' answers never leave this process.
    filesystem_async._results_queue = queue.Queue()
    filesystem_async.logger.setLevel(logging.CRITICAL)  # what a writer met is in the error raised here
    try:
        dist_checkpointing.save(sharded, str(folder))
    except CheckpointException as error:
        if not error.failures:
            raise InputError("another process of this run could not write its part; its message says why") from error
        rank, cause = _first_failure(error)
        raise _as_os_error(cause, folder.parent, f"process {rank}") from error
    except RuntimeError as error:
        if not _ARCHIVE_CUT_SHORT.search(str(error)):
            raise
        raise _as_os_error(error, folder.parent, "the main process") from error


def _as_os_error(cause: BaseException, folder: Path, where: str) -> OSError:
    # A writer is a process of its own, from which only the text of its error comes back.
    found = re.search(r"\[Errno (\d+)\]", str(cause))
    number = int(found[1]) if found else errno.EIO
    reason = os.strerror(number) if found else f"{type(cause).__name__}: {cause}"
    if _ARCHIVE_CUT_SHORT.search(reason):
        reason = "the tensors could not be written to their end, as on a full disk"
    return OSError(number, f"{reason} (on {where})", str(folder))


def _first_failure(error: CheckpointException) -> tuple[int, BaseException]:
    """The first process that failed and what it met; PyTorch tells every process of every failure."""
    rank, (cause, _) = min(error.failures.items())
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return rank, cause


def _up_to_latest(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first, up to the one that `latest` names: later ones are of an abandoned run."""
    found = list_checkpoints(folder)
    pointer = folder / LATEST_NAME
    name = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""
    names = [path.name for path in found]
    return found[: names.index(name) + 1] if name in names else found


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first; whether they are undamaged is not checked."""
    return sorted(path for path in folder.glob("step_????????") if path.is_dir())


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
        InputError: names the first thing that is wrong.
    """
    if not path.is_dir():
        raise InputError(f"{path} is no checkpoint folder; give a folder such as RUN/checkpoints/step_00001000")
    read_manifest(path, format=CHECKPOINT_FORMAT, versions=[CHECKPOINT_VERSION])
    verify_artefact(path)
    check_torch_dist(path / STATE_FOLDER)


def describe_checkpoint(path: Path) -> str:
    """A few lines on what a checkpoint holds."""
    manifest = read_manifest(path, format=CHECKPOINT_FORMAT, versions=[CHECKPOINT_VERSION])
    state = read_run_state(path)
    num_bytes = sum(entry["bytes"] for entry in manifest["files"].values())
    return (
        f"{path}: checkpoint of step {state.step:,}, {state.dtype} parameters, {num_bytes / 1e6:,.1f} MB in "
        f"{len(manifest['files'])} files\nwritten by celltron {manifest['celltron_version']}; "
        f"next cell: place {state.loader.get('position', 0):,} of epoch {state.loader.get('epoch', 0):,}"
    )


def read_run_state(path: Path) -> RunState:
    """Read `run.json` of a verified checkpoint."""
    try:
        values = json.loads((path / "run.json").read_text(encoding="utf-8"))
        return build_config(RunState, values, where="run.json")
    except ValueError as error:
        raise InputError(
            f"{path} does not hold the run.json that this celltron writes ({error}); use the version that wrote it"
        ) from None


def load_training(path: Path, model: DistributedDataParallel, optimizer: MegatronOptimizer) -> None:
    """Read parameters and optimizer of a verified checkpoint into this layout; every process calls this.

    Raises:
        InputError: the checkpoint's tensors do not fit the model, or its optimizer is of the other kind.
    """
    saved = read_run_state(path)
    if not saved.has_optimizer:
        raise InputError(
            f"{path} holds a model without an optimizer's state, as an import writes it, so no run can be resumed from "
            "it; give a checkpoint of a run"
        )
    is_distributed = model.ddp_config.use_distributed_optimizer
    if saved.distributed_optimizer != is_distributed:
        raise InputError(
            f"parallel.distributed_optimizer is {str(is_distributed).lower()}, but {path} was written with "
            f"{str(saved.distributed_optimizer).lower()}; continue with the value it was written with"
        )
    dtype = name_dtype(model.module.config.params_dtype)
    if saved.dtype != dtype:
        raise InputError(
            f"precision makes {dtype} parameters, but {path} holds {saved.dtype}; continue with the same precision"
        )
    if is_distributed:
        allocate_moments(optimizer)
    sharded = _sharded_state(model.module, optimizer, is_loading=True)
    loaded = _load(sharded, path)
    model.module.load_state_dict(loaded["model"])
    if is_distributed:
        load_distributed_optimizer(optimizer, loaded["optimizer"])
    else:
        optimizer.load_state_dict(loaded["optimizer"])


def load_model(path: Path, model: MegatronModule) -> None:
    """Read the parameters alone of a verified checkpoint into this layout; every process calls this.

    Raises:
        InputError: the checkpoint's tensors do not fit the model.
    """
    loaded = _load({"model": _model_state(model)}, path)
    model.load_state_dict(loaded["model"])


def _load(sharded: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(sharded, str(path / STATE_FOLDER))
    except (dist_checkpointing.core.CheckpointingException, CheckpointException) as error:
        cause = _first_failure(error)[1] if isinstance(error, CheckpointException) else error
        reason = " ".join(str(cause).split())[:300]
        raise InputError(
            f"the tensors in {path} do not fit this model ({reason}); use the config in the checkpoint"
        ) from error
    return loaded


def _sharded_state(module: MegatronModule, optimizer: MegatronOptimizer, *, is_loading: bool) -> dict[str, Any]:
    model_state = _model_state(module)
    optimizer_state = optimizer.sharded_state_dict(
        model_state, is_loading=is_loading, metadata=dict(OPTIMIZER_METADATA)
    )
    return {"model": model_state, "optimizer": optimizer_state}


def _model_state(module: MegatronModule) -> dict[str, ShardedTensor]:
    """The parameters; Megatron's `_extra_state` objects, empty for these layers, would be read back as pickle."""
    state = module.sharded_state_dict(metadata=dict(MODEL_METADATA))
    return {name: entry for name, entry in state.items() if isinstance(entry, ShardedTensor)}
