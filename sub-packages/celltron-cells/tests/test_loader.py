"""Every cell once an epoch, the same masks on any layout, and resuming from any state."""

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celltron.cells import NO_LABEL, Batch, CellStore, Loader, LoaderState, Masking, RankTokenizer
from celltron.core import InputError

Cell = tuple[int, int, bytes, bytes]


@pytest.fixture(scope="module")
def tokenizer(store: CellStore) -> RankTokenizer:
    return RankTokenizer.from_store(store, max_length=128)


def cells_of(batches: Iterable[Batch]) -> list[Cell]:
    """(epoch, cell, tokens, labels) in the order they come."""
    found = []
    for batch in batches:
        ends = np.concatenate([[0], np.cumsum(batch.lengths)])
        assert len(batch.tokens) == len(batch.labels) == ends[-1]
        for i in range(len(batch)):
            part = slice(ends[i], ends[i + 1])
            found.append(
                (int(batch.epochs[i]), int(batch.cells[i]), batch.tokens[part].tobytes(), batch.labels[part].tobytes())
            )
    return found


@pytest.fixture(scope="module")
def two_epochs(store: CellStore, tokenizer: RankTokenizer) -> list[Cell]:
    """The stream made one cell at a time, by one rank, without threads."""
    return cells_of(Loader(store, tokenizer, cells_per_batch=1, seed=11, epochs=2, prefetch=0))


def test_every_cell_once_an_epoch(two_epochs: list[Cell]) -> None:
    assert [epoch for epoch, *_ in two_epochs] == [0] * 400 + [1] * 400
    for epoch in (0, 1):
        assert sorted(cell for e, cell, *_ in two_epochs if e == epoch) == list(range(400))


def test_masks_change_from_epoch_to_epoch(two_epochs: list[Cell]) -> None:
    labels = {(epoch, cell): label for epoch, cell, _, label in two_epochs}
    assert sum(labels[0, cell] != labels[1, cell] for cell in range(400)) > 350


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("cells_per_batch", [3, 64, 1000])
@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_any_layout_gives_the_same_stream(  # type: ignore[no-untyped-def]
    store, tokenizer, two_epochs, world_size: int, cells_per_batch: int, prefetch: int
) -> None:
    ranks = [
        Loader(
            store,
            tokenizer,
            cells_per_batch=cells_per_batch,
            seed=11,
            epochs=2,
            rank=rank,
            world_size=world_size,
            prefetch=prefetch,
        )
        for rank in range(world_size)
    ]
    batches: list[Batch] = []
    for parts in zip(*ranks, strict=True):  # ranks take the same number of steps
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert sum(sizes) in (cells_per_batch, 800 % cells_per_batch)
        assert len({loader.state for loader in ranks}) == 1
        batches += parts
    assert cells_of(batches) == two_epochs


@settings(max_examples=25, deadline=None)
@given(
    before=st.integers(0, 30), sizes=st.tuples(st.integers(1, 90), st.integers(1, 90)), prefetch=st.sampled_from([0, 2])
)
def test_resuming_equals_going_on(  # type: ignore[no-untyped-def]
    store, tokenizer, two_epochs, before: int, sizes: tuple[int, int], prefetch: int
) -> None:
    """After any number of batches of one size, another loader with another batch size goes on from the state alone."""
    first = Loader(store, tokenizer, cells_per_batch=sizes[0], seed=11, epochs=2, prefetch=prefetch)
    head = [batch for batch, _ in zip(first, range(before), strict=False)]
    state = LoaderState(first.state.seed, first.state.epoch, first.state.position)
    first.close()
    second = Loader(store, tokenizer, cells_per_batch=sizes[1], seed=11, epochs=2, prefetch=prefetch, state=state)
    # zip has taken one batch more than it handed out, unless it stopped before
    taken = state.epoch * 400 + state.position
    assert cells_of(head) == two_epochs[: sum(len(batch) for batch in head)]
    assert cells_of(second) == two_epochs[taken:]


def test_the_state_does_not_run_ahead(store: CellStore, tokenizer: RankTokenizer) -> None:
    loader = Loader(store, tokenizer, cells_per_batch=50, seed=0, epochs=None, prefetch=4)
    assert loader.state == LoaderState(0, 0, 0)
    for step in range(1, 20):
        next(loader)
        assert loader.state == LoaderState(0, *divmod(step * 50, 400))
    loader.close()
    assert loader.state == LoaderState(0, *divmod(19 * 50, 400))
    assert len(next(loader)) == 50  # a closed loader goes on when asked


