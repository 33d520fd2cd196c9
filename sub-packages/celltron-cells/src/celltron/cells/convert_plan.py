"""What one look at every source tells before the first row is written: genes, columns of obs, which cells go where.

C cells of all sources, G genes of the store.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from celltron.cells.gene_map import ENSEMBL_PREFIX, GeneColumn, GeneFinder, GeneList, Species
from celltron.cells.ingest.checks import describe_bad_value
from celltron.cells.ingest.source import HEAD_VALUES, Source
from celltron.cells.map_rows import check_values
from celltron.cells.obs_schema import ObsColumns, ObsSchema, look_at_obs
from celltron.cells.source_pool import SourcePool
from celltron.cells.store_manifest import FORMAT, VERSION
from celltron.cells.threads import map_in_order
from celltron.core import InputError, __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """How counts are read."""

    layer: str | None = None
    """Layer that holds the counts; null takes X."""
    use_raw: bool = False
    """Read `raw`, which has its own genes."""
    species: Species = "human"
    """Whose genes the names are."""
    gene_id_column: str | None = None
    """Column of var with Ensembl ids or symbols (`var_names` for the row names); null finds the one that maps most."""
    obs_columns: Sequence[str] | None = None
    """Columns of obs to keep; null keeps all."""
    obsm: Sequence[str] = ()
    """Arrays of obsm to keep, as columns `obsm/<key>` of obs; none otherwise."""
    allow_floats: bool = False
    """Accept values that are not whole numbers; they are stored as float32."""
    keep_unmapped: bool = False
    """Keep genes without an Ensembl id, under the name they have."""
    shard_cells: int = 2**15
    """Cells in one shard."""

    def __post_init__(self) -> None:
        if self.species not in ENSEMBL_PREFIX:
            raise InputError(f"species is {self.species!r}: wanted one of {', '.join(ENSEMBL_PREFIX)}")
        for name in ("obs_columns", "obsm"):
            if isinstance(getattr(self, name), str):
                raise InputError(f"{name} is {getattr(self, name)!r}: wanted a list of names")
        if self.shard_cells < 1:
            raise InputError(f"shard_cells is {self.shard_cells}: wanted 1 or more cells in a shard")


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The store that sources are added to; an empty one for a new store.

    ``obs_types`` are the types of its columns of obs by name, ``fingerprint`` tells it from every other.
    """

    gene_ids: Sequence[str] = ()
    obs_types: Mapping[str, pa.DataType] = field(default_factory=dict)
    source_names: Sequence[str] = ()
    num_shards: int = 0
    fingerprint: str = ""


