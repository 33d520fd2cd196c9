"""Rank tokens against an independent reference in plain numpy."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from celltron.cells import CellStore, RankTokenizer, convert, count_tokens
from celltron.core import InputError, MedianTable, Vocabulary, load_published_geneformer

Reference = Callable[[np.ndarray], list[int]]


def reference_of(genes: list[str], vocabulary: Vocabulary, medians: MedianTable, max_length: int) -> Reference:
    """The plainest way, a cell at a time: a sorted list of (score, token) pairs."""
    median_of = dict(zip(medians.genes, medians.values, strict=True))
    places = {token: i for i, token in enumerate(vocabulary.tokens)}

    def reference(counts: np.ndarray) -> list[int]:
        pairs = []
        for gene, count in zip(genes, counts, strict=True):
            if count > 0 and gene in places and gene in median_of:
                pairs.append((-(np.float64(count) / counts.sum() * 10_000 / median_of[gene]), places[gene]))
        tokens = [token for _, token in sorted(pairs)]
        first = [places[token] for token in ("<cls>",) if token in places]
        last = [places[token] for token in ("<eos>",) if token in places]
        return [*first, *tokens[: max_length - len(first) - len(last)], *last]

    return reference


def cells_of(tokens: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]


@pytest.mark.parametrize("name", ["gc30M", "gc95M"])
@pytest.mark.parametrize("max_length", [2048, 4096, 100])
def test_published_dictionaries(store: CellStore, counts: np.ndarray, genes: list[str], name, max_length) -> None:  # type: ignore[no-untyped-def]
    vocabulary, medians = load_published_geneformer(name)
    tokenizer = RankTokenizer(vocabulary, medians, store.gene_ids, max_length=max_length)
    reference = reference_of(genes, vocabulary, medians, max_length)
    cells = np.append(np.random.default_rng(1).permutation(400)[:60], 7)
    tokens, lengths = tokenizer.tokenize(store, cells)
    assert tokens.dtype == lengths.dtype == np.int32
    got = cells_of(tokens, lengths)
    for cell, sequence in zip(cells, got, strict=True):
        assert sequence == reference(counts[cell])
    assert max(map(len, got)) == 100 or max_length > 100
    assert len(got[-1]) == (2 if name == "gc95M" else 0)  # the empty cell


def big_store(folder: Path, write_h5ad, counts: np.ndarray, num_genes: int) -> tuple[CellStore, list[str]]:  # type: ignore[no-untyped-def]
    names = list(load_published_geneformer("gc30M")[0].genes)[:num_genes]
    convert([write_h5ad(folder / "a.h5ad", counts, names)], folder / "a.store")
    return CellStore.open(folder / "a.store"), names


@pytest.mark.parametrize("max_length", [2048, 4096])
@pytest.mark.parametrize("frame", [(), ("<cls>",), ("<eos>",), ("<eos>", "<cls>")])
def test_cells_longer_than_the_limit(tmp_path: Path, write_h5ad, max_length: int, frame: tuple[str, ...]) -> None:  # type: ignore[no-untyped-def]
    counts = np.random.default_rng(0).poisson(3.0, (6, 5000))
    counts[5, 100:] = 0
    store, names = big_store(tmp_path, write_h5ad, counts, 5000)
    vocabulary = Vocabulary([*frame, "<mask>", "<pad>", "<other>", *names[::-1]])
    medians = MedianTable(names, np.random.default_rng(1).lognormal(1.0, 1.0, 5000))
    tokenizer = RankTokenizer(vocabulary, medians, names, max_length=max_length)
    got = cells_of(*tokenizer.tokenize(store, np.arange(6)))
    reference = reference_of(names, vocabulary, medians, max_length)
    assert got == [reference(counts[cell]) for cell in range(6)]
    assert [len(sequence) for sequence in got[:5]] == [max_length] * 5 and len(got[5]) < 110
    for sequence in got:
        assert (sequence[0] == vocabulary.cls_id) == ("<cls>" in frame)
        assert (sequence[-1] == vocabulary.eos_id) == ("<eos>" in frame)


@pytest.mark.parametrize("num_genes", [3, 24, 25, 400, 3000])
def test_ties_are_in_the_order_of_the_vocabulary(tmp_path: Path, write_h5ad, num_genes: int) -> None:  # type: ignore[no-untyped-def]
    """Equal counts and medians: every score is the same, in runs short and long."""
    counts = np.ones((2, num_genes), dtype=int)
    counts[1, : num_genes // 2] = 2
    store, names = big_store(tmp_path, write_h5ad, counts, num_genes)
    shuffled = [names[i] for i in np.random.default_rng(2).permutation(num_genes)]
    vocabulary = Vocabulary.from_genes(shuffled)
    tokenizer = RankTokenizer(vocabulary, MedianTable(names, np.full(num_genes, 0.3)), names, max_length=num_genes)
    first, second = cells_of(*tokenizer.tokenize(store, [0, 1]))
    assert first == list(range(2, num_genes + 2))
    doubled = sorted(vocabulary.ids_of(names[: num_genes // 2]).tolist())
    assert second == doubled + sorted(set(first) - set(doubled))


def test_genes_without_token_or_median_are_left_out(tmp_path: Path, write_h5ad) -> None:  # type: ignore[no-untyped-def]
    counts = np.array([[4, 3, 2, 1], [0, 5, 0, 0], [0, 0, 0, 0]])
    store, names = big_store(tmp_path, write_h5ad, counts, 4)
    vocabulary = Vocabulary.from_genes([names[0], names[2], names[3]])
    tokenizer = RankTokenizer(vocabulary, MedianTable([names[0], names[1], names[3]], [1.0, 1.0, 0.1]), names)
    assert tokenizer.num_known_genes == 2
    tokens, lengths = tokenizer.tokenize(store, [0, 1, 2, 0])
    assert cells_of(tokens, lengths) == [[4, 2], [], [], [4, 2]]  # 1/0.1 before 4/1; no known gene; no gene


def test_the_same_in_every_run_and_any_grouping(store: CellStore) -> None:
    tokenizer = RankTokenizer.from_store(store)
    whole, lengths = tokenizer.tokenize(store, np.arange(400))
    again, _ = RankTokenizer.from_store(CellStore.open(store.path)).tokenize(store, np.arange(400))
    single = [tokenizer.tokenize(store, [cell])[0] for cell in range(400)]
    assert np.array_equal(whole, again) and np.array_equal(whole, np.concatenate(single))
    assert lengths.tolist() == [len(tokens) for tokens in single]
    empty_tokens, empty_lengths = tokenizer.tokenize(store, [])
    assert len(empty_tokens) == len(empty_lengths) == 0


def test_from_store_uses_its_own_genes_and_medians(store: CellStore, counts: np.ndarray, genes: list[str]) -> None:
    tokenizer = RankTokenizer.from_store(store, max_length=64)
    assert tokenizer.vocabulary.genes == tuple(genes) and not (tokenizer.add_cls or tokenizer.add_eos)
    tokens, _ = tokenizer.tokenize(store, [3])
    assert tokens.tolist() == reference_of(genes, tokenizer.vocabulary, tokenizer.medians, 64)(counts[3])


def test_the_fingerprint_is_of_every_setting(store: CellStore, genes: list[str]) -> None:
    vocabulary, medians = load_published_geneformer("gc95M")
    base = RankTokenizer(vocabulary, medians, genes)
    assert base.fingerprint == RankTokenizer(vocabulary, medians, genes).fingerprint
    settings = base.to_dict()
    assert (settings["add_cls"], settings["add_eos"], settings["max_length"]) == (True, True, 2048)
    others = [
        RankTokenizer(vocabulary, medians, genes, max_length=4096),
        RankTokenizer(vocabulary, medians, genes, add_cls=False),
        RankTokenizer(vocabulary, medians, genes, add_eos=False),
        RankTokenizer(vocabulary, medians, genes, add_cls=False, add_eos=False),
        RankTokenizer(vocabulary, medians, genes[::-1]),
        RankTokenizer(vocabulary, MedianTable(medians.genes, medians.values * 2), genes),
        RankTokenizer(load_published_geneformer("gc30M")[0], medians, genes),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 8


def test_what_is_refused(store: CellStore, genes: list[str], fresh_store: Path) -> None:
    vocabulary, medians = load_published_geneformer("gc30M")
    with pytest.raises(InputError, match="add_cls was asked of a vocabulary without <cls>"):
        RankTokenizer(vocabulary, medians, genes, add_cls=True)
    with pytest.raises(InputError, match="add_eos was asked of a vocabulary without <eos>"):
        RankTokenizer(Vocabulary(["<pad>", "<mask>", "<cls>", *genes]), medians, genes, add_eos=True)
    with pytest.raises(InputError, match="max_length is 0"):
        RankTokenizer(vocabulary, medians, genes, max_length=0)
    with pytest.raises(InputError, match="max_length is 2: wanted 3"):
        RankTokenizer(*load_published_geneformer("gc95M"), genes, max_length=2)
    with pytest.raises(InputError, match="max_length is 1: wanted 2"):
        RankTokenizer(*load_published_geneformer("gc95M"), genes, max_length=1, add_eos=False)
    with pytest.raises(InputError, match="none of the store's 1 genes .such as ENSMUSG1. has a token"):
        RankTokenizer(vocabulary, medians, ["ENSMUSG1"])
    with pytest.raises(InputError, match="other genes than this tokeniser"):
        RankTokenizer(vocabulary, medians, genes[:-1]).tokenize(store, [0])
    with pytest.raises(InputError, match="no cell 400"):
        RankTokenizer(vocabulary, medians, genes).tokenize(store, [400])
    with pytest.raises(InputError, match="the median of .* is 1e-20: wanted one of count / total"):
        RankTokenizer(Vocabulary.from_genes(genes), MedianTable(genes, np.full(len(genes), 1e-20)), genes)
    path = fresh_store / "shards/00000/indices.bin"
    path.write_bytes(np.full(path.stat().st_size // 2, 9999, "<u2").tobytes())
    with pytest.raises(InputError, match="cell 0 names a gene beyond those it has"):
        RankTokenizer(vocabulary, medians, genes).tokenize(CellStore.open(fresh_store), [0])
    path = fresh_store / "shards/00000/totals.bin"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(InputError, match="cell 1 has counts but no total"):
        RankTokenizer(vocabulary, medians, store.gene_ids).tokenize(CellStore.open(fresh_store), [7, 1])


def test_token_counts(store: CellStore) -> None:
    tokenizer = RankTokenizer.from_store(store, max_length=100)
    cells = np.array([5, 9, 300])
    seen: list[tuple[int, int]] = []
    totals = count_tokens(store, tokenizer, cells, progress=lambda done, total: seen.append((done, total)))
    assert np.array_equal(totals, np.bincount(tokenizer.tokenize(store, cells)[0], minlength=602))
    assert count_tokens(store, tokenizer).sum() == tokenizer.tokenize(store, np.arange(400))[1].sum()
    assert seen == [(3, 3)]
