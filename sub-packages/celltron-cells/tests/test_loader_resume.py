"""Any order, cut over any number of ranks and stopped anywhere, goes on with the very next cells and masks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celltron.cells import Batch, CellStore, EpochOrder, Loader, LoaderState, RankTokenizer
from celltron.cells.block_order import BlockOrder
from celltron.cells.length_order import LengthOrder
from celltron.cells.sampler import Order
from celltron.cells.weighted_order import WeightedOrder

Cell = tuple[int, int, bytes, bytes]
KINDS = ["epoch", "block", "weighted", "length", "length of blocks"]
SEED = 11


@pytest.fixture(scope="module")
def tokenizer(store: CellStore) -> RankTokenizer:
    return RankTokenizer.from_store(store, max_length=32)


def make_order(kind: str, store: CellStore, num_cells: int) -> Order:
    """Over a part of the store's cells, which are not neighbours."""
    cells = np.arange(num_cells) * 3 % 400
    blocks = BlockOrder(cells, SEED, block_cells=10, window_blocks=3)
    lengths = np.diff(store.rows(np.arange(len(store))).indptr)
    if kind == "block":
        return blocks
    if kind == "weighted":
        return WeightedOrder(np.where(cells == 0, 1, cells % 4), SEED, cells=cells, epoch_cells=num_cells + 3)
    if kind.startswith("length"):
        inner = blocks if kind == "length of blocks" else EpochOrder(cells, SEED)
        return LengthOrder(inner, lambda asked: lengths[asked], cells_per_batch=8, window_batches=4)
    return EpochOrder(cells, SEED)


def cells_of(batch: Batch) -> list[Cell]:
    """(epoch, cell, tokens, labels) in the order they come."""
    ends = np.cumsum(batch.lengths)
    assert len(batch.tokens) == len(batch.labels) == (ends[-1] if len(ends) else 0)
    tokens, labels = (np.split(part, ends[:-1]) for part in (batch.tokens, batch.labels))
    return [
        (int(batch.epochs[i]), int(batch.cells[i]), tokens[i].tobytes(), labels[i].tobytes()) for i in range(len(batch))
    ]


def together(ranks: list[Loader]) -> list[Cell] | None:
    """The ranks' parts of the next global batch, put together; all ranks end at once."""
    parts = [next(loader, None) for loader in ranks]
    if None in parts:
        assert set(parts) == {None}
        return None
    sizes = [len(part) for part in parts if part is not None]
    assert max(sizes) - min(sizes) <= 1 and len({loader.state for loader in ranks}) == 1
    return [cell for part in parts if part is not None for cell in cells_of(part)]


legs = st.tuples(st.integers(1, 30), st.sampled_from([1, 2, 4]), st.sampled_from([0, 1, 2]))
"""Cells of a batch, ranks, threads."""


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(KINDS), num_cells=st.integers(1, 60), first=legs, second=legs, num_before=st.integers(0, 12)
)
def test_stopping_and_going_on_elsewhere_equals_going_on(  # type: ignore[no-untyped-def]
    store, tokenizer, kind: str, num_cells: int, first, second, num_before: int
) -> None:
    """From one batch size, world size and number of threads to another, by the state alone."""
    order = make_order(kind, store, num_cells)
    (whole,) = list(Loader(store, tokenizer, cells_per_batch=10_000, seed=SEED, order=order, epochs=2, prefetch=0))
    stream = cells_of(whole)
    assert len(stream) == 2 * len(order)
    state, taken = LoaderState(SEED), 0
    for (size, world_size, prefetch), limit in ((first, num_before), (second, 10_000)):
        ranks = [
            Loader(
                store,
                tokenizer,
                cells_per_batch=size,
                seed=SEED,
                order=make_order(kind, store, num_cells),
                epochs=2,
                rank=rank,
                world_size=world_size,
                state=state,
                prefetch=prefetch,
            )
            for rank in range(world_size)
        ]
        for _ in range(limit):
            found = together(ranks)
            if found is None:
                break
            assert found == stream[taken : taken + size]
            taken += len(found)
        state = LoaderState(ranks[0].state.seed, ranks[0].state.epoch, ranks[0].state.position)
        assert state.epoch * len(order) + state.position == taken
        for loader in ranks:
            loader.close()
    assert taken == len(stream)


@pytest.mark.parametrize("kind", ["epoch", "block", "length", "length of blocks"])
def test_every_cell_comes_once_an_epoch(store: CellStore, tokenizer: RankTokenizer, kind: str) -> None:
    order = make_order(kind, store, 70)
    with Loader(store, tokenizer, cells_per_batch=8, seed=SEED, order=order, epochs=3) as loader:
        stream = [cell for batch in loader for cell in cells_of(batch)]
    for epoch in range(3):
        assert sorted(cell for e, cell, *_ in stream if e == epoch) == sorted(np.arange(70) * 3 % 400)


def test_a_cell_drawn_twice_gets_other_masks(store: CellStore, tokenizer: RankTokenizer) -> None:
    order = WeightedOrder(np.ones(1), SEED, cells=np.array([13]), epoch_cells=20)
    (batch,) = list(Loader(store, tokenizer, cells_per_batch=40, seed=SEED, order=order, epochs=2))
    assert batch.cells.tolist() == [13] * 40
    assert len({labels for *_, labels in cells_of(batch)}) == 40


def test_batches_of_like_lengths_pad_less(store: CellStore) -> None:
    tokenizer = RankTokenizer.from_store(store, max_length=600)

    def padded(order: Order) -> int:
        with Loader(store, tokenizer, cells_per_batch=8, seed=SEED, order=order, epochs=2) as loader:
            return sum(int(batch.lengths.max()) * len(batch) for batch in loader)

    lengths = tokenizer.tokenize(store, np.arange(400))[1].astype(np.int64)
    plain = EpochOrder(400, SEED)
    bucketed = LengthOrder(plain, lambda cells: lengths[cells], cells_per_batch=8, window_batches=25)
    real = 2 * int(lengths.sum())
    assert real <= padded(bucketed) < 1.05 * real < 1.4 * real < padded(plain)
