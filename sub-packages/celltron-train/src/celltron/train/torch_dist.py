"""Looking into Megatron's `torch_dist` folder before PyTorch does.

PyTorch's own reader unpickles the index `.metadata` whatever it contains, so a crafted checkpoint could run code.
Here the index is first read by an unpickler that knows the classes of an index of tensors and no other name: not those
of entries that are bytes either, which PyTorch would unpickle on loading. `common.pt`, which Megatron reads with
PyTorch's restricted unpickler unless the environment says otherwise, is tried with it whatever the environment says.
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
    """Refuse a `torch_dist` folder that holds anything but tensors and plain values.

    Raises:
        InputError: the index or `common.pt` is missing, unreadable, or names foreign objects, or the index points
            outside the folder.
    """
    _check_common(folder / "common.pt")
    index_path = folder / ".metadata"
    try:
        names = _read_file_names(index_path)
    except FileNotFoundError:
        raise InputError(f"{folder} has no .metadata, which lists its tensors; use another checkpoint") from None
    except Exception as error:  # an unpickler meets damaged bytes with any kind of exception
        raise InputError(f"{index_path} is no index of tensors ({error}); do not use this checkpoint") from None
    for name in sorted(names):
        if Path(name).name != name or not (folder / name).is_file():
            raise InputError(f"{index_path} points to {name!r}, which is no file of its folder; use another checkpoint")


def _read_file_names(index_path: Path) -> set[str]:
    """The files that an index says its tensors lie in."""
    index = _IndexUnpickler(io.BytesIO(index_path.read_bytes())).load()
    if not isinstance(index, Metadata):
        raise TypeError(f"it holds a {type(index).__name__}")
    return {str(info.relative_path) for info in index.storage_data.values()}


def _check_common(path: Path) -> None:
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path.parent} has no {path.name}, so it is not complete; use another checkpoint") from None
    except Exception as error:  # as above
        reason = str(error).partition("\n")[0][:200]
        raise InputError(f"{path} is no file of plain values ({reason}); do not use this checkpoint") from None
