"""A crafted index is refused before anything in it runs. Payloads would make a file; it must never be there."""

import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from celltron.core import InputError
from celltron.train.checkpoint import STATE_FOLDER, Checkpoints, RunState
from celltron.train.launch import Launch
from celltron.train.optimizer import OptimizerConfig, wrap_model
from celltron.train.torch_dist import check_torch_dist


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call = call
        self.arguments = arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.arguments


def payloads(trace: Path) -> dict[str, Payload]:
    return {
        "os.system": Payload(os.system, f"touch {trace}"),
        "builtins.eval": Payload(eval, f"open({str(trace)!r}, 'w')"),
        "builtins.exec": Payload(exec, f"open({str(trace)!r}, 'w')"),
        "io.open": Payload(open, str(trace), "w"),
        "subprocess.call": Payload(subprocess.call, ["touch", str(trace)]),
        "pathlib touch": Payload(Path.touch, trace),
        "torch.load": Payload(torch.load, str(trace)),
    }


@pytest.fixture(scope="module")
def saved(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `torch_dist` folder of a checkpoint."""
    return tmp_path_factory.mktemp("torch_dist")


@pytest.fixture
def folder(saved: Path, tmp_path: Path, make_model: Callable[..., Any]) -> Path:
    """A copy of it, to spoil."""
    if not any(saved.iterdir()):
        model, optimizer = wrap_model(
            make_model(), OptimizerConfig(), dtype=torch.float64, distributed_optimizer=False
        )
        optimizer.step()
        state = RunState(step=1, seed=0, loader={}, distributed_optimizer=False, dtype="float64")
        Checkpoints(saved, launch=Launch()).save(state, model, optimizer)
    return shutil.copytree(saved / "step_00000001" / STATE_FOLDER, tmp_path / "state")


def read_index(folder: Path) -> Metadata:
    with (folder / ".metadata").open("rb") as stream:
        index = pickle.load(stream)
    assert isinstance(index, Metadata)
    return index


def write_index(folder: Path, content: Any, protocol: int = pickle.DEFAULT_PROTOCOL) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(content, protocol=protocol))


def test_what_megatron_writes_is_accepted(folder: Path) -> None:
    check_torch_dist(folder)
    keys = set(read_index(folder).state_dict_metadata)
    assert {"linear.weight", "norm.bias", "optimizer.state.exp_avg.linear.weight"} <= keys


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("name", payloads(Path()))
def test_a_payload_instead_of_the_index_never_runs(folder: Path, tmp_path: Path, name: str, protocol: int) -> None:
    trace = tmp_path / "trace"
    write_index(folder, payloads(trace)[name], protocol)
    with pytest.raises(InputError, match=r"\.metadata is no index of tensors \(it names "):
        check_torch_dist(folder)
    assert not trace.exists()


def test_the_payload_would_run(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    write_index(folder, payloads(trace)["os.system"])
    read_bytes = (folder / ".metadata").read_bytes()
    pickle.loads(read_bytes)
    assert trace.exists()


@pytest.mark.parametrize("where", ["state_dict_metadata", "planner_data", "storage_data", "storage_meta"])
def test_a_payload_inside_a_true_index_never_runs(folder: Path, tmp_path: Path, where: str) -> None:
    trace = tmp_path / "trace"
    index = read_index(folder)
    payload = payloads(trace)["os.system"]
    if where == "storage_meta":
        index.storage_meta = payload  # type: ignore[assignment]
    else:
        (getattr(index, where) or {})["linear.weight"] = payload
        setattr(index, where, (getattr(index, where) or {}) | {"linear.weight": payload})
    write_index(folder, index)
    with pytest.raises(InputError, match="it names posix.system"):
        check_torch_dist(folder)
    assert not trace.exists()


def test_a_payload_in_the_common_file_never_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "trace"
    torch.save({"optimizer": payloads(trace)["os.system"]}, folder / "common.pt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(InputError, match=r"common\.pt is no file of plain values"):
        check_torch_dist(folder)
    assert not trace.exists()


def test_attributes_of_allowed_classes_are_out_of_reach(folder: Path) -> None:
    # Protocol 4 looks names up with dots: torch.Size.__new__.
    (folder / ".metadata").write_bytes(b"\x80\x04\x8c\x05torch\x8c\x0cSize.__new__\x93.")
    with pytest.raises(InputError, match="it names torch.Size.__new__"):
        check_torch_dist(folder)


def test_entries_of_bytes_are_refused(folder: Path) -> None:
    index = read_index(folder)
    index.state_dict_metadata["linear.weight"] = BytesStorageMetadata()
    write_index(folder, index)
    with pytest.raises(InputError, match="BytesStorageMetadata"):
        check_torch_dist(folder)


@pytest.mark.parametrize("name", ["../outside.distcp", "/etc/hostname", "missing.distcp", ""])
def test_files_outside_the_folder_or_missing_are_refused(folder: Path, name: str) -> None:
    (folder.parent / "outside.distcp").write_bytes(b"tensors")
    index = read_index(folder)
    index.storage_data[MetadataIndex("linear.weight")] = _StorageInfo(name, 0, 7)
    write_index(folder, index)
    with pytest.raises(InputError, match="no file of its folder"):
        check_torch_dist(folder)


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"has no {name}"):
        check_torch_dist(folder)


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_truncated_file_is_named(folder: Path, name: str, share: float) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match=name):
        check_torch_dist(folder)


@pytest.mark.parametrize("content", [{}, [1, 2], "index", torch.Size([2])])
def test_something_that_is_no_index_is_refused(folder: Path, content: Any) -> None:
    write_index(folder, content)
    with pytest.raises(InputError, match=rf"is no index of tensors \(it holds a {type(content).__name__}\)"):
        check_torch_dist(folder)


@pytest.mark.parametrize("value", [None, 5, [1], {"linear.weight": 5}])
def test_an_index_without_files_is_refused(folder: Path, value: Any) -> None:
    index = read_index(folder)
    index.storage_data = value
    write_index(folder, index)
    with pytest.raises(InputError, match="is no index of tensors"):
        check_torch_dist(folder)
