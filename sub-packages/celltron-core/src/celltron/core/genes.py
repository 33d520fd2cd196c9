"""Gene symbols to Ensembl ids, for human and mouse, by tables shipped with the package."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from celltron.core.errors import InputError
from celltron.core.table_files import read_columns, read_shipped_table

# Group 1 is the bare id: "ENSG00000000003.14" and the copy on Y, "ENSG00000182378.15_PAR_Y", name the same gene.
_ENSEMBL_GENE = re.compile(r"(ENS[A-Z]{0,5}G(?:\d{11}|R\d{10}))(?:\.\d+)?(?:_PAR_Y)?")


class GeneNames:
    """Resolves the gene names of one species.

    >>> GeneNames.for_species("human").resolve(["TSPAN6", "ENSG00000000003.16", "no such gene"])
    ['ENSG00000000003', 'ENSG00000000003', None]
    """

    __slots__ = ("_aliases", "_symbols", "species")

    def __init__(self, species: str, symbols: Mapping[str, str], aliases: Mapping[str, str]) -> None:
        """Take tables of symbol -> Ensembl id, and of alias in upper case -> Ensembl id."""
        self.species = species
        self._symbols = symbols
        self._aliases = aliases

    @classmethod
    def for_species(cls, species: Literal["human", "mouse"]) -> "GeneNames":
        """Load the shipped tables of a species: GENCODE 48 (human, with aliases) or GENCODE M37 (mouse)."""
        return _load(species)

    def resolve(self, names: Sequence[str]) -> list[str | None]:
        """Turn names into Ensembl gene ids.

        An Ensembl id, of whatever species, stays and loses its version suffix. Any other name is looked up as a symbol,
        letter case included, then in upper case as an alias. None where a name is unknown.
        """
        return [self._resolve_one(str(name).strip()) for name in names]

    def _resolve_one(self, name: str) -> str | None:
        match = _ENSEMBL_GENE.fullmatch(name)
        if match:
            return match.group(1)
        return self._symbols.get(name) or self._aliases.get(name.upper())

    def __repr__(self) -> str:
        return f"GeneNames({self.species}, {len(self._symbols)} symbols, {len(self._aliases)} aliases)"


@functools.cache
def _load(species: str) -> GeneNames:
    if species not in ("human", "mouse"):
        raise InputError(f"there is no table of gene names for the species {species!r}; choose human or mouse")
    aliases: dict[str, str] = {}
    if species == "human":
        names, ids = _read_pairs("gene_alias_to_ensembl_gc95M.tsv.gz", "name_or_id")
        aliases = dict(zip(names, ids, strict=True))
    symbols, ids = _read_pairs(f"symbols_{species}.tsv.gz", "symbol")
    return GeneNames(species, _choose(symbols, ids, aliases), aliases)


def _read_pairs(name: str, key: str) -> tuple[list[str], list[str]]:
    keys, ids = read_columns(read_shipped_table(name), (key, "ensembl_id"), name)
    return keys, ids


def _choose(symbols: Sequence[str], ids: Sequence[str], aliases: Mapping[str, str]) -> dict[str, str]:
    """Settle symbols that name several genes: the one that the alias table names, else the one registered first."""
    candidates: dict[str, list[str]] = {}
    for symbol, gene_id in zip(symbols, ids, strict=True):
        candidates.setdefault(symbol, []).append(gene_id)
    chosen = {}
    for symbol, several in candidates.items():
        named = aliases.get(symbol.upper())
        # Ensembl numbers genes in the order of their registration; the later ones are read-through or extra copies.
        chosen[symbol] = named if named in several else min(several)
    return chosen
