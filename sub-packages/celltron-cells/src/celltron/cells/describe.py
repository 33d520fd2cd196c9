"""What a store holds, in a few lines for a person; no counts are read, only how many of them each cell has.

C cells, G genes. Names out of files are shown with their control characters as escapes.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from celltron.cells.shard import map_file, shard_folder
from celltron.cells.store import CellStore
from celltron.core import InputError

LONG_CELL = 2048
"""Tokens that models usually take of a cell."""
MOST_VALUES = 1000
"""Different values of an obs column that are counted; where there are more, only that is said."""
SHOWN_VALUES = 5
SHOWN_SOURCES = 20
SHOWN_LETTERS = 60


def describe_store(store: CellStore) -> str:
    """Cells, genes, non-zero counts, bytes, shards, genes a cell, sources, and the columns of obs with their values."""
    manifest = store.manifest
    num_bytes = sum(int(entry["bytes"]) for entry in manifest["files"].values())
    lines = [
        f"{_shown(str(store.path), 1000)}: {manifest['format']} version {manifest['version']}",
        f"{len(store):,} cells x {store.num_genes:,} genes ({_shown(store.species)}), {store.nnz:,} non-zero counts, "
        f"{num_bytes / 1e6:,.1f} MB ({num_bytes / max(1, store.nnz):.2f} bytes a non-zero count)",
        _describe_shards(manifest["shards"]),
        _describe_lengths(count_lengths(store)),
        *_describe_sources(manifest["sources"]),
        f"genes without an Ensembl id: {manifest['unmapped_genes']:,} "
        f"({manifest['unmapped_fraction']:.2%} of the counts)",
        f"obs: {_plural(len(store.obs_columns), 'column')}",
        *(f"  {_shown(name)}: {column}" for name, column in _scan_obs(store).items()),
    ]
    return "\n".join(lines)


def count_lengths(store: CellStore) -> npt.NDArray[np.int64]:
    """How many cells have 0, 1, …, G genes that are not zero: int64 [G+1]."""
    num_cells = np.zeros(store.num_genes + 1, dtype=np.int64)
    for i, entry in enumerate(store.manifest["shards"]):
        path = shard_folder(store.path, i) / "indptr.bin"
        lengths = np.diff(map_file(path, "uint64", entry["cells"] + 1).astype(np.int64))
        if len(lengths) and (lengths.min() < 0 or lengths.max() > store.num_genes):
            raise InputError(f"{path} is damaged: its rows do not follow each other; run celltron verify")
        num_cells += np.bincount(lengths, minlength=len(num_cells))
    return num_cells


def _shown(text: str, letters: int = SHOWN_LETTERS) -> str:
    """Untrusted text on one line, cut: a terminal must not obey what a file says."""
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return text if len(text) <= letters else f"{text[: letters - 1]}…"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value + 0.0:,.6g}"  # parquet's least zero is -0


def _plural(num: int, what: str) -> str:
    return f"{num:,} {what}{'s' * (num != 1)}"


def _describe_shards(shards: list[dict[str, Any]]) -> str:
    text = f"{_plural(len(shards), 'shard')}"
    for key, what in (("indices", "gene indices"), ("counts", "counts")):
        kinds = Counter(shard[key] for shard in shards)
        in_each = [kind if len(kinds) == 1 else f"{kind} in {num:,}" for kind, num in sorted(kinds.items())]
        text += f"; {what} {', '.join(in_each) or 'none'}"
    return text


def _describe_lengths(num_cells: npt.NDArray[np.int64]) -> str:
    total = int(num_cells.sum())
    if total == 0:
        return "genes a cell: there are no cells"
    ends = np.cumsum(num_cells)

    def quantile(q: float) -> int:
        """The smallest length that at least this part of the cells does not exceed."""
        return int(np.searchsorted(ends, max(1, np.ceil(q * total))))

    mean = (np.arange(len(num_cells)) * num_cells).sum() / total
    long_cells = num_cells[LONG_CELL + 1 :].sum() / total
    return (
        f"genes a cell: least {quantile(0):,}, 5% {quantile(0.05):,}, median {quantile(0.5):,}, mean {mean:,.1f}, "
        f"95% {quantile(0.95):,}, most {quantile(1):,}; {long_cells:.1%} of the cells have more than {LONG_CELL:,}"
    )


def _describe_sources(sources: list[dict[str, Any]]) -> Iterator[str]:
    for source in sources[:SHOWN_SOURCES]:
        name, matrix, genes = (_shown(source[key]) for key in ("name", "matrix", "gene_column"))
        yield f"source: {name}, {source['cells']:,} cells from {matrix}, genes by {genes}"
    if len(sources) > SHOWN_SOURCES:
        rest = sources[SHOWN_SOURCES:]
        yield f"source: {len(rest):,} more, {sum(source['cells'] for source in rest):,} cells"


@dataclass(slots=True)
class _Column:
    """What is said of one column of obs."""

    kinds: dict[str, None] = field(default_factory=dict)
    values: dict[str, None] | None = None
    """The different values, in the order of their coming; None where they are not counted."""
    has_more: bool = False
    bounds: list[float] = field(default_factory=list)
    missing: int = 0

    def __str__(self) -> str:
        text = " or ".join(self.kinds)
        if self.has_more:
            text += f", more than {MOST_VALUES:,} values"
        elif self.values is not None:
            shown = [_shown(value) for value in list(self.values)[:SHOWN_VALUES]]
            shown += ["…"] * (len(self.values) > SHOWN_VALUES)
            text += f", {_plural(len(self.values), 'value')}" + f": {', '.join(shown)}" * bool(shown)
        elif self.bounds:
            text += f", {_number(min(self.bounds))} to {_number(max(self.bounds))}"
        return text + f", {self.missing:,} missing" * bool(self.missing)


def _scan_obs(store: CellStore) -> dict[str, _Column]:
    """Look through obs shard by shard; numbers by the statistics that parquet keeps, texts until there are too many."""
    columns: dict[str, _Column] = {name: _Column() for name in store.obs_columns}
    for i in range(store.num_shards):
        path = shard_folder(store.path, i) / "obs.parquet"
        try:
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                _add_statistics(columns, file.metadata)
                texts = [name for name in schema.names if _add_kind(columns[name], schema.field(name).type)]
                table = file.read([name for name in texts if not columns[name].has_more])
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} is damaged (parquet says: {error}): run celltron verify") from error
        for name in table.column_names:
            _add_values(columns[name], table[name])
    return columns


def _add_kind(column: _Column, kind: pa.DataType) -> bool:
    """Take in the type of a column; True where its different values are of interest."""
    if pa.types.is_fixed_size_list(kind):
        column.kinds[f"{kind.list_size} {kind.value_type} a cell"] = None
        return False
    is_category = pa.types.is_dictionary(kind)
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    name = {"float": "float32", "double": "float64"}.get(str(kind), str(kind))
    column.kinds["category" if is_category else "text" if is_text else name] = None
    return bool(is_category or is_text or pa.types.is_boolean(kind))


def _add_statistics(columns: dict[str, _Column], metadata: Any) -> None:
    for group in range(metadata.num_row_groups):
        for place in range(metadata.num_columns):
            part = metadata.row_group(group).column(place)
            column, statistics = columns.get(part.path_in_schema), part.statistics
            if column is None or statistics is None:
                continue
            column.missing += statistics.null_count or 0
            if statistics.has_min_max and isinstance(statistics.min, (int, float)):
                column.bounds += [statistics.min, statistics.max]


def _add_values(column: _Column, array: pa.ChunkedArray) -> None:
    different = array.unique()
    values = column.values or {}
    if len(different) <= MOST_VALUES + 1:
        values |= {str(value): None for value in different.to_pylist() if value is not None}
    column.has_more = len(different) > MOST_VALUES + 1 or len(values) > MOST_VALUES
    column.values = values
