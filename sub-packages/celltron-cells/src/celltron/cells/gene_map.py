"""Whose gene is a column: the names in a file's var to Ensembl ids, and several files to one list of genes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from celltron.cells.h5ad_frame import H5adFrame, as_text
from celltron.core import GeneNames, InputError

Species = Literal["human", "mouse"]
ENSEMBL_PREFIX: dict[str, str] = {"human": "ENSG", "mouse": "ENSMUSG"}
SPECIES: tuple[Species, ...] = ("human", "mouse")
INDEX = "var_names"
ID_COLUMNS = ("ensembl_id", "gene_id", "gene_ids", "feature_id", "ensembl", "ensembl_gene_id", "gene_ids_ensembl")
NAME_COLUMNS = ("gene_symbol", "gene_symbols", "feature_name", "gene_name", "gene_names", "symbol", "gene_short_name")


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneColumn:
    """The genes of one source: the column they were read from, an Ensembl id (or None) and a printed name for each."""

    column: str
    ids: list[str | None]
    source_names: list[str]
    symbols: list[str]


def find_genes(
    var: H5adFrame, path: Path, names: GeneNames, species: Species, gene_id_column: str | None
) -> GeneColumn:
    """Map the columns of a source to Ensembl ids of one species.

    Without ``gene_id_column`` the row names of var and its usual id and symbol columns are tried; the one that maps to
    the most different genes is taken, the earlier at a tie. Version suffixes are dropped; ids of another species do not
    map, and names that are rather another species' are refused (mouse symbols differ from human ones in case alone).
    """
    if gene_id_column is not None:
        if gene_id_column not in (INDEX, *var.columns):
            there = ", ".join([INDEX, *var.columns])
            raise InputError(
                f"{path} has no gene column {gene_id_column!r} in var: it has {there}; pass gene_id_column with one "
                "of these"
            )
        candidates = [gene_id_column]
    else:
        candidates = [INDEX] + [name for name in (*ID_COLUMNS, *NAME_COLUMNS) if name in var.columns]
    best, best_mapped = "", -1
    best_found: list[str] = []
    best_ids: list[str | None] = []
    for candidate in candidates:
        found = _text_column(var, candidate)
        ids = _resolve(found, names, species)
        mapped = _num_different(ids)
        if mapped > best_mapped:
            best, best_found, best_ids, best_mapped = candidate, found, ids, mapped
        if mapped == len(ids):
            break
    _check_species(var, path, best, best_found, best_mapped, species)
    return GeneColumn(
        column=best,
        ids=best_ids,
        source_names=[name or row for name, row in zip(best_found, _text_column(var, INDEX), strict=True)],
        symbols=_symbols(var, best, best_found, species),
    )


def _text_column(var: H5adFrame, name: str) -> list[str]:
    array = var.index() if name == INDEX else as_text(var.column(name))
    return [word or "" for word in array.to_pylist()]


def _resolve(found: list[str], names: GeneNames, species: Species) -> list[str | None]:
    prefix = ENSEMBL_PREFIX[species]
    ids = names.resolve(found)
    return [gene if gene is not None and gene.startswith(prefix) else None for gene in ids]


def _symbols(var: H5adFrame, id_column: str, found: list[str], species: Species) -> list[str]:
    """Names to print: a symbol column, else the row names, else the ids themselves."""
    for name in NAME_COLUMNS:
        if name in var.columns:
            return [symbol or fallback for symbol, fallback in zip(_text_column(var, name), found, strict=True)]
    row_names = _text_column(var, INDEX)
    return found if id_column == INDEX or row_names[0].startswith(ENSEMBL_PREFIX[species]) else row_names


def _num_different(ids: list[str | None]) -> int:
    return len({gene for gene in ids if gene is not None})


def _check_species(
    var: H5adFrame, path: Path, column: str, found: list[str], num_mapped: int, species: Species
) -> None:
    """Refuse names of which none is a gene of the species, or which are rather another one's."""
    if 2 * sum(name.startswith(ENSEMBL_PREFIX[species]) for name in found) > len(found):
        return
    examples = ", ".join(repr(name) for name in found[:3])
    sentence = (
        f"{num_mapped} of the {len(found)} gene names in {column} of {path} (such as {examples}) are {species} genes"
    )
    for other in SPECIES:
        num_other = _num_different(_resolve(found, GeneNames.for_species(other), other)) if other != species else 0
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
    """The union of the genes of several sources, in the order in which they are first seen."""

    species: Species
    keep_unmapped: bool = False
    index_of: dict[str, int] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    num_summed: int = 0
    unmapped: dict[str, None] = field(default_factory=dict)
    _columns: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, genes: GeneColumn, var: H5adFrame) -> npt.NDArray[np.int64]:
        """Take in one source; returns, for each of its columns, the gene's place in the list or -1."""
        places = np.full(len(genes.ids), -1, dtype=np.int64)
        seen: set[str] = set()
        new_rows: list[int] = []
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
                new_rows.append(i)
            places[i] = self.index_of[gene]
        self._take_columns(var, new_rows)
        return places

    def _take_columns(self, var: H5adFrame, rows: list[int]) -> None:
        """Keep the source's own columns for the genes that it is the first to bring."""
        num_before = len(self.names) - len(rows)
        for name in var.columns:
            values = var.column(name).take(pa.array(rows, type=pa.int64())).to_pylist()
            self._columns.setdefault(name, [None] * num_before).extend(values)
        for column in self._columns.values():
            column.extend([None] * (len(self.names) - len(column)))

    def __len__(self) -> int:
        return len(self.index_of)

    def table(self) -> pa.Table:
        """``gene_id``, ``gene_name``, ``species``, then the sources' own columns (ours renamed where they clash)."""
        ids = list(self.index_of)
        columns: dict[str, pa.Array] = {
            "gene_id": pa.array(ids, type=pa.string()),
            "gene_name": pa.array(self.names, type=pa.string()),
            "species": pa.array([self.species] * len(ids), type=pa.string()),
        }
        for name, values in self._columns.items():
            columns[free_name(name, columns)] = _array(values)
        return pa.table(columns)


def free_name(name: str, taken: Sequence[str] | dict[str, Any]) -> str:
    """A column name that is not taken yet: the name itself or ``<name>_in_source``."""
    while name in taken:
        name = f"{name}_in_source"
    return name


def _array(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # files disagree about the column's type
        return pa.array([None if value is None else str(value) for value in values], type=pa.string())
