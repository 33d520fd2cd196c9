"""One process, and workers that are only played; real ones are in tests/equivalence/test_torch_workers.py."""

import importlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from celltron.cells import CellStore, Loader, LoaderState, RankTokenizer
from celltron.core import InputError

torch = pytest.importorskip("torch")
torch_dataset = pytest.importorskip("celltron.cells.torch_dataset")
CellDataset = torch_dataset.CellDataset

Steps = list[dict[str, Any]]


@pytest.fixture(scope="module")
def tokenizer(store: CellStore) -> RankTokenizer:
    return RankTokenizer.from_store(store, max_length=32)


@pytest.fixture
def make_loader(store: CellStore, tokenizer: RankTokenizer) -> Any:
    def make(**options: Any) -> Loader:
        return Loader(store, tokenizer, **({"cells_per_batch": 48, "seed": 3, "epochs": 2, "prefetch": 2} | options))

    return make


@pytest.fixture
def play_worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes this process worker w of W, as the dataset sees it."""

    def play(worker: int | None, num_workers: int = 0) -> None:
        info = None if worker is None else SimpleNamespace(id=worker, num_workers=num_workers)
        monkeypatch.setattr(torch_dataset, "get_worker_info", lambda: info)

    return play


def plain(batches: Any) -> Steps:
    """Tensors as lists, so that batches can be compared."""
    return [{name: part if name == "state" else part.tolist() for name, part in batch.items()} for batch in batches]


def of_loader(loader: Loader) -> Steps:
    steps = []
    for batch in loader:
        arrays = {name: getattr(batch, name).tolist() for name in ("tokens", "labels", "lengths", "cells", "epochs")}
        state = loader.state
        steps.append(arrays | {"state": {"seed": state.seed, "epoch": state.epoch, "position": state.position}})
    return steps


def in_turn(streams: list[Steps]) -> Iterator[dict[str, Any]]:
    """Batches as a `DataLoader` takes them from its workers."""
    for k in range(max(map(len, streams))):
        yield from (stream[k] for stream in streams if k < len(stream))


def test_batches_are_those_of_the_loader(make_loader: Any) -> None:
    wanted = of_loader(make_loader())
    dataset = CellDataset(make_loader())
    assert len(wanted) == 17
    assert plain(dataset) == wanted
    assert plain(dataset) == wanted  # every loop begins again
    (batch, *_) = dataset
    kinds = {name: part.dtype for name, part in batch.items() if name != "state"}
    int32, int64 = torch.int32, torch.int64
    assert kinds == {"tokens": int32, "labels": int32, "lengths": int32, "cells": int64, "epochs": int64}
    with_torch = torch.utils.data.DataLoader(CellDataset(make_loader()), batch_size=None)
    assert plain(with_torch) == wanted


@pytest.mark.parametrize("num_workers", [1, 2, 4, 30])
@pytest.mark.parametrize("begin", [None, LoaderState(3, 1, 396)])
def test_workers_taken_in_turn_give_the_stream(
    make_loader: Any, play_worker: Any, num_workers: int, begin: LoaderState | None
) -> None:
    wanted = of_loader(make_loader(state=begin))
    streams = []
    for worker in range(num_workers):
        play_worker(worker, num_workers)
        streams.append(plain(CellDataset(make_loader(state=begin))))
    assert list(in_turn(streams)) == wanted


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_the_state_of_a_batch_goes_on_with_the_next(make_loader: Any, play_worker: Any, num_workers: int) -> None:
    wanted = of_loader(make_loader())
    for step in (0, 5, 15, 16):
        streams = []
        for worker in range(max(num_workers, 1)):
            dataset = CellDataset(make_loader())
            dataset.load_state_dict(wanted[step]["state"])  # before the workers are there
            play_worker(worker if num_workers else None, num_workers)
            streams.append(plain(dataset))
            play_worker(None)
        assert list(in_turn(streams)) == wanted[step + 1 :]


@pytest.mark.parametrize("num_workers", [0, 3])
def test_the_state_of_a_dataset_goes_on_in_its_worker(make_loader: Any, play_worker: Any, num_workers: int) -> None:
    for worker in range(max(num_workers, 1)):
        play_worker(worker if num_workers else None, num_workers)
        whole = plain(CellDataset(make_loader()))
        for num_taken in (0, 1, 3, len(whole)):
            dataset = CellDataset(make_loader())
            batches = iter(dataset)
            head = plain(next(batches) for _ in range(num_taken))
            resumed = CellDataset(make_loader())
            resumed.load_state_dict(dataset.state_dict())
            assert resumed.state_dict() == dataset.state_dict()
            assert head + plain(resumed) == whole


def test_ranks_take_their_parts(make_loader: Any, play_worker: Any) -> None:
    wanted = of_loader(make_loader())
    for num_workers in (0, 2):
        cells = []
        for rank in range(3):
            streams = []
            for worker in range(max(num_workers, 1)):
                play_worker(worker if num_workers else None, num_workers)
                streams.append(plain(CellDataset(make_loader(rank=rank, world_size=3))))
            cells.append([step["cells"] for step in in_turn(streams)])
        assert [sum(parts, []) for parts in zip(*cells, strict=True)] == [step["cells"] for step in wanted]


def test_two_loops_at_once_are_refused(make_loader: Any) -> None:
    dataset = CellDataset(make_loader())
    first, second = iter(dataset), iter(dataset)
    next(first), next(first)
    next(second)
    with pytest.raises(InputError, match="moved during a loop"):
        next(first)


def test_threads_end_with_the_loop(make_loader: Any) -> None:
    dataset = CellDataset(make_loader())
    batches = iter(dataset)
    next(batches)
    assert dataset.loader._pool is not None
    batches.close()
    assert dataset.loader._pool is None
    assert dataset.state_dict()["position"] == 48


@pytest.mark.parametrize(
    ("state", "pattern"),
    [
        ({}, "no whole number 'seed'"),
        ({"seed": 3, "epoch": 0, "position": 1.5}, "no whole number 'position'"),
        ({"seed": 3, "epoch": True, "position": 1}, "no whole number 'epoch'"),
        ({"seed": 4, "epoch": 0, "position": 0}, "seed 4, the loader 3"),
        ({"seed": 3, "epoch": 0, "position": 400}, "place 400 of epoch 0"),
        ({"seed": 3, "epoch": 0, "position": 0, "worker": 1, "num_workers": 4}, "worker 1 of 4"),
    ],
)
def test_states_that_are_refused(make_loader: Any, state: dict[str, Any], pattern: str) -> None:
    dataset = CellDataset(make_loader())
    before = dataset.state_dict()
    with pytest.raises(InputError, match=pattern):
        dataset.load_state_dict(state)
    assert dataset.state_dict() == before


def test_the_state_of_another_worker_is_refused(make_loader: Any, play_worker: Any) -> None:
    play_worker(1, 4)
    dataset = CellDataset(make_loader())
    next(iter(dataset))
    state = dataset.state_dict()
    assert state == {"seed": 3, "epoch": 0, "position": 48 * 5, "worker": 1, "num_workers": 4}
    for worker, num_workers in ((0, 4), (1, 3)):
        play_worker(worker, num_workers)
        with pytest.raises(InputError, match="worker 1 of 4"):
            CellDataset(make_loader()).load_state_dict(state)


def test_masks_are_the_loaders(make_loader: Any) -> None:
    (batch, *_) = CellDataset(make_loader(mask=False))
    assert set(batch["labels"].tolist()) == {-100}
    assert np.count_nonzero(next(iter(CellDataset(make_loader())))["labels"].numpy() != -100) > 50


def test_without_torch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "celltron.cells.torch_dataset")
    with pytest.raises(InputError, match=r"pip install 'celltron-cells\[torch\]'"):
        importlib.import_module("celltron.cells.torch_dataset")
