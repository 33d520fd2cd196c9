import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celltron.cells import NO_LABEL, Masking, apply_masking
from celltron.cells.mask import FATE_DRAWS, MASK_STREAM
from celltron.core import InputError, Vocabulary, key_from, uniform_bits

GENES = Vocabulary.from_genes([f"G{i}" for i in range(500)], with_cls_eos=True)


def tokens_of(lengths: np.ndarray, seed: int = 0) -> np.ndarray:
    """Cells that begin with <cls> and end with <eos>."""
    tokens = np.random.default_rng(seed).integers(GENES.first_gene_id, len(GENES), lengths.sum()).astype(np.int32)
    ends = np.cumsum(lengths)
    tokens[ends - lengths], tokens[ends - 1] = GENES.cls_id, GENES.eos_id
    return tokens


@pytest.mark.parametrize(
    "masking", [Masking(), Masking.historical(), Masking(probability=0.4, mask_share=0.0, random_share=1.0)]
)
def test_shares_over_a_million_tokens(masking: Masking) -> None:
    lengths = np.full(1000, 1202, dtype=np.int32)
    tokens = tokens_of(lengths)
    seen, labels = apply_masking(tokens, lengths, np.arange(1000), GENES, masking, seed=1, epoch=0)
    is_gene = tokens >= GENES.first_gene_id
    selected = labels != NO_LABEL
    assert is_gene.sum() >= 1_000_000
    assert np.array_equal(labels[selected], tokens[selected])
    assert np.array_equal(seen[~selected], tokens[~selected])
    assert abs(selected.sum() / is_gene.sum() - masking.probability) < 0.005
    shown = seen[selected]
    is_masked = shown == GENES.mask_id
    is_random = ~is_masked & (shown != labels[selected])
    share_random = masking.random_share * (1 - 1 / 500)  # a random gene is the same gene once in 500
    assert abs(is_masked.mean() - masking.mask_share) < 0.005
    assert abs(is_random.mean() - share_random) < 0.005
    assert not selected[~is_gene].any()  # special tokens are never selected
    assert np.all((shown >= GENES.first_gene_id) | is_masked)  # and never put in by chance
    if is_random.any():
        frequencies = np.bincount(shown[is_random], minlength=len(GENES))[GENES.first_gene_id :]
        expected = is_random.sum() / 500
        assert ((frequencies - expected) ** 2 / expected).sum() < 500 + 6 * np.sqrt(2 * 500)  # chi-square, six sigma


def test_historical_is_80_2_18() -> None:
    masking = Masking.historical()
    assert (masking.probability, masking.mask_share, masking.random_share) == (0.15, 0.8, 0.02)


def halves_of(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lower and the upper 32 bits of words, as numbers below 1."""
    return (words & np.uint64(2**32 - 1)) * 2.0**-32, (words >> np.uint64(32)) * 2.0**-32


def test_draws_are_those_of_core() -> None:
    """The kernel's generator is `celltron.core.uniform_bits`, place by place."""
    lengths = np.array([40], dtype=np.int32)
    tokens = np.arange(4, 44, dtype=np.int32)
    seen, labels = apply_masking(tokens, lengths, np.array([17]), GENES, Masking(), seed=5, epoch=3)
    key = key_from(MASK_STREAM, 5, 3, 17)
    select = np.ravel(np.stack(halves_of(uniform_bits(key, np.arange(20))), axis=1))
    gene, fate = halves_of(uniform_bits(key, FATE_DRAWS + np.arange(40)))
    expected = np.where(fate < 0.8, GENES.mask_id, np.where(fate < 0.9, 4 + (gene * 500).astype(int), tokens))
    assert np.array_equal(labels, np.where(select < 0.15, tokens, NO_LABEL))
    assert np.array_equal(seen, np.where(select < 0.15, expected, tokens))


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(8)), cut=st.integers(0, 8), seed=st.integers(-(2**62), 2**62))
def test_a_cells_mask_does_not_depend_on_its_batch(order: list[int], cut: int, seed: int) -> None:
    lengths = np.array([5, 0, 40, 2, 17, 33, 9, 64], dtype=np.int32)
    cells = np.arange(8) * 1000
    tokens = np.random.default_rng(0).integers(4, len(GENES), lengths.sum()).astype(np.int32)
    parts = np.split(tokens, np.cumsum(lengths)[:-1])
    epochs = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    whole = apply_masking(tokens, lengths, cells, GENES, Masking(), seed=seed, epoch=epochs)
    by_cell = [np.split(array, np.cumsum(lengths)[:-1]) for array in whole]
    for some in (order[:cut], order[cut:]):
        flat = np.concatenate([np.zeros(0, np.int32), *(parts[i] for i in some)])
        got = apply_masking(flat, lengths[some], cells[some], GENES, Masking(), seed=seed, epoch=epochs[some])
        for array, wanted in zip(got, by_cell, strict=True):
            assert array.tolist() == [token for i in some for token in wanted[i].tolist()]


def test_seed_epoch_and_cell_change_the_mask() -> None:
    lengths = np.full(1, 200, dtype=np.int32)
    tokens = np.arange(4, 204, dtype=np.int32)

    def labels(seed: int, epoch: int, cell: int) -> list[int]:
        return apply_masking(tokens, lengths, np.array([cell]), GENES, Masking(), seed=seed, epoch=epoch)[1].tolist()

    assert labels(0, 0, 0) == labels(0, 0, 0)
    assert len({tuple(labels(*key)) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}) == 4


def test_the_tokens_given_are_not_changed() -> None:
    lengths = np.array([100], dtype=np.int32)
    tokens = np.arange(4, 104, dtype=np.int32)
    apply_masking(tokens, lengths, np.array([0]), GENES, Masking(probability=1.0), seed=0, epoch=0)
    assert tokens.tolist() == list(range(4, 104))


@pytest.mark.parametrize(("probability", "num_selected"), [(0.0, 0), (1.0, 100)])
def test_none_and_all(probability: float, num_selected: int) -> None:
    lengths = np.array([100], dtype=np.int32)
    tokens = np.arange(4, 104, dtype=np.int32)
    masking = Masking(probability=probability)
    _, labels = apply_masking(tokens, lengths, np.array([0]), GENES, masking, seed=0, epoch=0)
    assert (labels != NO_LABEL).sum() == num_selected


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"probability": 1.5}, "masking.probability is 1.5"),
        ({"mask_share": -0.1}, "masking.mask_share is -0.1"),
        ({"random_share": float("nan")}, "masking.random_share is nan"),
        ({"mask_share": 0.9, "random_share": 0.2}, "is 1.1: wanted at most 1"),
    ],
)
def test_impossible_shares(options: dict[str, float], pattern: str) -> None:
    with pytest.raises(InputError, match=pattern):
        Masking(**options)
