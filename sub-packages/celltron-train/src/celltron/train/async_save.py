"""Writing a checkpoint's tensors while training goes on.

A save has three stages:

    snapshot    this process's share of parameters and optimizer is copied to host memory; training may go on
    parts       a thread of every process writes its share into one file, hashes it on the way, pushes it to the disk
    finishing   a thread of the main process writes the index, and whatever makes the checkpoint complete

Threads never communicate: the processes agree between two steps, on their main threads, that a stage is over. There are
no processes of their own either, as Megatron's writers are: a killed run takes its threads with it.
"""

import copy
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch.distributed.checkpoint.filesystem import (
    DEFAULT_SUFFIX,
    SerializationFormat,
    _StorageWriterTransforms,
    _write_item,
)
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from celltron.core import InputError
from celltron.core.durable import FileEntry, HashedFile
from celltron.train.launch import Launch, patient_group
from celltron.train.together import do_together

# Which tensor, which part of it: its name and the offset of the part.
_ShardKey = tuple[str, tuple[int, ...]]


class _Writer(FileSystemWriterAsync):
    """Megatron's writer, for plan and index only: it would have processes write the tensors."""

    def prepare_write_data(self, plan: Any, planner: Any) -> None:
        """Leave the tensors alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """Who writes what, which stays the same from save to save."""

    shapes: Mapping[_ShardKey, tuple[Any, ...]]
    """Shape, whole tensor's shape and dtype of every tensor here, also of those that another process writes."""
    items: list[WriteItem]
    """What this process writes."""
    file_name: str
    index: Metadata | None
    """On the main process: where every tensor's parts lie in it, but not in which file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one process did of a save; it is sent to the main one."""

    results: list[WriteResult] = field(default_factory=list)
    """Where each tensor lies in its file."""
    files: dict[str, FileEntry] = field(default_factory=dict)
    """Length and checksum of the files, by their names in the folder of shards."""
    failure: tuple[int, str] | None = None
    """The system's number of the error (0 without one) and its text."""


class Snapshot:
    """One process's share of one checkpoint, in host memory.

    Args:
        folder: Where the shards go.
        plan: Says which.
        tensors: On the host, in the order of the plan's items.
        common: What all processes share: numbers of the optimizer; None but on the main process.
    """

    def __init__(self, folder: Path, plan: _Plan, tensors: list[torch.Tensor], common: dict[str, Any] | None) -> None:
        self.folder = folder
        self.plan = plan
        self.tensors = tensors
        self.common = common
        self.is_abandoned = threading.Event()

    def write(self) -> Part:
        """Write this process's files; runs beside the training.

        Raises:
            OSError: the disk is full or not writable.
        """
        try:
            return self._write()
        except RuntimeError as error:
            # PyTorch's archive, when it is closed halfway, says that it was; why, the error before it does.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise

    def _write(self) -> Part:
        results: list[WriteResult] = []
        files: dict[str, FileEntry] = {}
        name = self.plan.file_name
        stream: Any  # HashedFile has what PyTorch wants of a file, but is none to a type checker
        if self.plan.items:
            with HashedFile(self.folder / name) as stream:
                for item, tensor in zip(self.plan.items, self.tensors, strict=True):
                    if self.is_abandoned.is_set():
                        return Part(failure=(0, "the save was given up"))
                    how = _StorageWriterTransforms(), stream, tensor, item, name, SerializationFormat.TORCH_SAVE
                    results.append(_write_item(*how))
            files[name] = stream.entry()
            _push_to_disk(self.folder / name)
        if self.common is not None:
            with HashedFile(self.folder / COMMON_STATE_FNAME) as stream:
                torch.save(self.common, stream)  # noqa: TID251 - as Megatron writes it; read back without pickle
            files[COMMON_STATE_FNAME] = stream.entry()
        return Part(results=results, files=files)

    def write_index(self, parts: list[Part]) -> None:
        """Write Megatron's index of all processes' parts; on the main process, beside the training.

        Raises:
            InputError: another process's file is not there.
            OSError: the disk is full or not writable.
        """
        for rank, part in enumerate(parts):
            for name in part.files:
                if not (self.folder / name).is_file():
                    raise InputError(
                        f"{self.folder / name} was written by process {rank}, but the main process does not find it; "
                        "the run's folder must lie on a file system that all processes share"
                    )
        _Writer(str(self.folder)).finish(self.plan.index, [part.results for part in parts])
        save_config(CheckpointingConfig("torch_dist", 1), str(self.folder))


class Copier:
    """Takes snapshots; keeps the plan and the host memory from one to the next."""

    def __init__(self) -> None:
        self._plan: _Plan | None = None
        self._copies: dict[MetadataIndex, torch.Tensor] = {}

    def take(self, sharded: dict[str, Any], folder: Path) -> Snapshot:
        """Copy what this process will write; every process calls this.

        Args:
            sharded: Megatron's sharded state; its tensors may change once this has returned.
            folder: Where the shards will go; it is there.
        """
        tensors, common = save_preprocess(sharded, validate_access_integrity=False)
        shards = {_key_of(shard): shard for shard in nested_values(tensors)}
        assert all(isinstance(shard, ShardedTensor) for shard in shards.values()), "objects would be pickled"
        shapes = {key: (shard.local_shape, shard.global_shape, shard.dtype) for key, shard in shards.items()}
        # Planning has every process tell every other of all its tensors, which takes longer than copying them.
        if not all_agree(self._plan is not None and self._plan.shapes == shapes):
            validate_sharding_integrity(determine_global_metadata(tensors)[1], common_state_dict=common)
            self._plan = _make_plan(tensors, shapes, folder)
            self._copies = {}
        assert self._plan is not None
        copies = [self._copy(item.index, shards[_key_in(item)].data) for item in self._plan.items]
        torch.cuda.synchronize()
        is_main = self._plan.index is not None
        return Snapshot(folder, self._plan, copies, copy.deepcopy(common) if is_main else None)

    def _copy(self, index: MetadataIndex, tensor: torch.Tensor) -> torch.Tensor:
        if index not in self._copies:
            # From pinned memory only does a GPU copy beside other work.
            self._copies[index] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
        return self._copies[index].copy_(tensor.detach(), non_blocking=True)


