"""Checkpoints: written by every process in Megatron's `torch_dist` format, complete or not there at all.

    <run>/checkpoints/step_00001000/state/        torch_dist shards of parameters and optimizer
                                    run.json      step, loader state, what the shards need to be read
                                    ...           the run's own files: config, vocabulary, medians, split manifest
                                    manifest.json format, version, checksum and length of every file; written last
    <run>/checkpoints/latest                      names the newest complete checkpoint

A checkpoint written under one layout is read under any other.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.api import CheckpointException

from celltron.core import InputError, begin_artefact, discard_artefact, finish_artefact, tell, write_atomically
from celltron.core.durable import name_file_in_errors
from celltron.train.async_save import Copier, Part, Save, Snapshot
from celltron.train.checkpoint_folder import (
    CHECKPOINT_FORMAT,
    CHECKPOINT_VERSION,
    LATEST_NAME,
    RUN_STATE_NAME,
    clear_leftovers,
    make_way,
    newest_complete_step,
)
from celltron.train.checkpoint_folder import STATE_FOLDER as STATE_FOLDER
from celltron.train.checkpoint_folder import RunState as RunState
from celltron.train.checkpoint_folder import describe_checkpoint as describe_checkpoint
from celltron.train.checkpoint_folder import find_checkpoint as find_checkpoint
from celltron.train.checkpoint_folder import read_resumable as read_resumable
from celltron.train.checkpoint_folder import read_run_state as read_run_state
from celltron.train.checkpoint_folder import verify_checkpoint as verify_checkpoint
from celltron.train.distributed_optimizer import allocate_moments, load_distributed_optimizer
from celltron.train.fully_sharded import DataParallel, FullyShardedModel, put_training, shard_training
from celltron.train.launch import Launch
from celltron.train.optimizer_kinds import read_other_kind
from celltron.train.parameter_shards import MODEL_METADATA as MODEL_METADATA
from celltron.train.parameter_shards import shard_parameters
from celltron.train.precision import name_dtype
from celltron.train.retention import RetentionConfig, remove_outdated
from celltron.train.together import do_on_main, share_from_main

# The optimizer's state is stored in the parameters' shapes, so that any layout reads it too.
OPTIMIZER_METADATA = {**MODEL_METADATA, "distrib_optim_sharding_type": "fully_reshardable"}


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: `<run>/checkpoints`.
        launch: This process's place.
        retention: Which are kept; None keeps all.
        files: The run's own files that travel in every checkpoint: name to text.
        first_step: The step that the run starts or continues with: checkpoints from it on, left by a run that went
            further than the checkpoint it is continued from, are of no more use once there is a new one; None takes
            the first step that is saved.
    """

    def __init__(
        self,
        folder: Path,
        *,
        launch: Launch,
        retention: RetentionConfig | None = None,
        files: Mapping[str, str] | None = None,
        first_step: int | None = None,
    ) -> None:
        self.folder = folder
        self.launch = launch
        self.retention = retention or RetentionConfig(keep_last=0)
        self.files = dict(files or {})
        self.first_step = first_step
        self._copier = Copier()
        self._save: Save | None = None
        self._written: list[int] = []

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.folder / f"step_{step:08d}"

    def begin(self, state: RunState, model: DataParallel, optimizer: MegatronOptimizer) -> Path | None:
        """Begin a checkpoint; once this returns, training may go on. Every process calls this.

        Returns:
            The checkpoint before it, if that was not complete yet and had to be waited for.

        Raises:
            Exception: as `poll`.
        """
        earlier = self.poll()
        if self._save is not None:
            if self.launch.is_main:
                name = self._save.final.name
                tell(f"{name} is still being written; step {state.step:,} waits with its own")
            earlier = self.wait()
        final = self.path(state.step)
        do_on_main(self.launch, lambda: self._clear_for(final))
        sharded = _sharded_state(model, optimizer, is_loading=False)

        def complete(snapshot: Snapshot, parts: list[Part]) -> None:
            _complete(final, state, self.files, snapshot, parts)
            write_atomically(self.folder / LATEST_NAME, final.name + "\n")
            self._written.append(state.step)
            clear_leftovers(self.folder)
            first_step = self._written[0] if self.first_step is None else self.first_step
            remove_outdated(self.retention, self.folder, written=self._written, first_step=first_step)

        self._save = _begin(final, sharded, complete, copier=self._copier, launch=self.launch, replace=True)
        return earlier

    def _clear_for(self, final: Path) -> None:
        if not self._written:
            clear_leftovers(self.folder)
        make_way(final)

    def poll(self) -> Path | None:
        """Go on with the checkpoint begun, if any, without waiting for the disk; every process calls this every step.

        Returns:
            The checkpoint, once, when it is complete.

        Raises:
            OSError: the disk is full or not writable; no half-written checkpoint is left.
            InputError: that happened to another process.
        """
        return None if self._save is None else self._end_if(self._save.poll)

    def wait(self) -> Path | None:
        """Wait for the checkpoint begun, if any; every process calls this.

        Returns:
            The checkpoint.

        Raises:
            Exception: as `poll`.
        """
        return None if self._save is None else self._end_if(self._save.wait)

    def save(self, state: RunState, model: DataParallel, optimizer: MegatronOptimizer) -> Path:
        """Write a checkpoint and wait for it; every process calls this.

        Raises:
            Exception: as `poll`.
        """
        self.begin(state, model, optimizer)
        final = self.wait()
        assert final is not None
        return final

    def close(self) -> None:
        """Give up the checkpoint begun, if any, as a run does that fails; other processes need not call this."""
        if self._save is None:
            return
        self._save.give_up()
        if self.launch.is_main:
            discard_artefact(_partial_of(self._save.final))
        self._save = None

    def _end_if(self, advance: Callable[[], bool]) -> Path | None:
        assert self._save is not None
        try:
            is_complete = advance()
        except BaseException:
            self.close()
            raise
        if not is_complete:
            return None
        final, self._save = self._save.final, None
        return final

    def newest(self) -> Path | None:
        """The newest complete checkpoint; every process calls this, the main one verifies every checksum.

        What killed saves left is removed first.

        Raises:
            InputError: there are checkpoints, but all are damaged.
        """

        def find() -> int:
            clear_leftovers(self.folder)
            return newest_complete_step(self.folder)

        step = share_from_main(self.launch, find)
        return None if step < 0 else self.path(step)


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
    sharded = {"model": shard_parameters(model)}
    save = _begin(
        path, sharded, partial(_complete, path, state, files), copier=Copier(), launch=launch, replace=replace
    )
    try:
        save.wait()
    except BaseException:
        save.give_up()
        if launch.is_main:
            discard_artefact(_partial_of(path))
        raise


