"""Rank tokens: a cell as its genes in falling order of median-normalised expression.

Source: Theodoris et al. 2023, doi:10.1038/s41586-023-06139-9, Methods, "Rank value encoding".
C cells, N non-zero counts, G genes of the store, T tokens of all cells.
"""

import hashlib
import json
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from celltron.cells.medians import TARGET_TOTAL, compute_medians
from celltron.cells.memory import address_of, addresses_of, like
from celltron.cells.rank_kernel import Frame, GeneTokens, rank_cells
from celltron.cells.reader import CellReader
from celltron.cells.store import fingerprint_of_genes
from celltron.cells.token_rows import TokenRows, copy_tokens
from celltron.core import CLS, EOS, InputError, MedianTable, Vocabulary

COUNT_CELLS = 4096
SMALLEST_MEDIAN, LARGEST_MEDIAN = 1e-15, 1e15
"""Medians of count / total x 10,000 lie far within; the products that the order begins with stay finite."""


class RankTokenizer:
    """Turns cells of one store's genes into token ids.

    A gene's score is count / total_counts x 10,000 / median, in float64 and in this order, where ``total_counts`` is
    over all genes of the cell's source. Tokens come by falling score, at a tie by rising token id, and are cut to
    ``max_length``, CLS and EOS included. Genes without a token or without a median are left out. A cell none of whose
    genes is left has the length of its frame: 0, 1 or 2.

    Args:
        vocabulary: token ids.
        medians: non-zero medians of count / total x 10,000.
        genes: the store's gene ids in order.
        max_length: largest number of tokens of a cell.
        add_cls: put CLS first; None does so when the vocabulary has it.
        add_eos: put EOS last; None does so when the vocabulary has it.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        medians: MedianTable,
        genes: Sequence[str],
        *,
        max_length: int = 2048,
        add_cls: bool | None = None,
        add_eos: bool | None = None,
    ) -> None:
        cls_id = _frame_id(add_cls, vocabulary.cls_id, CLS)
        eos_id = _frame_id(add_eos, vocabulary.eos_id, EOS)
        self._frame = Frame(max_length, cls_id, eos_id)
        self.add_cls, self.add_eos = cls_id >= 0, eos_id >= 0
        shortest = 1 + self.add_cls + self.add_eos
        if max_length < shortest:
            raise InputError(f"max_length is {max_length}: wanted {shortest} or more tokens a cell")
        self.vocabulary = vocabulary
        self.medians = medians
        self.max_length = max_length
        self._genes_fingerprint = fingerprint_of_genes(tuple(genes))
        tokens = vocabulary.ids_of(list(genes))
        median_of_token = medians.for_vocabulary(vocabulary)
        median_of_gene = np.where(tokens >= 0, median_of_token[tokens], np.nan)
        has_both_values = np.isfinite(median_of_gene) & (tokens >= vocabulary.first_gene_id)
        self.num_known_genes = int(has_both_values.sum())
        if self.num_known_genes == 0:
            some, wanted = ", ".join(list(genes)[:3]), ", ".join(vocabulary.genes[:3])
            raise InputError(
                f"none of the store's {len(genes)} genes (such as {some}) has a token and a median in the vocabulary "
                f"(such as {wanted}): take one of its species"
            )
        median = np.where(has_both_values, median_of_gene, 1.0)
        strange = (median < SMALLEST_MEDIAN) | (median > LARGEST_MEDIAN)
        if strange.any():
            gene = int(np.flatnonzero(strange)[0])
            raise InputError(
                f"the median of {genes[gene]} is {median[gene]:g}: wanted one of count / total x 10,000, from "
                f"{SMALLEST_MEDIAN:g} to {LARGEST_MEDIAN:g}; compute the medians again"
            )
        self._genes = GeneTokens(
            token=np.where(has_both_values, tokens, -1).astype(np.int32),
            median=median,
            inverse=np.where(has_both_values, 1.0 / median, 0.0),
        )
        self._memory = threading.local()
        self._tables: weakref.WeakKeyDictionary[CellReader, list[GeneTokens]] = weakref.WeakKeyDictionary()

    @classmethod
    def from_store(
        cls,
        store: CellReader,
        *,
        max_length: int = 2048,
        vocabulary: Vocabulary | None = None,
        medians: MedianTable | None = None,
    ) -> "RankTokenizer":
        """A tokeniser for a store; without vocabulary or medians, of the store's own genes and medians."""
        if vocabulary is None:
            vocabulary = Vocabulary.from_genes(store.gene_ids)
        if medians is None:
            medians = compute_medians(store)
        return cls(vocabulary, medians, store.gene_ids, max_length=max_length)

    def tokenize(self, store: CellReader, cells: npt.ArrayLike) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Token ids int32 [T] of the cells one after the other, and the length of each, int32 [C]."""
        rows = self.encode(store, store.check_cells(cells))
        return copy_tokens(rows), rows.lengths

    def encode(self, store: CellReader, cells: npt.NDArray[np.int64]) -> TokenRows:
        """The tokens of cells (checked numbers), each where there was room for it.

        They lie in memory that the calling thread's next call writes over: new memory for every call would cost a fifth
        of the time.
        """
        tables = self._tables.get(store) or self._tables_of(store)
        located = store.locate(cells)
        room = np.zeros(len(cells), dtype=np.int64)
        for part in located:
            room[part.slots] = part.sizes
        room = np.minimum(room + 2, self.max_length)
        begins = np.cumsum(room) - room
        tokens = self._scratch(int(room.sum()))
        lengths = np.zeros(len(cells), dtype=np.int32)
        for part in located:
            bad = rank_cells(
                addresses_of(part),
                like(part.index_dtype),
                like(part.count_dtype),
                tables[part.member],
                self._frame,
                begins,
                (tokens, lengths),
            )
            if bad != -1:
                cell = int(cells[bad if bad >= 0 else -2 - bad])
                what = "names a gene beyond those it has" if bad >= 0 else "has counts but no total"
                raise InputError(f"{store.name} is damaged: cell {cell} {what}; run celltron verify")
        addresses = (address_of(tokens) + 4 * begins).astype(np.uint64)
        return TokenRows(addresses, lengths, "int32", (tokens,))

    def _scratch(self, num_tokens: int) -> npt.NDArray[np.int32]:
        """Memory of the calling thread for so many tokens."""
        memory: npt.NDArray[np.int32] | None = getattr(self._memory, "tokens", None)
        if memory is None or len(memory) < num_tokens:
            memory = self._memory.tokens = np.empty(num_tokens + num_tokens // 4, dtype=np.int32)
        return memory

    def _tables_of(self, store: CellReader) -> list[GeneTokens]:
        """The tokens of each member's own genes."""
        if store.genes_fingerprint != self._genes_fingerprint:
            raise InputError(
                f"{store.name} has other genes than this tokeniser was made for: make one with RankTokenizer.from_store"
            )
        tables = [
            self._genes if places is None else _tokens_at(self._genes, places)
            for places in store.gene_maps
        ]
        self._tables[store] = tables
        return tables

    def to_dict(self) -> dict[str, Any]:
        """Every setting that decides the tokens; vocabulary, medians and genes by fingerprint."""
        return {
            "kind": "rank",
            "version": 1,
            "max_length": self.max_length,
            "add_cls": self.add_cls,
            "add_eos": self.add_eos,
            "target_total": TARGET_TOTAL,
            "vocabulary": self.vocabulary.fingerprint(),
            "medians": self.medians.fingerprint(),
            "genes": self._genes_fingerprint,
        }

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of `to_dict`."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def _frame_id(is_wanted: bool | None, token_id: int | None, token: str) -> int:
    """The id of a special token that frames cells, -1 for none."""
    if token_id is None and is_wanted:
        raise InputError(
            f"add_{token.strip('<>')} was asked of a vocabulary without {token}: leave it out or take a vocabulary "
            "that has it"
        )
    return -1 if token_id is None or is_wanted is False else token_id


def _tokens_at(genes: GeneTokens, places: npt.NDArray[np.int64]) -> GeneTokens:
    """The tokens of some of the genes, in the order of their places."""
    return GeneTokens(genes.token[places], genes.median[places], genes.inverse[places])


def count_tokens(
    store: CellReader,
    tokenizer: RankTokenizer,
    cells: npt.ArrayLike | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.int64]:
    """How often each token id occurs in the tokenised cells: int64 [V]; the unigram baseline's counts."""
    chosen = np.arange(len(store)) if cells is None else store.check_cells(cells)
    totals = np.zeros(len(tokenizer.vocabulary), dtype=np.int64)
    for start in range(0, len(chosen), COUNT_CELLS):
        part = chosen[start : start + COUNT_CELLS]
        tokens, _ = tokenizer.tokenize(store, part)
        totals += np.bincount(tokens, minlength=len(totals))
        if progress is not None:
            progress(start + len(part), len(chosen))
    return totals