@dataclass(slots=True)
class Plan:
    """All that decides the store's content.

    ``sources`` are the manifest's entries; ``gene_of_column`` int32, for each source the store's genes of its columns,
    -1 where it has none; ``first_cell`` int64 [S+1], where each source begins among all cells.
    """

    options: ConvertOptions
    base: Base
    genes: GeneList
    obs: ObsSchema
    sources: list[dict[str, Any]] = field(default_factory=list)
    gene_of_column: list[npt.NDArray[np.int32]] = field(default_factory=list)
    first_cell: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    _identities: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_cells(self) -> int:
        """C."""
        return int(self.first_cell[-1])

    @property
    def shards(self) -> range:
        """The numbers of the shards to write."""
        first = self.base.num_shards
        return range(first, first + -(-self.num_cells // self.options.shard_cells))

    def span(self, shard: int) -> tuple[int, int]:
        """The first of the cells of a shard, and the one after its last."""
        start = (shard - self.base.num_shards) * self.options.shard_cells
        return start, min(start + self.options.shard_cells, self.num_cells)

    def parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The cells ``start .. stop`` as runs of one source each: its number, and the run's begin and end in it."""
        while start < stop:
            i = int(np.searchsorted(self.first_cell, start, side="right")) - 1
            first = int(self.first_cell[i])
            end = min(stop, int(self.first_cell[i + 1]))
            yield i, start - first, end - first
            start = end

    def sources_of(self, shards: Sequence[int]) -> list[int]:
        """The numbers of the sources that have cells in these shards."""
        return sorted({i for shard in shards for i, _, _ in self.parts(*self.span(shard))})

    def description(self) -> dict[str, Any]:
        """Equal for two plans, through JSON, if and only if they lead to the same bytes."""
        columns = {name: [source, str(kind)] for name, (source, kind) in self.obs.columns().items()}
        return {
            "format": [FORMAT, VERSION, __version__, pa.__version__],
            "options": json.loads(json.dumps(asdict(self.options))),
            "base": self.base.fingerprint,
            "sources": [
                source | {"identity": json.loads(json.dumps(identity, default=str)), "genes": _digest(places)}
                for source, identity, places in zip(self.sources, self._identities, self.gene_of_column, strict=True)
            ],
            "genes": hashlib.sha256(json.dumps(list(self.genes.index_of)).encode()).hexdigest(),
            "obs": columns,
        }


def _digest(places: npt.NDArray[np.int32]) -> str:
    return hashlib.sha256(places.tobytes()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """What one look at one source tells."""

    name: str
    matrix: str
    cells: int
    genes: GeneColumn
    obs: ObsColumns
    identity: dict[str, Any]


def make_plan(pool: SourcePool, options: ConvertOptions, base: Base, workers: int) -> Plan:
    """Look at every source, some at once; what is wrong with one of them is an InputError."""
    plan = Plan(
        options=options,
        base=base,
        genes=GeneList(
            species=options.species,
            keep_unmapped=options.keep_unmapped,
            index_of={gene: i for i, gene in enumerate(base.gene_ids)},
        ),
        obs=ObsSchema(store=base.obs_types),
    )
    finder = GeneFinder(options.species, options.gene_id_column)
    labels = _labels(pool.specs, base.source_names)
    numbers = range(len(pool.specs))
    look_at = partial(_look_at, pool, options, finder)
    for i, look in enumerate(map_in_order(look_at, numbers, min(workers, len(numbers)))):
        places, new_columns = plan.genes.add(look.genes)
        if new_columns:
            with pool.use(i) as source:
                plan.genes.take_columns(source.var, new_columns)
        plan.gene_of_column.append(places)
        plan.obs.add(look.obs)
        size = {"bytes": look.identity["bytes"]} if isinstance(look.identity.get("bytes"), int) else {}
        entry = {"cells": look.cells, "matrix": look.matrix, "gene_column": look.genes.column}
        plan.sources.append({"name": labels[i]} | size | entry)
        plan._identities.append(look.identity)
    plan.first_cell = np.cumsum([0, *(source["cells"] for source in plan.sources)], dtype=np.int64)
    plan.obs.columns()
    return plan


def _look_at(pool: SourcePool, options: ConvertOptions, finder: GeneFinder, i: int) -> _Look:
    with pool.use(i) as source:
        look = _Look(
            name=source.name,
            matrix=source.matrix_name,
            cells=source.shape[0],
            genes=finder.find(source.var, source.name),
            obs=look_at_obs(source, options.obs_columns, options.obsm),
            identity=source.identity(),
        )
        _check_head(source, options.allow_floats)
    return look


def _check_head(source: Source, allow_floats: bool) -> None:
    head = source.head(HEAD_VALUES)
    bad = check_values(head, source.shape[1], allow_floats=allow_floats)
    if bad is not None:
        raise InputError(describe_bad_value(source, head, bad))


def _labels(specs: Sequence[str], taken: Sequence[str]) -> list[str]:
    """What the column ``source`` calls each source: its last name where that tells it from the others, else all."""
    short = [spec.split("?")[0].rstrip("/").rsplit("/", 1)[-1] for spec in specs]
    counts = Counter([*short, *taken])
    labels: list[str] = []
    for name, spec in zip(short, specs, strict=True):
        label = name if name and counts[name] == 1 else spec
        number = 2
        while label in taken:
            label = f"{spec} ({number})"
            number += 1
        labels.append(label)
    return labels