def _partial_of(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


def _begin(
    final: Path,
    sharded: dict[str, Any],
    complete: Callable[[Snapshot, list[Part]], object],
    *,
    copier: Copier,
    launch: Launch,
    replace: bool,
) -> Save:
    """Make the partial folder, take the snapshot and have it written; `complete` ends it on the main process."""
    do_on_main(launch, lambda: (begin_artefact(final, replace=replace) / STATE_FOLDER).mkdir())
    try:
        with name_file_in_errors(final):
            snapshot = copier.take(sharded, _partial_of(final) / STATE_FOLDER)
    except BaseException:
        if launch.is_main:
            discard_artefact(_partial_of(final))
        raise
    return Save(snapshot, partial(complete, snapshot), final=final, launch=launch)


def _complete(final: Path, state: RunState, files: Mapping[str, str], snapshot: Snapshot, parts: list[Part]) -> None:
    """Write the index, the run's files and, last, the manifest; on the main process, beside the training."""
    folder = _partial_of(final)
    with name_file_in_errors(final):
        snapshot.write_index(parts)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / RUN_STATE_NAME).write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
        finish_artefact(
            folder,
            final,
            format=CHECKPOINT_FORMAT,
            version=CHECKPOINT_VERSION,
            meta={"step": state.step},
            files={f"{STATE_FOLDER}/{name}": entry for part in parts for name, entry in part.files.items()},
        )


def load_training(path: Path, model: DataParallel, optimizer: MegatronOptimizer) -> None:
    """Read parameters and optimizer of a verified checkpoint into this layout; every process calls this.

    Raises:
        InputError: the checkpoint's tensors do not fit the model, or its precision is another.
    """
    saved = read_resumable(path)
    dtype = name_dtype(model.module.config.params_dtype)
    if saved.dtype != dtype:
        raise InputError(
            f"precision makes {dtype} parameters, but {path} holds {saved.dtype}; continue with the same precision"
        )
    is_distributed = model.ddp_config.use_distributed_optimizer
    is_other_kind = saved.distributed_optimizer != is_distributed
    if is_other_kind and dtype == "float64":
        raise InputError(
            f"parallel.distributed_optimizer is {str(is_distributed).lower()}, but {path} was written with "
            f"{str(saved.distributed_optimizer).lower()}, and its moments would lose digits in float32; continue with "
            "the value it was written with"
        )
    if is_distributed:
        allocate_moments(optimizer)
    sharded = _sharded_state(model, optimizer, is_loading=True)
    if is_other_kind:
        read = partial(_load, path=path)
        loaded = read_other_kind(sharded, read, is_split=is_distributed, has_copies=dtype != "float32")
    else:
        loaded = _load(sharded, path)
    if isinstance(model, FullyShardedModel):
        put_training(model, optimizer, loaded)
        return
    _put_parameters(model.module, loaded["model"])
    if is_distributed:
        load_distributed_optimizer(optimizer, loaded["optimizer"])
    else:
        optimizer.load_state_dict(loaded["optimizer"])


def load_model(path: Path, model: MegatronModule) -> None:
    """Read the parameters alone of a verified checkpoint into this layout; every process calls this.

    Raises:
        InputError: the checkpoint's tensors do not fit the model.
    """
    loaded = _load({"model": shard_parameters(model)}, path)
    _put_parameters(model, loaded["model"])


def _put_parameters(module: MegatronModule, tensors: dict[str, Any]) -> None:
    """Load all parameters; Transformer Engine's modules have states besides, which are empty and not saved."""
    missing, unexpected = module.load_state_dict(tensors, strict=False)
    lost = [name for name in missing if not name.endswith("_extra_state")]
    assert not lost and not unexpected, (lost, unexpected)


def _load(sharded: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(sharded, str(path / STATE_FOLDER))
    except (dist_checkpointing.core.CheckpointingException, CheckpointException) as error:
        cause = _first_failure(error) if isinstance(error, CheckpointException) else error
        reason = " ".join(str(cause).split())[:300]
        raise InputError(
            f"the tensors in {path} do not fit this model ({reason}); use the config in the checkpoint"
        ) from error
    return loaded


def _first_failure(error: CheckpointException) -> BaseException:
    """What the first process that failed met; PyTorch tells every process of every failure."""
    _, (cause, _) = min(error.failures.items())
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return cause


def _sharded_state(model: DataParallel, optimizer: MegatronOptimizer, *, is_loading: bool) -> dict[str, Any]:
    if isinstance(model, FullyShardedModel):
        return shard_training(model, optimizer, is_loading=is_loading)
    model_state = shard_parameters(model.module)
    optimizer_state = optimizer.sharded_state_dict(
        model_state, is_loading=is_loading, metadata=dict(OPTIMIZER_METADATA)
    )
    return {"model": model_state, "optimizer": optimizer_state}
