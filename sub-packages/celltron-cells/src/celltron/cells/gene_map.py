"""Whose gene is a column: the names in a file's var to Ensembl ids, and several files to one list of genes."""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from celltron.cells.ingest.anndata_frame import as_text
from celltron.cells.ingest.source import Frame
from celltron.core import GeneNames, InputError

Species = Literal["human", "mouse"]
ENSEMBL_PREFIX: dict[str, str] = {"human": "ENSG", "mouse": "ENSMUSG"}
SPECIES: tuple[Species, ...] = ("human", "mouse")
INDEX = "var_names"
ID_COLUMNS = ("ensembl_id", "gene_id", "gene_ids", "feature_id", "ensembl", "ensembl_gene_id", "gene_ids_ensembl")
NAME_COLUMNS = ("gene_symbol", "gene_symbols", "feature_name", "gene_name", "gene_names", "symbol", "gene_short_name")
UNMAPPED_NAMES = b"unmapped_names"
"""In the metadata of a gene file: the sources' names of genes that have no Ensembl id, a list in JSON."""
KEPT_TABLES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneColumn:
    """The genes of one source: the column they were read from, an Ensembl id (or None) and a printed name for each.

    ``key`` is equal for sources whose names are.
    """

    column: str
    ids: list[str | None]
    source_names: list[str]
    symbols: list[str]
    key: str


class GeneFinder:
    """Maps the columns of sources to Ensembl ids of one species; sources that name genes alike are looked at once.

    Without ``gene_id_column`` the row names of var and its usual id and symbol columns are tried; the one that maps to
    the most different genes is taken, the earlier at a tie. Version suffixes are dropped; ids of another species do not
    map, and names that are rather another species' are refused (mouse symbols differ from human ones in case alone).
    The last few tables of names are kept; several threads may ask at once.
    """

    def __init__(self, species: Species, gene_id_column: str | None = None) -> None:
        self._species = species
        self._gene_id_column = gene_id_column
        self._lock = threading.Lock()
        self._known: OrderedDict[str, GeneColumn] = OrderedDict()

    def find(self, var: Frame, name: str) -> GeneColumn:
        """The genes of the source that the user knows as ``name``."""
        table = _TextTable(var)
        key = table.digest(self._gene_id_column)
        with self._lock:
            genes = self._known.get(key)
        if genes is None:
            genes = self._look(table, name, key)
            with self._lock:
                self._known[key] = genes
                while len(self._known) > KEPT_TABLES:
                    self._known.popitem(last=False)
        return genes

    def _look(self, var: "_TextTable", name: str, key: str) -> GeneColumn:
        best, best_mapped = "", -1
        best_found: list[str] = []
        best_ids: list[str | None] = []
        for candidate in self._candidates(var, name):
            found = var.words(candidate)
            ids = _resolve(found, self._species)
            mapped = _num_different(ids)
            if mapped > best_mapped:
                best, best_found, best_ids, best_mapped = candidate, found, ids, mapped
            if mapped == len(ids):
                break
        _check_species(var, name, best, best_found, best_mapped, self._species)
        return GeneColumn(
            column=best,
            ids=best_ids,
            source_names=[word or row for word, row in zip(best_found, var.words(INDEX), strict=True)],
            symbols=_symbols(var, best, best_found, self._species),
            key=key,
        )

    def _candidates(self, var: "_TextTable", name: str) -> list[str]:
        column = self._gene_id_column
        if column is None:
            return [INDEX] + [usual for usual in (*ID_COLUMNS, *NAME_COLUMNS) if usual in var.columns]
        if column not in (INDEX, *var.columns):
            there = ", ".join([INDEX, *var.columns])
            raise InputError(
                f"{name} has no gene column {column!r} in var: it has {there}; pass gene_id_column with one of these"
            )
        return [column]