def test_seek_goes_back_and_forth(store: CellStore, tokenizer: RankTokenizer) -> None:
    with Loader(store, tokenizer, cells_per_batch=32, seed=0, epochs=None) as loader:
        first = cells_of([next(loader), next(loader)])
        loader.seek(LoaderState(0, 7, 13))
        later = cells_of([next(loader)])
        assert {epoch for epoch, *_ in later} == {7}
        loader.seek(LoaderState(0))
        assert cells_of([next(loader), next(loader)]) == first


def test_a_subset_of_the_cells(store: CellStore, tokenizer: RankTokenizer) -> None:
    chosen = np.array([3, 7, 30, 300])
    batches = list(Loader(store, tokenizer, cells_per_batch=3, seed=2, cells=chosen))
    assert sorted(cell for _, cell, *_ in cells_of(batches)) == chosen.tolist()
    assert 0 in np.concatenate([batch.lengths for batch in batches])  # the empty cell comes with length 0
    in_order = list(Loader(store, tokenizer, cells_per_batch=3, seed=2, cells=chosen, shuffle=False, epochs=2))
    assert np.concatenate([batch.cells for batch in in_order]).tolist() == chosen.tolist() * 2


@pytest.mark.parametrize("options", [{"mask": False}, {"masking": None}])
def test_without_masks(store: CellStore, tokenizer: RankTokenizer, options: dict[str, object]) -> None:
    batch = next(Loader(store, tokenizer, cells_per_batch=40, seed=0, **options))  # type: ignore[arg-type]
    tokens, lengths = tokenizer.tokenize(store, batch.cells)
    assert np.array_equal(batch.tokens, tokens) and np.array_equal(batch.lengths, lengths)
    assert np.all(batch.labels == NO_LABEL)


def test_the_masking_asked_for_is_used(store: CellStore, tokenizer: RankTokenizer) -> None:
    masking = Masking(probability=1.0, mask_share=1.0, random_share=0.0)
    batch = next(Loader(store, tokenizer, cells_per_batch=40, seed=0, masking=masking))
    assert np.all(batch.tokens == tokenizer.vocabulary.mask_id) and np.all(batch.labels != NO_LABEL)


def test_an_error_in_a_thread_is_raised_and_the_state_stays(store: CellStore, tokenizer: RankTokenizer) -> None:
    class Broken(Loader):
        def make_batch(self, cells, epochs):  # type: ignore[no-untyped-def]
            if self.broken:
                raise InputError("torn")
            return super().make_batch(cells, epochs)

        broken = True

    loader = Broken(store, tokenizer, cells_per_batch=40, seed=0)
    with pytest.raises(InputError, match="torn"):
        next(loader)
    assert loader.state == LoaderState(0)
    loader.broken = False
    loader.seek(loader.state)
    assert len(next(loader)) == 40


def test_no_epochs_no_batches(store: CellStore, tokenizer: RankTokenizer) -> None:
    assert list(Loader(store, tokenizer, cells_per_batch=4, seed=0, epochs=0)) == []
    assert list(Loader(store, tokenizer, cells_per_batch=4, seed=0, state=LoaderState(0, 1, 0))) == []


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"cells_per_batch": 0}, "cells_per_batch is 0"),
        ({"rank": 2, "world_size": 2}, "rank is 2 of world_size 2"),
        ({"rank": -1}, "rank is -1"),
        ({"epochs": -1}, "epochs is -1"),
        ({"prefetch": -1}, "prefetch is -1"),
        ({"cells": np.array([400])}, "no cell 400"),
        ({"cells": np.array([], dtype=np.int64)}, "no cells"),
        ({"state": LoaderState(1, 0, 0)}, "state has seed 1, the loader 0"),
        ({"state": LoaderState(0, 0, 400)}, "place 400 of epoch 0, but an epoch has 400 cells"),
        ({"state": LoaderState(0, -1, 0)}, "epoch -1"),
    ],
)
def test_what_is_refused(store, tokenizer, options: dict[str, object], pattern: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=pattern):
        Loader(store, tokenizer, **({"cells_per_batch": 4, "seed": 0} | options))
