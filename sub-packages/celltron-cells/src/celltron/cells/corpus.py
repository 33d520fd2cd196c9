"""A run's cells and how they become tokens: a store, a tokeniser and a split, made once and then carried along.

V tokens of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from celltron.cells.batch import NO_LABEL
from celltron.cells.convert import ConvertOptions
from celltron.cells.loader import Loader
from celltron.cells.mask import Masking
from celltron.cells.medians import compute_medians
from celltron.cells.order_config import OrderConfig, make_order
from celltron.cells.reader import CellReader
from celltron.cells.sampler import LoaderState, Order
from celltron.cells.split import Split, split_cells
from celltron.cells.tokenize import RankTokenizer, count_tokens
from celltron.core import (
    CLS,
    MASK,
    PAD,
    InputError,
    KeyedPermutation,
    MedianTable,
    Vocabulary,
    key_from,
    load_published_geneformer,
    load_vocabulary_table,
)

VOCABULARY_NAME = "vocabulary.json"
MEDIANS_NAME = "medians.json"
SPLIT_NAME = "split.json"
DRAW_STREAM = 4
"""First word of the keys that draw the measured cells; order, masks and split have others."""
PUBLISHED: tuple[Literal["gc30M", "gc95M"], ...] = ("gc30M", "gc95M")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which cells, as which tokens."""

    paths: tuple[str, ...] | str = ()
    """A store, tar shards (also by address), a collection's file, or several stores; or files of counts, which are
    converted to a store in the run's folder first."""
    storage: tuple[str, ...] = ()
    """Options of fsspec's file system, where a path is an address, such as `anon=true`."""
    convert: ConvertOptions = field(default_factory=ConvertOptions)
    """How files of counts are read."""
    vocabulary: str = "store"
    """Genes and medians: `store` takes the store's own genes and their medians over the training cells; `gc30M` and
    `gc95M` are Geneformer's published ones; else the path of a table with ensembl_id, token_id and median."""
    medians: str | None = None
    """A file that `celltron medians` wrote, whose medians are taken instead of the vocabulary's."""
    with_cls_eos: bool = False
    """Whether a vocabulary of the store's own genes gets <cls> and <eos>, which then frame every cell."""
    with_cls: bool = False
    """Whether it gets <cls> alone, which then stands before every cell, as in BioNeMo's Geneformer."""
    max_length: int = 2048
    """Longest cell in tokens, special ones included; the lowest ranks are cut off."""
    cache: bool = False
    """Whether ranked tokens are kept beside the store, so that later epochs and runs need not rank again."""
    order: OrderConfig = field(default_factory=OrderConfig)
    """Which training cells come when."""
    masking: Masking = field(default_factory=Masking)
    """How places are masked."""
    validation_by: str = "cell"
    """`cell`, or the obs column (donor, dataset) whose groups stay whole on one side."""
    validation_fraction: float = 0.1
    """Share of the cells set aside for validation."""
    validation_groups: tuple[str, ...] | None = None
    """The groups set aside, by name; null draws groups until the share is reached."""
    test_fraction: float = 0.0
    """Share of the cells kept from both training and validation, for a test at the end."""
    test_groups: tuple[str, ...] | None = None
    """The groups kept for the test, by name; null draws groups until the share is reached."""
    validation_cells: int = 10_000
    """Cells of those set aside on which the validation loss is measured, drawn once; 0 measures on all."""
    unigram_cells: int = 100_000
    """Training cells, drawn once, over which gene frequencies are counted for the baseline; 0 counts all."""

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"data.max_length is {self.max_length}, but must be at least 1")
        if self.with_cls and self.with_cls_eos:
            raise ValueError("data.with_cls and data.with_cls_eos are both true; choose the tokens that frame a cell")
        for name in ("validation_cells", "unigram_cells"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name} is {getattr(self, name)}, but must not be negative")
        if self.masking.probability == 0.0:
            raise ValueError("data.masking.probability is 0, so there is nothing to predict; raise it, such as to 0.15")

    @property
    def sources(self) -> tuple[str, ...]:
        """`paths` as a sequence."""
        return (self.paths,) if isinstance(self.paths, str) else self.paths

    def vocabulary_of(self, genes: Sequence[str]) -> Vocabulary:
        """A vocabulary of a store's own genes, in their order."""
        if self.with_cls:
            return Vocabulary([PAD, MASK, CLS, *genes])
        return Vocabulary.from_genes(genes, with_cls_eos=self.with_cls_eos)


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """A store, its tokeniser and its split."""

    config: DataConfig
    store: CellReader
    tokenizer: RankTokenizer
    split: Split
    validation_cells: npt.NDArray[np.int64]
    """Those of the split's validation cells on which the loss is measured, int64, rising."""
    unigram_cells: npt.NDArray[np.int64]
    """Those of the split's training cells over which gene frequencies are counted, int64, rising."""

    def write(self, folder: Path) -> None:
        """Write vocabulary, medians and split manifest, with which `read_corpus` makes the same corpus again."""
        self.tokenizer.vocabulary.to_json(folder / VOCABULARY_NAME)
        self.tokenizer.medians.to_json(folder / MEDIANS_NAME)
        self.split.write(folder / SPLIT_NAME)

    def train_loader(  # noqa: PLR0913
        self,
        masking: Masking,
        *,
        cells_per_batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        state: LoaderState | None = None,
    ) -> Loader:
        """Shuffled, masked training batches without end."""
        return Loader(
            self.store,
            self.tokenizer,
            cells_per_batch=cells_per_batch,
            seed=seed,
            order=self.order(cells_per_batch=cells_per_batch, seed=seed),
            masking=masking,
            epochs=None,
            rank=rank,
            world_size=world_size,
            state=state,
            cache=self.config.cache,
        )

    def order(self, *, cells_per_batch: int, seed: int) -> Order:
        """The order of the training cells that the config asks for."""
        return make_order(
            self.config.order,
            self.store,
            self.split.train,
            self._lengths_of,
            cells_per_batch=cells_per_batch,
            seed=seed,
        )

    def _lengths_of(self, cells: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens of cells, from how many genes they have; those without a token are few and are counted too."""
        lengths = np.zeros(len(cells), dtype=np.int64)
        for part in self.store.locate(cells):
            lengths[part.slots] = part.sizes
        return np.minimum(lengths, self.tokenizer.max_length)

    def validation_loader(
        self, masking: Masking, *, cells_per_batch: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> Loader:
        """One pass over the measured validation cells in store order, with the same masks every time."""
        return Loader(
            self.store,
            self.tokenizer,
            cells_per_batch=cells_per_batch,
            seed=seed,
            cells=self.validation_cells,
            masking=masking,
            rank=rank,
            world_size=world_size,
            shuffle=False,
        )

    def unigram_loss(self, masking: Masking, *, seed: int) -> float:
        """Cross-entropy, in nats, of the training cells' gene frequencies on the masked places of the validation cells.

        What a model that knows how common each gene is, and nothing of the cell, would score; one is added to every
        gene's count (Laplace), so that genes unseen in training cost something finite.

        Args:
            masking: That of the validation loss it is compared with.
            seed: That of the validation loss it is compared with.

        Raises:
            InputError: no place of the validation cells is masked, so that they have no loss.
        """
        counts_V = count_tokens(self.store, self.tokenizer, self.unigram_cells).astype(np.float64)
        vocabulary = self.tokenizer.vocabulary
        counts_V[vocabulary.special_ids] = 0.0
        counts_V[vocabulary.first_gene_id :] += 1.0
        labels_V = np.zeros(len(vocabulary), dtype=np.int64)
        with self.validation_loader(masking, cells_per_batch=256, seed=seed) as loader:
            for batch in loader:
                labels_V += np.bincount(batch.labels[batch.labels != NO_LABEL], minlength=len(vocabulary))
        if not labels_V.any():
            raise InputError(
                f"no place of the {len(self.validation_cells)} validation cells is masked, so they have no loss; raise "
                "data.validation_fraction"
            )
        return cross_entropy(counts_V, labels_V)


def cross_entropy(counts_V: npt.NDArray[np.float64], labels_V: npt.NDArray[np.int64]) -> float:
    """Mean of -log p over at least one label, in nats, where p is proportional to `counts_V`."""
    seen = labels_V > 0
    log_p = np.log(counts_V[seen]) - np.log(counts_V.sum())
    return float(-(labels_V[seen] * log_p).sum() / labels_V.sum())


def build_corpus(config: DataConfig, store: CellReader, *, seed: int) -> Corpus:
    """Split the store's cells and make the tokeniser, its medians from the training cells only."""
    split = split_cells(
        store,
        by=config.validation_by,
        validation_fraction=config.validation_fraction,
        seed=seed,
        validation_groups=config.validation_groups,
        test_fraction=config.test_fraction,
        test_groups=config.test_groups,
    )
    vocabulary, medians = _vocabulary(config, store, split)
    corpus = _assemble(config, store, vocabulary, medians, split)
    corpus.order(cells_per_batch=1, seed=seed)  # an order that cannot be is refused before a run begins
    return corpus


def read_corpus(config: DataConfig, store: CellReader, folder: Path) -> Corpus:
    """The corpus that `Corpus.write` wrote; refuses a store that the split was not made for."""
    vocabulary = Vocabulary.from_json(folder / VOCABULARY_NAME)
    medians = MedianTable.from_json(folder / MEDIANS_NAME)
    return _assemble(config, store, vocabulary, medians, Split.read(folder / SPLIT_NAME, store))


def _assemble(
    config: DataConfig, store: CellReader, vocabulary: Vocabulary, medians: MedianTable, split: Split
) -> Corpus:
    tokenizer = RankTokenizer(vocabulary, medians, store.gene_ids, max_length=config.max_length)
    validation_cells = _draw(split.validation, config.validation_cells)
    return Corpus(config, store, tokenizer, split, validation_cells, _draw(split.train, config.unigram_cells))


def _draw(cells: npt.NDArray[np.int64], limit: int) -> npt.NDArray[np.int64]:
    """At most `limit` of the cells, drawn over all of them, the same ones every time; 0 is no limit."""
    if not limit or len(cells) <= limit:
        return cells
    order = KeyedPermutation(len(cells), key_from(DRAW_STREAM, len(cells)))
    return np.sort(cells[order(np.arange(limit, dtype=np.int64))])


def _vocabulary(config: DataConfig, store: CellReader, split: Split) -> tuple[Vocabulary, MedianTable]:
    given = MedianTable.from_json(Path(config.medians)) if config.medians is not None else None
    if config.vocabulary == "store":
        medians = given or compute_medians(store, cells=split.train)
        seen = set(medians.genes)
        genes = [gene for gene in store.gene_ids if gene in seen]
        if not genes:
            raise InputError(f"{config.medians} has none of the genes of {store.name}; give medians of its species")
        return config.vocabulary_of(genes), medians
    for published in PUBLISHED:
        if config.vocabulary == published:
            vocabulary, medians = load_published_geneformer(published)
            return vocabulary, given or medians
    if not Path(config.vocabulary).is_file():
        raise InputError(
            f"data.vocabulary is {config.vocabulary!r}, neither store, gc30M, gc95M nor a table's path; choose one"
        )
    vocabulary, medians = load_vocabulary_table(Path(config.vocabulary))
    return vocabulary, given or medians
