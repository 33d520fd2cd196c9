"""The tensors of a `torch_dist` folder that another program wrote, such as NeMo 2's `weights/`.

Nothing is unpickled but the index, by the unpickler of `torch_dist`, and each tensor that is asked for, by PyTorch's
restricted one. Entries that are bytes, such as Transformer Engine's `_extra_state`, may be in the folder; they, and
`common.pt`, are never opened. What the tensors are for is not known here.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from celltron.core import InputError
from celltron.train.torch_dist import read_index

# Names in the indices of other programs: entries that are bytes, and the folder as a path, which is only put together.
_ALSO_ALLOWED = {
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.planner", "BytesIOWriteData"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
}
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class _CheckedReader(FileSystemReader):
    """PyTorch's reader with an index that was read before; its own way would unpickle anything."""

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self.index = index

    def read_metadata(self, *unused: Any, **unused_keywords: Any) -> Metadata:
        return self.index


class ForeignTensors:
    """The tensors of a folder, by name; opening it reads the index alone.

    Args:
        folder: Holds `.metadata`, `metadata.json` and the shards.

    Raises:
        InputError: the folder is of another format or damaged, its index names foreign objects, or points outside it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index = _read_index(folder)
        self.shapes = {
            str(name): tuple(entry.size)
            for name, entry in self._index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        """Name to shape, of the whole tensors."""

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read floating-point tensors whole, however they were cut, in the precision that they have.

        Raises:
            InputError: one is missing, of another kind, damaged, incomplete, or holds values that are not finite.
        """
        wanted = {name: self._allocate(name) for name in names}
        try:
            load(
                wanted,
                storage_reader=_CheckedReader(self.folder, self._index),
                planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                no_dist=True,
            )
        except (Exception, CheckpointException) as error:  # damaged shards fail in any part of zip, pickle and torch
            causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
            reason = " ".join(str(causes[0] if causes else error).split())[:200]
            raise InputError(f"{self.folder} holds damaged shards ({reason}); use an undamaged checkpoint") from None
        for name, tensor in wanted.items():
            if not bool(torch.isfinite(tensor).all()):
                raise InputError(
                    f"{self.folder}: {name} has missing parts or values that are no finite numbers; use an undamaged "
                    "checkpoint"
                )
        return wanted

    def _allocate(self, name: str) -> torch.Tensor:
        """A tensor of NaN, so that parts which no shard holds are found out."""
        entry = self._index.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise InputError(f"{self.folder} lacks the tensor {name}; use an undamaged checkpoint")
        dtype = entry.properties.dtype
        if dtype not in _DTYPES:
            raise InputError(
                f"{self.folder}: {name} is {dtype}, wanted floating point of 16, 32 or 64 bits; use another checkpoint"
            )
        num_bytes = math.prod(entry.size) * dtype.itemsize
        if num_bytes > sum(path.stat().st_size for path in self.folder.iterdir()):
            raise InputError(
                f"{self.folder}: {name} should have {num_bytes:,} bytes, more than all files hold; use an undamaged "
                "checkpoint"
            )
        return torch.full(tuple(entry.size), math.nan, dtype=dtype)


def _read_index(folder: Path) -> Metadata:
    _check_format(folder)
    index, path = read_index(folder, also_allowed=_ALSO_ALLOWED), folder / ".metadata"
    try:
        is_packed = any(info.transform_descriptors for info in index.storage_data.values())
        tensors = [entry for entry in index.state_dict_metadata.values() if isinstance(entry, TensorStorageMetadata)]
        for entry in tensors:
            if not isinstance(entry.properties.dtype, torch.dtype):
                raise TypeError("a tensor in it has no dtype")
            if not _is_shape(entry.size):
                raise TypeError("a tensor in it has no shape")
    except Exception as error:  # what was unpickled may lack any attribute
        raise InputError(f"{path} is no index of tensors ({error}); do not use this checkpoint") from None
    if is_packed:
        raise InputError(f"{path} lists shards that are compressed or encrypted; use a checkpoint that is not")
    # What else another program notes of its folder, such as where that lay, is not taken over.
    index.storage_meta = StorageMeta()
    return index


def _is_shape(size: object) -> bool:
    return isinstance(size, tuple | list) and all(type(length) is int and length >= 0 for length in size)


def _check_format(folder: Path) -> None:
    path = folder / "metadata.json"
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{folder} has no metadata.json, so it is no Megatron checkpoint; check the path") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable as JSON ({error}); use an undamaged checkpoint") from None
    found = values.get("sharded_backend") if isinstance(values, dict) else None
    if found != "torch_dist":
        raise InputError(f"{path}: sharded_backend is {found!r:.40}, wanted 'torch_dist'; convert the checkpoint first")