class _TextTable:
    """The columns of var that may name genes, as lists of text, each read once."""

    def __init__(self, var: Frame) -> None:
        self.columns = var.columns
        self._var = var
        self._arrays: dict[str, pa.Array] = {}

    def _array(self, name: str) -> pa.Array:
        if name not in self._arrays:
            array = self._var.index() if name == INDEX else as_text(self._var.column(name))
            self._arrays[name] = array.fill_null("")
        return self._arrays[name]

    def words(self, name: str) -> list[str]:
        """A column as text, ``var_names`` for the row names; what is missing is empty."""
        words: list[str] = self._array(name).to_pylist()
        return words

    def digest(self, gene_id_column: str | None) -> str:
        """sha256 (hex) of all that can be looked at."""
        found = hashlib.sha256(repr(self.columns).encode())
        for name in dict.fromkeys([INDEX, gene_id_column, *ID_COLUMNS, *NAME_COLUMNS]):
            if name is not None and name in (INDEX, *self.columns):
                found.update(f"{name}\0".encode())
                found.update(pc.binary_length(self._array(name)).to_numpy())
                found.update("".join(self.words(name)).encode())
        return found.hexdigest()


def _resolve(found: list[str], species: Species) -> list[str | None]:
    prefix = ENSEMBL_PREFIX[species]
    ids = GeneNames(species, {}, {}).resolve(found)  # where all are Ensembl ids, the tables need not be read
    if None in ids:
        ids = GeneNames.for_species(species).resolve(found)
    return [gene if gene is not None and gene.startswith(prefix) else None for gene in ids]


def _symbols(var: _TextTable, id_column: str, found: list[str], species: Species) -> list[str]:
    """Names to print: a symbol column, else the row names, else the ids themselves."""
    for name in NAME_COLUMNS:
        if name in var.columns:
            return [symbol or fallback for symbol, fallback in zip(var.words(name), found, strict=True)]
    row_names = var.words(INDEX)
    return found if id_column == INDEX or row_names[0].startswith(ENSEMBL_PREFIX[species]) else row_names


def _num_different(ids: list[str | None]) -> int:
    return len({gene for gene in ids if gene is not None})


def _check_species(
    var: _TextTable, path: str, column: str, found: list[str], num_mapped: int, species: Species
) -> None:
    """Refuse names of which none is a gene of the species, or which are rather another one's."""
    if 2 * sum(name.startswith(ENSEMBL_PREFIX[species]) for name in found) > len(found):
        return
    examples = ", ".join(repr(name) for name in found[:3])
    sentence = (
        f"{num_mapped} of the {len(found)} gene names in {column} of {path} (such as {examples}) are {species} genes"
    )
    for other in SPECIES:
        num_other = _num_different(_resolve(found, other)) if other != species else 0
        # Human aliases know most mouse symbols, their letter case aside; mouse symbols know next to no human ones.
        if num_other >= max(1, num_mapped if other == "mouse" else 2 * num_mapped):
            raise InputError(f"{sentence}, but {num_other} are {other} genes: pass species={other}")
    if num_mapped == 0:
        there = ", ".join(var.columns) or "no columns"
        raise InputError(
            f"{sentence}: pass gene_id_column with the column of Ensembl ids or symbols (var has {there}), "
            "or another species"
        )


