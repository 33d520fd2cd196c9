"""Several stores as one reader, without copying: other gene lists, other species, other columns of obs.

C cells of all members, G genes of their union, M members.
"""

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import pandas as pd

from celltron.cells.collection_manifest import FORMAT as FORMAT
from celltron.cells.collection_manifest import (
    NamedStore,
    absolute_path,
    is_address,
    is_weight,
    read_collection,
    write_collection,
)
from celltron.cells.gene_map import free_name
from celltron.cells.gene_union import locate_copies, rows_in_union, species_of, unite_gene_tables, unite_genes
from celltron.cells.map_rows import index_dtype
from celltron.cells.obs_union import unite_columns
from celltron.cells.reader import CellReader, Located, Rows, checked_cells
from celltron.cells.shard_table import ShardTable
from celltron.cells.store import CellStore, fingerprint_of_genes
from celltron.cells.threads import Progress, map_in_order
from celltron.core import InputError

STORE = "store"
"""The column of obs that says which member a cell is of, by its name."""
LINES = 20
OPENERS = 8
"""Threads that open members: on a disk of the network each waits for the other side."""


class Member(CellReader, Protocol):
    """What a collection asks of its members beyond reading cells."""

    nnz: int
    manifest: dict[str, Any]

    @property
    def genes(self) -> pd.DataFrame:
        """One row a gene: ``gene_id``, ``gene_name``, ``species``, ``num_cells``."""

    def verify(self, progress: Progress | None = None, *, workers: int | None = None) -> None:
        """Read everything."""


