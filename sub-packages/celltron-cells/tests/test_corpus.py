from pathlib import Path

import numpy as np
import pytest

from celltron.cells import NO_LABEL, CellStore, Masking, RankTokenizer, compute_medians
from celltron.cells.corpus import DataConfig, build_corpus, cross_entropy, read_corpus
from celltron.core import InputError, load_published_geneformer

MASKING = Masking(probability=0.3)


def config(**values: object) -> DataConfig:
    return DataConfig(paths="a.store", max_length=16, validation_fraction=0.25, **values)  # type: ignore[arg-type]


def test_medians_are_of_the_training_cells_alone(store: CellStore) -> None:
    corpus = build_corpus(config(), store, seed=3)
    assert corpus.tokenizer.medians == compute_medians(store, cells=corpus.split.train)
    assert set(corpus.tokenizer.vocabulary.genes) == set(corpus.tokenizer.medians.genes)
    assert sorted([*corpus.split.train, *corpus.split.validation]) == list(range(len(store)))


def test_written_and_read_it_is_the_same(store: CellStore, tmp_path: Path) -> None:
    corpus = build_corpus(config(with_cls_eos=True), store, seed=3)
    corpus.write(tmp_path)
    again = read_corpus(config(), store, tmp_path)
    assert again.tokenizer.fingerprint == corpus.tokenizer.fingerprint
    np.testing.assert_array_equal(again.split.validation, corpus.split.validation)
    batches = [next(c.train_loader(MASKING, cells_per_batch=8, seed=1)) for c in (corpus, again)]
    np.testing.assert_array_equal(batches[0].tokens, batches[1].tokens)
    assert batches[0].tokens[0] == corpus.tokenizer.vocabulary.cls_id


def test_own_genes_behind_cls_alone(store: CellStore) -> None:
    corpus = build_corpus(config(with_cls=True), store, seed=3)
    vocabulary = corpus.tokenizer.vocabulary
    assert (vocabulary.cls_id, vocabulary.eos_id, vocabulary.first_gene_id) == (2, None, 3)
    batch = next(corpus.train_loader(MASKING, cells_per_batch=8, seed=1))
    ends = np.cumsum(batch.lengths)
    assert (batch.tokens[ends - batch.lengths] == vocabulary.cls_id).all()
    assert (batch.tokens == vocabulary.cls_id).sum() == 8
    with pytest.raises(ValueError, match="with_cls and data.with_cls_eos are both true"):
        config(with_cls=True, with_cls_eos=True)


def test_validation_is_masked_alike_every_time_and_sees_every_cell_once(store: CellStore) -> None:
    corpus = build_corpus(config(), store, seed=3)
    passes = [list(corpus.validation_loader(MASKING, cells_per_batch=size, seed=1)) for size in (3, 7)]
    cells = [np.concatenate([batch.cells for batch in batches]) for batches in passes]
    labels = [np.concatenate([batch.labels for batch in batches]) for batches in passes]
    np.testing.assert_array_equal(cells[0], corpus.split.validation)
    np.testing.assert_array_equal(cells[0], cells[1])
    np.testing.assert_array_equal(labels[0], labels[1])


def test_unigram_loss_is_the_cross_entropy_of_training_frequencies_on_the_masked_places(store: CellStore) -> None:
    corpus = build_corpus(config(), store, seed=3)
    vocabulary = corpus.tokenizer.vocabulary
    train, _ = corpus.tokenizer.tokenize(store, corpus.split.train)
    probability = {gene: (np.sum(train == gene) + 1) for gene in range(vocabulary.first_gene_id, len(vocabulary))}
    total = sum(probability.values())
    loader = corpus.validation_loader(MASKING, cells_per_batch=5, seed=1)
    labels = [int(label) for batch in loader for label in batch.labels if label != NO_LABEL]
    expected = -np.mean([np.log(probability[label] / total) for label in labels])
    assert corpus.unigram_loss(MASKING, seed=1) == pytest.approx(expected, rel=1e-12)


def test_cross_entropy_by_hand() -> None:
    counts, labels = np.array([1.0, 1.0, 2.0]), np.array([0, 1, 3])
    assert cross_entropy(counts, labels) == pytest.approx((np.log(4) + 3 * np.log(2)) / 4)


def test_validation_cells_without_a_masked_place_are_refused(store: CellStore) -> None:
    corpus = build_corpus(config(validation_cells=1), store, seed=3)
    with pytest.raises(InputError, match="no place of the 1 validation cells is masked"):
        corpus.unigram_loss(Masking(probability=1e-12), seed=1)


def test_published_vocabularies_are_taken_whole(store: CellStore) -> None:
    corpus = build_corpus(config(vocabulary="gc95M"), store, seed=3)
    vocabulary, medians = load_published_geneformer("gc95M")
    expected = RankTokenizer(vocabulary, medians, store.gene_ids, max_length=16)
    assert corpus.tokenizer.fingerprint == expected.fingerprint


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"max_length": 0}, "data.max_length"),
        ({"unigram_cells": -1}, "data.unigram_cells"),
        ({"validation_cells": -1}, "data.validation_cells"),
        ({"masking": Masking(probability=0.0)}, "data.masking.probability"),
    ],
)
def test_impossible_settings_are_named(values: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DataConfig(**({"paths": "a.store"} | values))  # type: ignore[arg-type]


def test_an_unknown_vocabulary_is_named(store: CellStore) -> None:
    with pytest.raises(InputError, match="gc31M"):
        build_corpus(config(vocabulary="gc31M"), store, seed=3)


def test_measured_cells_are_drawn_over_the_whole_side_and_stay_the_same(store: CellStore, tmp_path: Path) -> None:
    settings = config(validation_cells=20, unigram_cells=40)
    corpus = build_corpus(settings, store, seed=3)
    corpus.write(tmp_path)
    again = read_corpus(settings, store, tmp_path)
    for drawn, side, limit in [
        (corpus.validation_cells, corpus.split.validation, 20),
        (corpus.unigram_cells, corpus.split.train, 40),
    ]:
        assert len(drawn) == limit and set(drawn) <= set(side) and sorted(drawn) == list(drawn)
        # Not the first cells of the store, which may all be of one donor.
        assert drawn[-1] > side[len(side) // 2]
    np.testing.assert_array_equal(again.validation_cells, corpus.validation_cells)
    np.testing.assert_array_equal(again.unigram_cells, corpus.unigram_cells)


def test_medians_of_a_file_are_taken(store: CellStore, tmp_path: Path) -> None:
    medians = compute_medians(store)
    medians.to_json(tmp_path / "medians.json")
    path = str(tmp_path / "medians.json")
    assert build_corpus(config(medians=path), store, seed=3).tokenizer.medians == medians
    assert build_corpus(config(medians=path, vocabulary="gc30M"), store, seed=3).tokenizer.medians == medians
