"""Reading a folder of tensors that another program wrote: values, and all that can be wrong with it."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from celltron.core import InputError
from celltron.train.foreign_tensors import ForeignTensors

pytestmark = pytest.mark.usefixtures("engine")


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


WHOLE = torch.arange(24.0).reshape(4, 6)


@pytest.fixture(scope="module")
def saved(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tensor whole, one in four pieces, one of whole numbers, and an object."""
    folder = tmp_path_factory.mktemp("foreign") / "weights"
    folder.mkdir()
    pieces = {
        f"piece {i} {j}": ShardedTensor.from_rank_offsets(
            "pieces", WHOLE[2 * i : 2 * i + 2, 3 * j : 3 * j + 3].clone(), (0, i, 2), (1, j, 2)
        )
        for i in range(2)
        for j in range(2)
    }
    state = {
        **pieces,
        "whole": ShardedTensor.from_rank_offsets("whole", torch.tensor([1.5, -2.25], dtype=torch.bfloat16)),
        "counts": ShardedTensor.from_rank_offsets("counts", torch.arange(3)),
        "object": ShardedObject("linear._extra_state", Payload(folder.parent / "trace"), (1,), (0,)),
        "common": "a plain value",
    }
    dist_checkpointing.save(state, str(folder), validate_access_integrity=False)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to spoil."""
    return shutil.copytree(saved, tmp_path / "weights")


def test_tensors_are_read_whole_in_their_precision(saved: Path) -> None:
    tensors = ForeignTensors(saved)
    assert tensors.shapes == {"pieces": (4, 6), "whole": (2,), "counts": (3,)}
    found = tensors.read(["pieces", "whole"])
    assert found["pieces"].dtype is torch.float32 and torch.equal(found["pieces"], WHOLE)
    assert found["whole"].dtype is torch.bfloat16 and found["whole"].tolist() == [1.5, -2.25]


def test_objects_and_common_values_are_never_opened(saved: Path, folder: Path) -> None:
    (folder / "common.pt").write_bytes(pickle.dumps(Payload(folder / "trace")))
    ForeignTensors(folder).read(["pieces", "whole"])
    assert not (folder / "trace").exists() and not (saved.parent / "trace").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nothing", "lacks the tensor nothing"),
        ("linear._extra_state/shard_0_1", "lacks the tensor linear._extra_state"),
        ("counts", "counts is torch.int64, wanted floating point"),
    ],
)
def test_what_is_no_tensor_of_numbers_is_refused(saved: Path, name: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        ForeignTensors(saved).read([name])


def change_index(folder: Path, change: Callable[[Metadata], Any]) -> None:
    with (folder / ".metadata").open("rb") as stream:
        index = pickle.load(stream)
    changed = change(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index if changed is None else changed))


def entry_of(index: Metadata, name: str) -> TensorStorageMetadata:
    entry = index.state_dict_metadata[name]
    assert isinstance(entry, TensorStorageMetadata)
    return entry


def resize(folder: Path, size: object) -> None:
    change_index(folder, lambda index: setattr(entry_of(index, "pieces"), "size", size))


def point_to(index: Metadata, path: str) -> None:
    for info in index.storage_data.values():
        info.relative_path = path


def squeeze(index: Metadata) -> None:
    for info in index.storage_data.values():
        info.transform_descriptors = ["zstd"]


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch trace",)


SPOILERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no format": (lambda folder: (folder / "metadata.json").unlink(), "has no metadata.json"),
    "format no JSON": (lambda folder: (folder / "metadata.json").write_text("{"), "not readable as JSON"),
    "format a list": (lambda folder: (folder / "metadata.json").write_text("[]"), "sharded_backend is None"),
    "no index": (lambda folder: (folder / ".metadata").unlink(), "has no .metadata"),
    "index cut short": (
        lambda folder: (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:-40]),
        "is no index of tensors",
    ),
    "index of another kind": (lambda folder: change_index(folder, lambda index: {"a": 1}), "it holds a dict"),
    "code": (lambda folder: change_index(folder, lambda index: RunsCode()), "it names posix.system"),
    "code inside": (
        lambda folder: change_index(folder, lambda index: setattr(index, "storage_meta", RunsCode())),
        "it names posix.system",
    ),
    "outside": (lambda folder: change_index(folder, lambda index: point_to(index, "../weights/x")), "no file of its"),
    "absolute": (lambda folder: change_index(folder, lambda index: point_to(index, "/etc/passwd")), "no file of its"),
    "compressed": (lambda folder: change_index(folder, squeeze), "compressed or encrypted"),
    "no dtype": (
        lambda folder: change_index(folder, lambda index: setattr(entry_of(index, "pieces").properties, "dtype", 3)),
        "has no dtype",
    ),
    "dtype of 8 bits": (
        lambda folder: change_index(
            folder, lambda index: setattr(entry_of(index, "pieces").properties, "dtype", torch.float8_e4m3fn)
        ),
        "pieces is torch.float8_e4m3fn, wanted floating point of 16, 32 or 64 bits",
    ),
    "no shape": (lambda folder: resize(folder, None), "a tensor in it has no shape"),
    "shape of one number": (lambda folder: resize(folder, 24), "a tensor in it has no shape"),
    "shape with a fraction": (lambda folder: resize(folder, (4, 6.0)), "a tensor in it has no shape"),
    "shape with a truth": (lambda folder: resize(folder, (True, 6)), "a tensor in it has no shape"),
    "shape below zero": (lambda folder: resize(folder, (-4, -6)), "a tensor in it has no shape"),
    "piece left out": (
        lambda folder: change_index(folder, lambda index: entry_of(index, "pieces").chunks.pop() and None),
        "pieces has missing parts",
    ),
    "piece without place": (
        lambda folder: change_index(
            folder, lambda index: index.storage_data.pop(MetadataIndex("pieces", torch.Size([2, 3])), None) and None
        ),
        "holds damaged shards",
    ),
    "enormous": (
        lambda folder: resize(folder, torch.Size([10**12, 6])),
        "pieces should have 24,000,000,000,000 bytes, more than all files hold",
    ),
    "no shard": (lambda folder: [path.unlink() for path in folder.glob("*.distcp")], "no file of its folder"),
    "shard of zeros": (
        lambda folder: [path.write_bytes(bytes(path.stat().st_size)) for path in folder.glob("*.distcp")],
        "holds damaged shards",
    ),
    "shard cut short": (
        lambda folder: [path.write_bytes(path.read_bytes()[:50]) for path in folder.glob("*.distcp")],
        "holds damaged shards",
    ),
}


@pytest.mark.parametrize("fault", SPOILERS)
def test_a_folder_that_is_wrong_or_damaged_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil, expected = SPOILERS[fault]
    spoil(folder)
    with pytest.raises(InputError, match=r"^[^\n]+$") as error:
        ForeignTensors(folder).read(["pieces", "whole"])
    assert expected in str(error.value)
    assert not (tmp_path / "trace").exists()


def test_code_inside_a_shard_does_not_run(folder: Path) -> None:
    """A shard is what `torch.save` wrote; here it is a pickle that makes a file."""
    poison = folder / "poison.distcp"
    torch.save(Payload(folder / "trace"), poison)

    def point_at_poison(index: Metadata) -> None:
        for info in index.storage_data.values():
            info.relative_path, info.offset, info.length = poison.name, 0, poison.stat().st_size

    change_index(folder, point_at_poison)
    with pytest.raises(InputError, match="holds damaged shards"):
        ForeignTensors(folder).read(["whole"])
    assert not (folder / "trace").exists()


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    bad = ShardedTensor.from_rank_offsets("bad", torch.tensor([1.0, torch.inf]))
    dist_checkpointing.save({"bad": bad}, str(tmp_path / "weights"))
    with pytest.raises(InputError, match="bad has missing parts or values that are no finite numbers"):
        ForeignTensors(tmp_path / "weights").read(["bad"])
