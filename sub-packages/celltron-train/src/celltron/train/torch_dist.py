"""Looking into Megatron's `torch_dist` folder before PyTorch does.

PyTorch's own reader unpickles the index `.metadata` whatever it contains, so a crafted checkpoint could run code.
Here the index is first read by an unpickler that knows the classes of an index of tensors and no other name: not those
of entries that are bytes either, which PyTorch would unpickle on loading. `common.pt`, which Megatron reads with
PyTorch's restricted unpickler unless the environment says otherwise, is tried with it whatever the environment says.
"""

import io
import pickle
from collections.abc import Set
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
    """Resolves only the names that an index of tensors needs, and those of `also_allowed`: (module, name)."""

    def __init__(self, content: bytes, also_allowed: Set[tuple[str, str]]) -> None:
        super().__init__(io.BytesIO(content))
        self.allowed = _ALLOWED | also_allowed

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def check_torch_dist(folder: Path) -> None:
    """Refuse a `torch_dist` folder that holds anything but tensors and plain values.

    Raises:
        InputError: the index or `common.pt` is missing, unreadable, or names foreign objects, or the index points
            outside the folder.
    """
    _check_common(folder / "common.pt")
    read_index(folder)


def read_index(folder: Path, *, also_allowed: Set[tuple[str, str]] = frozenset()) -> Metadata:
    """Read the index of a `torch_dist` folder, which may come from anywhere, and run nothing of it.

    Args:
        folder: The folder.
        also_allowed: Module and name of what may stand in the index besides tensors; it is only put together.

    Raises:
        InputError: the index is missing, unreadable, names foreign objects, or points outside the folder.
    """
    path = folder / ".metadata"
    try:
        index = _IndexUnpickler(path.read_bytes(), also_allowed).load()
        if not isinstance(index, Metadata):
            raise TypeError(f"it holds a {type(index).__name__}")
        names = {str(info.relative_path) for info in index.storage_data.values()}
    except FileNotFoundError:
        raise InputError(f"{folder} has no .metadata, which lists its tensors; use another checkpoint") from None
    except Exception as error:  # an unpickler meets damaged bytes with any kind of exception
        raise InputError(f"{path} is no index of tensors ({error}); do not use this checkpoint") from None
    for name in sorted(names):
        if Path(name).name != name or not (folder / name).is_file():
            raise InputError(f"{path} points to {name!r}, which is no file of its folder; use another checkpoint")
    return index


def _check_common(path: Path) -> None:
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path.parent} has no {path.name}, so it is not complete; use another checkpoint") from None
    except Exception as error:  # as above
        reason = str(error).partition("\n")[0][:200]
        raise InputError(f"{path} is no file of plain values ({reason}); do not use this checkpoint") from None
