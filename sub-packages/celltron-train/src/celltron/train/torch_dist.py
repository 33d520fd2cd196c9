"""Looking into Megatron's `torch_dist` folder before PyTorch does.

PyTorch's own reader unpickles the index `.metadata` whatever it contains, so a crafted checkpoint could run code.
Here the index is first read by an unpickler that knows the classes of an index of tensors and no other name: not those
of entries that are bytes either, which PyTorch would unpickle on loading.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from celltron.core import InputError

_ALLOWED = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.planner", name)
    for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
} | {("torch", name) for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}


class _IndexUnpickler(pickle.Unpickler):
    """Resolves only the names that an index of tensors needs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def check_torch_dist(folder: Path) -> None:
    """Refuse a `torch_dist` folder whose index holds anything but tensors.

    Raises:
        InputError: the index is missing, unreadable, names foreign objects, or points outside the folder.
    """
    index_path = folder / ".metadata"
    try:
        index = _IndexUnpickler(io.BytesIO(index_path.read_bytes())).load()
    except FileNotFoundError:
        raise InputError(f"{folder} has no .metadata, which lists its tensors; use another checkpoint") from None
    except Exception as error:  # an unpickler meets damaged bytes with any kind of exception
        raise InputError(f"{index_path} is no index of tensors ({error}); do not use this checkpoint") from None
    if not isinstance(index, Metadata):
        raise InputError(f"{index_path} is no index of tensors; do not use this checkpoint")
    for info in (index.storage_data or {}).values():
        if Path(info.relative_path).name != info.relative_path or not (folder / info.relative_path).is_file():
            raise InputError(
                f"{index_path} points to {info.relative_path!r}, which is no file of its folder; use another checkpoint"
            )
