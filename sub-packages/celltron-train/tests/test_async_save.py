from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from celltron.core import InputError
from celltron.core.durable import hash_file
from celltron.train import async_save
from celltron.train.async_save import Copier, Part, Save
from celltron.train.checkpoint import MODEL_METADATA
from celltron.train.launch import Launch

pytestmark = pytest.mark.usefixtures("engine")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


def state_of(model: Any) -> dict[str, Any]:
    return {"model": model.sharded_state_dict(metadata=dict(MODEL_METADATA)), "number": torch.tensor(1.0)}


def test_a_second_snapshot_plans_and_allocates_nothing(
    folder: Path, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    copier = Copier()
    first = copier.take(state_of(make_model(seed=0)), folder)
    addresses = [tensor.data_ptr() for tensor in first.tensors]
    model = make_model(seed=1)
    with monkeypatch.context() as patch:
        patch.delattr(async_save, "_make_plan")
        second = copier.take(state_of(model), folder)
    assert [tensor.data_ptr() for tensor in second.tensors] == addresses
    names = [item.index.fqn for item in second.plan.items]
    assert sorted(names) == sorted(model.state_dict())
    for name, tensor in zip(names, second.tensors, strict=True):
        assert (
            torch.equal(tensor, model.state_dict()[name]) and tensor.data_ptr() != model.state_dict()[name].data_ptr()
        )


def test_other_tensors_are_planned_anew(folder: Path, make_model: Callable[..., Any]) -> None:
    copier = Copier()
    for model in (make_model(), make_model(hidden_size=8), make_model(hidden_size=8, dtype=torch.float32)):
        snapshot = copier.take(state_of(model), folder)
        for item, tensor in zip(snapshot.plan.items, snapshot.tensors, strict=True):
            assert torch.equal(tensor, model.state_dict()[item.index.fqn])


def test_what_all_share_is_copied_too(folder: Path, make_model: Callable[..., Any]) -> None:
    state = state_of(make_model())
    snapshot = Copier().take(state, folder)
    state["number"].add_(1)
    assert snapshot.common == {"number": torch.tensor(1.0)}


def test_files_are_hashed_as_they_are_written(folder: Path, make_model: Callable[..., Any]) -> None:
    part = Copier().take(state_of(make_model()), folder).write()
    assert sorted(part.files) == ["__0_0.distcp", "common.pt"]
    for name, entry in part.files.items():
        assert entry == hash_file(folder / name)


def test_a_part_that_the_main_process_does_not_see_is_named(folder: Path, make_model: Callable[..., Any]) -> None:
    snapshot = Copier().take(state_of(make_model()), folder)
    parts = [snapshot.write(), Part(files={"__1_0.distcp": {"bytes": 1, "sha256": "0" * 64}})]
    with pytest.raises(InputError, match=r"__1_0\.distcp was written by process 1, but .* file system that all"):
        snapshot.write_index(parts)


def test_another_process_is_named_that_could_not_write(folder: Path, make_model: Callable[..., Any]) -> None:
    save = Save(
        Copier().take(state_of(make_model()), folder), lambda parts: None, final=folder / "final", launch=Launch()
    )
    with pytest.raises(OSError, match="No space left on device \\(on process 1\\)") as error:
        save._refuse_failures([Part(), Part(failure=(28, "No space left on device"))])
    assert (error.value.errno, error.value.filename) == (28, str(folder / "final"))
    with pytest.raises(InputError, match="final was not written: KeyError: 'a' \\(on process 1\\)"):
        save._refuse_failures([Part(), Part(failure=(0, "KeyError: 'a'"))])
    assert save.wait()