def _key_of(shard: ShardedTensor) -> _ShardKey:
    assert shard.flattened_range is None and shard.prepend_axis_num == 0, shard
    return shard.key, tuple(shard.global_offset)


def _key_in(item: WriteItem) -> _ShardKey:
    assert item.index.offset is not None, item
    return item.index.fqn, tuple(item.index.offset)


def _make_plan(tensors: dict[str, Any], shapes: Mapping[_ShardKey, tuple[Any, ...]], folder: Path) -> _Plan:
    """Have Megatron deal tensors to the processes; replicas, such as data-parallel ones, share the work."""
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    distribution = determine_main_replica_uniform_distribution(tensors, replicas)
    distribute_main_replicas_with_precomputed_distribution(tensors, replicas, distribution)
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(tensors, keep_only_main_replica=True)
    planned = save_state_dict_async_plan(
        mcore_to_pyt_state_dict(by_key),
        _Writer(str(folder)),
        patient_group(),
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
    )
    (_, index, _), plan = planned[:2]
    return _Plan(
        shapes=shapes,
        items=list(plan.items),
        file_name=f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}",
        index=index,
    )


class Save:
    """A save in flight: from the snapshot to the complete checkpoint.

    Args:
        snapshot: What to write; writing begins at once.
        finish: Completes the checkpoint, given every process's part; called on the main process, beside the training.
        final: The checkpoint's name, for errors.
        launch: This process's place.
    """

    def __init__(
        self, snapshot: Snapshot, finish: Callable[[list[Part]], object], *, final: Path, launch: Launch
    ) -> None:
        self.final = final
        self._snapshot = snapshot
        self._finish = finish
        self._launch = launch
        self._is_finishing = False
        self._failure: Exception | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._work: Future[Any] | None = self._thread.submit(snapshot.write)

    def poll(self) -> bool:
        """Whether the checkpoint is complete; every process calls this between two steps, and none waits for the disk.

        Raises:
            OSError: writing failed here, or anywhere on the main process.
            InputError: writing failed on another process.
        """
        return all_agree(self._work is None or self._work.done()) and self._go_on()

    def wait(self) -> bool:
        """Wait until the checkpoint is complete, and say so; every process calls this.

        Raises:
            Exception: as `poll`.
        """
        while not self._go_on():
            pass
        return True

    def give_up(self) -> None:
        """Stop writing, or wait for what completes the checkpoint; other processes need not call this, or be alive."""
        self._snapshot.is_abandoned.set()
        self._thread.shutdown(wait=True)

    def _go_on(self) -> bool:
        """End a stage, waiting for the thread and the other processes; True after the last one."""
        if self._is_finishing:
            do_together(lambda: self._work and self._work.result())
            self._thread.shutdown()
            return True
        parts = _gather(self._outcome(), self._launch)
        do_together(lambda: self._refuse_failures(parts))
        self._is_finishing = True
        self._work = self._thread.submit(self._finish, parts) if self._launch.is_main else None
        return False

    def _outcome(self) -> Part:
        assert self._work is not None
        wait([self._work])
        error = self._work.exception()
        if error is None:
            part: Part = self._work.result()
            return part
        if not isinstance(error, Exception):
            raise error
        self._failure = error
        if isinstance(error, OSError):
            return Part(failure=(error.errno or 0, error.strerror or str(error)))
        return Part(failure=(0, f"{type(error).__name__}: {error}"))

    def _refuse_failures(self, parts: list[Part]) -> None:
        if isinstance(self._failure, OSError):
            raise OSError(self._failure.errno, self._failure.strerror, str(self.final)) from self._failure
        if self._failure is not None:
            raise self._failure
        for rank, part in enumerate(parts):
            if part.failure is not None:
                number, reason = part.failure
                if number:
                    raise OSError(number, f"{reason} (on process {rank})", str(self.final))
                raise InputError(f"{self.final} was not written: {reason} (on process {rank})")


def all_agree(is_so: bool) -> bool:
    """Whether something is so on every process; every process calls this."""
    is_so_on_all = torch.tensor([int(is_so)], dtype=torch.int64)
    torch.distributed.all_reduce(is_so_on_all, op=torch.distributed.ReduceOp.MIN, group=patient_group())
    return bool(is_so_on_all.item())


def _gather(part: Part, launch: Launch) -> list[Part]:
    """Every process's part on the main one, nothing on the others."""
    parts: list[Any] = [None] * launch.world_size
    torch.distributed.gather_object(part, parts if launch.is_main else None, group=patient_group())
    return parts if launch.is_main else []


def _push_to_disk(path: Path) -> None:
    # The main process does so at the end with all files, but would not reach what another machine holds in memory.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
