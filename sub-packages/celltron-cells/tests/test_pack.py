import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from celltron.cells import NO_LABEL, Batch, cut_into_packs, plan_packs
from celltron.core import InputError


def batch_of(lengths: list[int]) -> Batch:
    """Tokens that say in which cell and where in it they stand."""
    parts = [100 * (i + 1) + np.arange(length) for i, length in enumerate(lengths)]
    tokens = np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int32)
    labels = np.where(tokens % 3 == 0, tokens + 1, NO_LABEL).astype(np.int32)
    num = len(lengths)
    return Batch(tokens, labels, np.array(lengths, np.int32), np.arange(num), np.zeros(num, np.int64))


@given(lengths=st.lists(st.integers(0, 40), max_size=30), budget=st.integers(40, 90))
def test_every_cell_with_tokens_is_in_one_pack_that_is_not_too_full(lengths: list[int], budget: int) -> None:
    plan = plan_packs(np.array(lengths, dtype=np.int32), budget)
    cells = np.concatenate([np.zeros(0, np.int64), *plan])
    assert sorted(cells.tolist()) == [i for i, length in enumerate(lengths) if length]
    sums = [sum(lengths[i] for i in pack) for pack in plan]
    assert all(0 < total <= budget for total in sums)
    assert all(np.all(np.diff(pack) > 0) for pack in plan)
    # Two packs that fit into one would have been one.
    assert len(sums) < 2 or min(sums) + sorted(sums)[1] > budget


def test_best_fit_decreasing_by_hand() -> None:
    """60 and 50 open packs; 40 fits the first (40 free) better than the second (50 free); 30 and 20 fill the second."""
    assert [pack.tolist() for pack in plan_packs(np.array([20, 50, 40, 60, 30]), 100)] == [[2, 3], [0, 1, 4]]


def test_lengths_like_those_of_pbmc_fill_packs() -> None:
    lengths = np.clip(np.exp(6.4 + 0.4 * np.random.default_rng(0).standard_normal(512)), 60, 2048).astype(np.int32)
    plan = plan_packs(lengths, 8192)
    assert lengths.sum() / (len(plan) * 8192) > 0.97


@given(lengths=st.lists(st.integers(0, 9), max_size=12), multiple_of=st.integers(1, 4), budget=st.integers(9, 20))
def test_packs_hold_the_cells(lengths: list[int], multiple_of: int, budget: int) -> None:
    batch = batch_of(lengths)
    packs = cut_into_packs(batch, budget, pad_id=7, multiple_of=multiple_of)
    assert packs
    found = {}
    for pack in packs:
        assert len(pack.tokens_T) == len(pack.labels_T) == pack.lengths.sum() > 0
        assert len(pack.tokens_T) % multiple_of == 0 and np.all(pack.lengths > 0)
        ends = np.cumsum(pack.lengths)
        for start, end in zip(ends - pack.lengths, ends, strict=True):
            tokens, labels = pack.tokens_T[start:end], pack.labels_T[start:end]
            if tokens[0] == 7:  # the padding, at the end
                assert end == len(pack.tokens_T) and np.all(tokens == 7) and np.all(labels == NO_LABEL)
                continue
            found[int(tokens[0]) // 100 - 1] = len(tokens)
            assert np.array_equal(tokens, tokens[0] + np.arange(len(tokens)))
            assert np.array_equal(labels, np.where(tokens % 3 == 0, tokens + 1, NO_LABEL))
    assert found == {i: length for i, length in enumerate(lengths) if length}


def test_a_cell_longer_than_a_pack_is_refused() -> None:
    with pytest.raises(InputError, match="a cell of 41 tokens does not fit a pack of 40 tokens"):
        plan_packs(np.array([3, 41]), 40)