@dataclass(slots=True)
class GeneList:
    """The union of the genes of several sources, in the order in which they are first seen.

    ``index_of`` may begin with the genes of a store that is added to; ``names`` and the table are of the others.
    """

    species: Species
    keep_unmapped: bool = False
    index_of: dict[str, int] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    num_summed: int = 0
    unmapped: dict[str, None] = field(default_factory=dict)
    _first: int = field(init=False)
    _columns: dict[str, list[tuple[int, pa.Array]]] = field(default_factory=dict)
    _known: dict[str, tuple[npt.NDArray[np.int32], int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._first = len(self.index_of)

    def add(self, genes: GeneColumn) -> tuple[npt.NDArray[np.int32], list[int]]:
        """Take in one source.

        Returns:
            For each of its columns the gene's place in the list or -1, int32; and the columns whose genes are new,
            for `take_columns`.
        """
        if genes.key in self._known:
            places, num_summed = self._known[genes.key]
            self.num_summed += num_summed
            return places, []
        num_summed = self.num_summed
        places = np.full(len(genes.ids), -1, dtype=np.int32)
        seen: set[str] = set()
        new_columns: list[int] = []
        for i, gene in enumerate(genes.ids):
            if gene is None:
                gene = genes.source_names[i]
                self.unmapped.setdefault(gene)
                if not self.keep_unmapped or not gene or not gene.isprintable():
                    continue
            self.num_summed += gene in seen
            seen.add(gene)
            if gene not in self.index_of:
                self.index_of[gene] = len(self.index_of)
                self.names.append(genes.symbols[i])
                new_columns.append(i)
            places[i] = self.index_of[gene]
        self._known[genes.key] = places, self.num_summed - num_summed
        return places, new_columns

    def take_columns(self, var: Frame, new_columns: list[int]) -> None:
        """Keep the source's own columns for the genes that it is the first to bring."""
        start = len(self.names) - len(new_columns)
        for name in var.columns if new_columns else []:
            array = var.column(name).take(pa.array(new_columns, type=pa.int64()))
            plain = as_text(array) if pa.types.is_dictionary(array.type) else array
            self._columns.setdefault(name, []).append((start, plain))

    def __len__(self) -> int:
        return len(self.index_of)

    def table(self) -> pa.Table:
        """``gene_id``, ``gene_name``, ``species``, then the sources' own columns (ours renamed where they clash).

        ``num_cells``, the cells in which a gene is not zero, is 0 until they are counted. Unmapped names are metadata.
        """
        ids = list(self.index_of)[self._first :]
        columns: dict[str, pa.Array] = {
            "gene_id": pa.array(ids, type=pa.string()),
            "gene_name": pa.array(self.names, type=pa.string()),
            "species": pa.array([self.species] * len(ids), type=pa.string()),
            "num_cells": pa.array(np.zeros(len(ids), dtype=np.int64)),
        }
        for name, pieces in self._columns.items():
            parts: list[pa.Array] = []
            end = 0
            for start, array in [*pieces, (len(ids), pa.nulls(0))]:
                parts += [pa.nulls(start - end), array]
                end = start + len(array)
            columns[free_name(name, columns)] = join_arrays(parts)
        return set_unmapped_names(pa.table(columns), self.unmapped)


def set_unmapped_names(genes: pa.Table, names: Iterable[str]) -> pa.Table:
    """A table of genes whose metadata has the sources' names of genes without an Ensembl id."""
    return genes.replace_schema_metadata({UNMAPPED_NAMES: json.dumps(list(names))})


def unmapped_names(genes: pa.Table) -> list[str] | None:
    """What `set_unmapped_names` put into an untrusted table; None where nothing of the kind is there."""
    try:
        names = json.loads((genes.schema.metadata or {})[UNMAPPED_NAMES])
    except (KeyError, ValueError, RecursionError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def join_arrays(arrays: Sequence[pa.Array]) -> pa.Array:
    """One array of them all: numbers as the widest of their kind, and as text where they are of different kinds."""
    kinds = {array.type for array in arrays if not pa.types.is_null(array.type)}
    try:
        kind = common_type(kinds)
        if kind is not None:
            return pa.concat_arrays([array.cast(kind) for array in arrays])
    except pa.ArrowInvalid:  # whole numbers that a float does not hold
        pass
    return pa.concat_arrays([as_text(array) for array in arrays])


def common_type(kinds: set[pa.DataType]) -> pa.DataType | None:
    """The type that holds what all these types do, dictionaries aside; None where only text does."""
    if len(kinds) <= 1:
        return next(iter(kinds), pa.string())
    if all(pa.types.is_integer(kind) for kind in kinds):
        return pa.int64()
    if all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in kinds):
        return pa.float64()
    return None


def free_name(name: str, taken: Container[str]) -> str:
    """A column name that is not taken yet: the name itself or ``<name>_in_source``."""
    while name in taken:
        name = f"{name}_in_source"
    return name
