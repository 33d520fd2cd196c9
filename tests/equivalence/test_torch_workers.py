"""The torch dataset with real worker processes: the same cells, order and masks for any number of them."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from celltron.cells import CellStore, EpochOrder, Loader, RankTokenizer
from celltron.cells.length_order import LengthOrder
from celltron.cells.sampler import Order
from celltron.cells.torch_dataset import CellDataset
from celltron.cells.weighted_order import WeightedOrder

SEED = 5
NAMES = ("tokens", "labels", "lengths", "cells", "epochs")
Step = tuple[Any, ...]


@pytest.fixture(scope="module")
def store(tiny_store: Path) -> CellStore:
    return CellStore.open(tiny_store)


def make_order(kind: str) -> Order:
    if kind == "weighted":
        return WeightedOrder(1.0 + np.arange(97) % 3, SEED)
    plain = EpochOrder(97, SEED)
    if kind == "length":
        return LengthOrder(plain, lambda cells: cells * 37 % 19, cells_per_batch=10, window_batches=3)
    return plain


def make_dataset(store: CellStore, kind: str = "epoch", *, rank: int = 0, world_size: int = 1) -> CellDataset:
    tokenizer = RankTokenizer.from_store(store, max_length=32)
    return CellDataset(
        Loader(
            store,
            tokenizer,
            cells_per_batch=10,
            seed=SEED,
            order=make_order(kind),
            epochs=2,
            rank=rank,
            world_size=world_size,
        )
    )


def steps_of(dataset: CellDataset, num_workers: int, *, kind: type = DataLoader) -> list[Step]:
    """All that the batches hold, in the order they come."""
    batches = kind(dataset, batch_size=None, num_workers=num_workers, timeout=60 if num_workers else 0)
    return [as_step(batch) for batch in batches]


def as_step(batch: dict[str, Any]) -> Step:
    return (*(batch[name].numpy().tobytes() for name in NAMES), batch["state"])


@pytest.mark.parametrize(
    ("kind", "num_workers"), [("epoch", 0), ("epoch", 1), ("epoch", 4), ("length", 4), ("weighted", 4)]
)
def test_any_number_of_workers_gives_the_loaders_batches(store: CellStore, kind: str, num_workers: int) -> None:
    loader = make_dataset(store, kind).loader
    wanted = [tuple(getattr(batch, name).tobytes() for name in NAMES) for batch in loader]
    found = steps_of(make_dataset(store, kind), num_workers)
    assert [step[:-1] for step in found] == wanted
    assert len(found) == 20 and found[6][-1] == {"seed": SEED, "epoch": 0, "position": 70}


def test_a_second_loop_and_workers_that_stay(store: CellStore) -> None:
    batches = DataLoader(
        make_dataset(store), batch_size=None, num_workers=2, persistent_workers=True, timeout=60, prefetch_factor=4
    )
    first, second = ([as_step(batch) for batch in batches] for _ in range(2))
    assert first == second == steps_of(make_dataset(store), 0)


def test_workers_of_ranks_share_the_batches(store: CellStore) -> None:
    wanted = list(make_dataset(store).loader)
    ranks = [
        DataLoader(make_dataset(store, rank=rank, world_size=2), batch_size=None, num_workers=2, timeout=60)
        for rank in range(2)
    ]
    parts = list(zip(*ranks, strict=True))
    assert len(parts) == len(wanted)
    for pair, batch in zip(parts, wanted, strict=True):
        assert [len(part["cells"]) for part in pair] == [len(batch) // 2, -(-len(batch) // 2)]
        for name in NAMES:
            assert np.array_equal(np.concatenate([part[name].numpy() for part in pair]), getattr(batch, name))


@pytest.mark.parametrize(("before", "after"), [(0, 4), (4, 1)])
def test_the_state_of_a_batch_goes_on_with_other_workers(store: CellStore, before: int, after: int) -> None:
    wanted = steps_of(make_dataset(store, "length"), before)
    for step in (0, 12):
        dataset = make_dataset(store, "length")
        dataset.load_state_dict(wanted[step][-1])
        assert steps_of(dataset, after) == wanted[step + 1 :]


@pytest.mark.parametrize("num_workers", [0, 3])
def test_a_stateful_data_loader_goes_on_where_it_stopped(store: CellStore, num_workers: int) -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    wanted = steps_of(make_dataset(store), 0)
    for num_taken in (7, 19):
        first = torchdata.StatefulDataLoader(make_dataset(store), batch_size=None, num_workers=num_workers)
        head = [as_step(batch) for batch in islice(first, num_taken)]
        state = first.state_dict()
        second = torchdata.StatefulDataLoader(make_dataset(store), batch_size=None, num_workers=num_workers)
        second.load_state_dict(state)
        assert head + [as_step(batch) for batch in second] == wanted