class CellCollection:
    """C cells of M members in the union of their genes, a `CellReader`.

    Cells are numbered one member after the other; genes come in the order in which the members first bring them. Genes
    of several species stand beside each other, told apart by their ids. obs has the columns of all members, missing
    where one lacks them, and ``store``, the member's name; a member's own column ``store`` becomes ``store_in_source``.
    A collection of one member reads as that member does.

    Args:
        members: the readers; each at most once.
        weights: how often cells are drawn from each member, relative to the others and whatever its size; by the
            members' names or paths or in their order. None draws every cell alike.
        path: the file that names the members, if there is one.
    """

    def __init__(
        self,
        members: Sequence[CellReader],
        *,
        weights: Mapping[str, float] | Sequence[float] | None = None,
        path: Path | None = None,
    ) -> None:
        if not members:
            raise InputError("a collection has no stores: give at least one")
        self.members = cast(tuple[Member, ...], tuple(members))
        self.path = path
        paths = [absolute_path(member.name) for member in self.members]
        _check_none_twice(self.members, paths)
        self.names = short_names(paths)
        self.weights = _checked_weights(weights, self.names, paths)
        self.starts: npt.NDArray[np.int64] = np.cumsum([0] + [len(member) for member in self.members])
        self.nnz = sum(member.nnz for member in self.members)
        self.name = self.members[0].name
        if path is not None:
            self.name = str(path)
        elif len(self.members) > 1:
            self.name = f"collection of {len(self.members)} stores ({self.names[0]}, …)"
        self._union = unite_genes(self.members, min(OPENERS, len(self.members)))
        self.gene_ids = self._union.gene_ids
        self.num_genes = len(self.gene_ids)
        self.gene_maps = self._union.gene_maps
        self._table = self._shard_table()

    @classmethod
    def open(
        cls,
        paths: str | Path | Sequence[str | Path],
        weights: Mapping[str, float] | Sequence[float] | None = None,
        *,
        open_member: Callable[[str], CellReader] = CellStore.open,
    ) -> "CellCollection":
        """Open stores as one.

        Args:
            paths: the stores, or the file that `write` made; a store that has changed since then is refused.
            weights: see `CellCollection`; the file's otherwise.
            open_member: opens one path or address.
        """
        stores: list[NamedStore] = []
        path = None
        if isinstance(paths, (str, Path)):
            if not is_address(str(paths)) and not Path(paths).is_dir():
                path = Path(paths)
                stores = read_collection(path)
            paths = [store.path for store in stores] or [paths]
        members = list(map_in_order(open_member, [str(name) for name in paths], min(OPENERS, len(paths) or 1)))
        for store, member in zip(stores, members, strict=False):
            if member.fingerprint != store.fingerprint:
                raise InputError(
                    f"{path} names {store.path}, which holds something else than when the collection was written (its "
                    "fingerprint differs): write the collection again"
                )
        if weights is None and stores and stores[0].weight is not None:
            weights = [cast(float, store.weight) for store in stores]
        return cls(members, weights=weights, path=path)

    def write(self, path: str | Path) -> None:
        """Write paths, fingerprints and weights of the members as JSON, at once or not at all."""
        weights = self.weights or [None] * len(self.members)
        stores = [
            NamedStore(member.name, member.fingerprint, weight)
            for member, weight in zip(self.members, weights, strict=True)
        ]
        write_collection(Path(path), stores)

    def _shard_table(self) -> ShardTable | None:
        """The shards of all members, if all are stores: a batch of cells then costs one call and not one a member."""
        stores = [member for member in self.members if isinstance(member, CellStore)]
        if len(stores) < len(self.members):
            return None
        entries = [entry for store in stores for entry in store.manifest["shards"]]
        owners = [(store, i) for store in stores for i in range(store.num_shards)]
        lists = np.repeat([numbers[0] for numbers in self._union.lists], [store.num_shards for store in stores])
        return ShardTable(entries, lambda i: owners[i][0].shard(owners[i][1]), lists)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __repr__(self) -> str:
        return f"CellCollection({self.name!r}, {len(self):,} cells x {self.num_genes:,} genes)"

    def __getitem__(self, cell: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
        """One cell: gene indices (rising) and their counts."""
        _, gene_index, counts = self.rows([cell])
        return gene_index.astype(np.int64), counts

    @cached_property
    def genes_fingerprint(self) -> str:
        """sha256 (hex) of the gene ids in order."""
        return fingerprint_of_genes(self.gene_ids)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the members' fingerprints in order; of one member its own."""
        fingerprints = [member.fingerprint for member in self.members]
        if len(fingerprints) == 1:
            return fingerprints[0]
        return hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest()

    @cached_property
    def genes(self) -> pd.DataFrame:
        """One row a gene, by gene index: ``gene_id``, ``gene_name``, ``species``, and ``num_cells`` if all know it."""
        if len(self.members) == 1:
            return self.members[0].genes
        return unite_gene_tables(self.members, self._union)

    @cached_property
    def species(self) -> tuple[str, ...]:
        """The species of each member; of one that itself has several, all of them."""
        return tuple(species_of(member) for member in self.members)

    def check_cells(self, cells: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Cell numbers as int64 [C]; one outside is a `CellIndexError`."""
        return checked_cells(cells, len(self), self.name)

    def locate(self, cells: npt.NDArray[np.int64]) -> list[Located]:
        """Where the counts of cells lie; ``member`` is the number of one of ``gene_maps``, which members may share."""
        if self._table is not None:
            return self._table.locate(cells)
        return [
            part._replace(slots=slots[part.slots], member=self._union.lists[i][part.member])
            for i, slots in self._by_member(cells)
            for part in self.members[i].locate(cells[slots] - self.starts[i])
        ]

    def _by_member(self, cells: npt.NDArray[np.int64]) -> list[tuple[int, npt.NDArray[np.int64]]]:
        """Each member that has some of the cells, and their slots."""
        if len(cells) == 0:
            return []
        member_of = np.searchsorted(self.starts, cells, side="right") - 1
        order = np.argsort(member_of, kind="stable")
        bounds = np.flatnonzero(np.diff(member_of[order])) + 1
        return [(int(member_of[slots[0]]), slots) for slots in np.split(order, bounds)]

    def rows(self, cells: npt.ArrayLike) -> Rows:
        """Cells in the given order, repeats allowed, as copies, in the union's gene indices and the widest types."""
        cells = self.check_cells(cells)
        if len(self.members) == 1:
            return self.members[0].rows(cells)
        located = self.locate(cells) if self._table is not None else self._copies(cells)
        rows, bad = rows_in_union(located, self._union.places, len(cells), *self._types)
        if bad >= 0:
            raise InputError(
                f"{self.name} is damaged: cell {cells[bad]} names a gene beyond those it has; run celltron verify"
            )
        return rows

    def _copies(self, cells: npt.NDArray[np.int64]) -> list[Located]:
        """Rows that the members read themselves: one that fetches from afar may not hold all of them at once."""
        return [
            locate_copies(self.members[i].rows(cells[slots] - self.starts[i]), slots, self._union.whole[i])
            for i, slots in self._by_member(cells)
        ]

    @cached_property
    def _types(self) -> tuple[str, str]:
        """The types of gene indices and counts that hold those of all members."""
        types = [member.rows([]).counts.dtype for member in self.members]
        joined = np.result_type(*types)
        if joined.kind == "f" and any(dtype.kind in "iu" and dtype.itemsize == 8 for dtype in types):
            raise InputError(
                f"{self.name} has stores with counts beyond 32 bits beside stores with fractions, which no type holds: "
                "read the stores by themselves"
            )
        return index_dtype(self.num_genes), joined.name

    def totals(self, cells: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """float64 [C]: the sum of all counts of each cell in its source, genes that were left out too."""
        cells = self.check_cells(cells)
        totals = np.empty(len(cells), dtype=np.float64)
        if self._table is not None:
            for part in self._table.locate(cells):
                totals[part.slots] = part.totals
        else:
            for i, slots in self._by_member(cells):
                totals[slots] = self.members[i].totals(cells[slots] - self.starts[i])
        return totals

    @cached_property
    def _own_columns(self) -> dict[str, str]:
        """Each column of obs but ours, and what the members call it."""
        names = dict.fromkeys(name for member in self.members for name in member.obs_columns)
        is_kept = len(self.members) == 1
        return {free_name(name, names) if name == STORE and not is_kept else name: name for name in names}

    @property
    def obs_columns(self) -> list[str]:
        """The names of the columns of obs: the members', in the order in which they first come, and ``store``."""
        return list(dict.fromkeys([*self._own_columns, STORE]))

    def obs_column(self, name: str) -> "pd.Series[Any]":
        """One column of obs over all cells; see `unite_columns` for what becomes of different types."""
        if name not in self.obs_columns:
            raise InputError(
                f"{self.name} has no obs column {name!r}: it has {', '.join(self.obs_columns)}; name one of these"
            )
        sizes = np.diff(self.starts)
        if name not in self._own_columns:
            codes = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
            return pd.Series(pd.Categorical.from_codes(codes, categories=pd.Index(self.names)), name=STORE)
        own = self._own_columns[name]
        parts = [member.obs_column(own) if own in member.obs_columns else None for member in self.members]
        return unite_columns(parts, sizes.tolist(), f"obs column {name!r} of {self.name}").rename(name)

    @property
    def obs(self) -> pd.DataFrame:
        """One row a cell, all columns."""
        return pd.DataFrame({name: self.obs_column(name) for name in self.obs_columns})

    @cached_property
    def disk_runs(self) -> npt.NDArray[np.int64]:
        """int64, rising, from 0 to C: cells between two bounds lie together on disk."""
        runs = [member.disk_runs + start for member, start in zip(self.members, self.starts, strict=False)]
        return np.unique(np.concatenate(runs))

    def verify(self, progress: Progress | None = None, *, workers: int | None = None) -> None:
        """Read everything of every member; progress is in bytes."""
        sizes = [sum(entry["bytes"] for entry in member.manifest["files"].values()) for member in self.members]
        for i, member in enumerate(self.members):
            before = sum(sizes[:i])

            def show(done: int, total: int, before: int = before, size: int = sizes[i]) -> None:
                if progress is not None:
                    progress(before + size * done // max(total, 1), sum(sizes))

            member.verify(show, workers=workers)

    def info(self) -> str:
        """A few lines for a person."""
        found = ", ".join(dict.fromkeys(", ".join(self.species).split(", ")))
        lines = [
            f"{self.name}: {len(self):,} cells x {self.num_genes:,} genes ({found}), {self.nnz:,} non-zero counts, "
            f"{len(self.members)} store{'s' * (len(self.members) > 1)}, fingerprint {self.fingerprint}"
        ]
        for i, member in enumerate(self.members[:LINES]):
            weight = "" if self.weights is None else f", weight {self.weights[i]:g}"
            lines.append(
                f"{self.names[i]}: {len(member):,} cells x {member.num_genes:,} genes ({self.species[i]}){weight}"
            )
        if len(self.members) > LINES:
            lines.append(f"and {len(self.members) - LINES:,} more")
        return "\n".join([*lines, f"obs: {', '.join(self.obs_columns)}"])


def _check_none_twice(members: Sequence[CellReader], paths: Sequence[str]) -> None:
    """Refuse a store that comes twice, of which some cells would be both in training and in validation."""
    place_of: dict[str, str] = {}
    for member, path in zip(members, paths, strict=True):
        if isinstance(member, CellCollection):
            raise InputError(f"{member.name} is a collection itself: name its stores")
        for key in (path, member.fingerprint) if len(member) else (path,):
            if key in place_of:
                other = "" if place_of[key] == path else f" as {place_of[key]}"
                raise InputError(f"{path} comes twice{other} in a collection: give it once, and a larger weight")
        place_of |= {path: path, member.fingerprint: path}


def short_names(paths: Sequence[str]) -> tuple[str, ...]:
    """The last part of each path, and as many before it as make all of them different.

    >>> short_names(["/data/a.store", "/new/b.store", "/data/b.store"])
    ('a.store', 'new/b.store', 'data/b.store')
    """
    parts = [[part for part in path.replace("\\", "/").split("/") if part] or [path] for path in paths]
    depths = [1] * len(paths)
    while True:
        names = ["/".join(part[-depth:]) for part, depth in zip(parts, depths, strict=True)]
        times = Counter(names)
        same = [i for i, name in enumerate(names) if times[name] > 1]
        if not same:
            return tuple(names)
        if all(depths[i] >= len(parts[i]) for i in same):
            return tuple(paths)
        for i in same:
            depths[i] += 1


def _checked_weights(
    weights: Mapping[str, float] | Sequence[float] | None, names: Sequence[str], paths: Sequence[str]
) -> tuple[float, ...] | None:
    """One weight a member, from a sequence in their order or from a mapping by their names or paths."""
    if weights is None:
        return None
    if isinstance(weights, Mapping):
        name_of = dict(zip(paths, names, strict=True)) | {name: name for name in names}
        given = {name_of.get(key) or name_of.get(absolute_path(key)) or key: value for key, value in weights.items()}
        for name in given:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1) or names[:10]
                raise InputError(f"weights names {name!r}, which is no store of the collection: try {', '.join(near)}")
        for name in names:
            if name not in given:
                raise InputError(f"weights has none for store {name}: give one for each, 0 to draw nothing from it")
        weights = [given[name] for name in names]
    if len(weights) != len(names):
        raise InputError(f"there are {len(weights)} weights for {len(names)} stores: give one for each")
    for name, weight in zip(names, weights, strict=True):
        if not is_weight(weight):
            raise InputError(f"the weight of store {name} is {weight!r}: wanted a number, 0 or more")
    if not any(weights):
        raise InputError("the weights of all stores are 0, so that nothing can be drawn: raise one")
    return tuple(map(float, weights))
