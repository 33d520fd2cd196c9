import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from celltron.cells import NO_LABEL, Batch, pad_batch
from celltron.core import InputError


def batch_of(lengths: list[int]) -> Batch:
    num = sum(lengths)
    return Batch(
        tokens=np.arange(10, 10 + num, dtype=np.int32),
        labels=np.where(np.arange(num) % 3 == 0, np.arange(num), NO_LABEL).astype(np.int32),
        lengths=np.array(lengths, dtype=np.int32),
        cells=np.arange(100, 100 + len(lengths)),
        epochs=np.zeros(len(lengths), dtype=np.int64),
    )


def cells_of(batch: Batch) -> list[tuple[int, list[int], list[int]]]:
    ends = np.concatenate([[0], np.cumsum(batch.lengths)])
    return [
        (int(batch.cells[i]), batch.tokens[a:b].tolist(), batch.labels[a:b].tolist())
        for i, (a, b) in enumerate(zip(ends[:-1], ends[1:], strict=True))
    ]


LENGTHS = st.lists(st.integers(0, 9), max_size=12)


@given(lengths=LENGTHS, num_cells=st.integers(1, 15))
def test_micro_batches_are_the_batch(lengths: list[int], num_cells: int) -> None:
    batch = batch_of(lengths)
    parts = batch.split(num_cells)
    assert [cell for part in parts for cell in cells_of(part)] == cells_of(batch)
    assert all(len(part) == num_cells for part in parts[:-1])
    assert all(0 < len(part) <= num_cells for part in parts)


@given(lengths=LENGTHS)
def test_sorting_by_length_keeps_every_cell(lengths: list[int]) -> None:
    batch = batch_of(lengths)
    ordered = batch.sorted_by_length()
    assert cells_of(ordered) == sorted(cells_of(batch), key=lambda cell: len(cell[1]))


@given(lengths=LENGTHS, multiple_of=st.integers(1, 8))
def test_padding_keeps_tokens_and_labels(lengths: list[int], multiple_of: int) -> None:
    batch = batch_of(lengths)
    padded = pad_batch(batch, pad_id=1, multiple_of=multiple_of)
    longest = max([1, *lengths])
    assert padded.tokens_BS.shape[1] == -(-longest // multiple_of) * multiple_of
    assert padded.tokens_BS.dtype == padded.labels_BS.dtype == np.int64
    for row, length in enumerate(lengths):
        assert padded.is_padding_BS[row].tolist() == [i >= length for i in range(padded.tokens_BS.shape[1])]
    assert np.array_equal(padded.tokens_BS[~padded.is_padding_BS], batch.tokens)
    assert np.array_equal(padded.labels_BS[~padded.is_padding_BS], batch.labels)
    assert np.all(padded.tokens_BS[padded.is_padding_BS] == 1)
    assert np.all(padded.labels_BS[padded.is_padding_BS] == NO_LABEL)


def test_a_length_may_be_given() -> None:
    assert pad_batch(batch_of([2, 3]), pad_id=0, length=16).tokens_BS.shape == (2, 16)
    with pytest.raises(InputError, match="3 tokens does not fit a padded length of 2"):
        pad_batch(batch_of([2, 3]), pad_id=0, length=2)


def test_a_batch_of_no_cells_or_only_empty_ones() -> None:
    assert pad_batch(batch_of([]), pad_id=0).tokens_BS.shape == (0, 1)
    assert pad_batch(batch_of([0, 0]), pad_id=0).is_padding_BS.all()
    assert batch_of([]).split(3) == []


def test_a_micro_batch_needs_a_cell() -> None:
    with pytest.raises(InputError, match="0 cells was asked"):
        batch_of([1]).split(0)
