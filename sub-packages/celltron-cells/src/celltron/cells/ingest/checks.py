"""What is looked at in every source, whatever its format: cells named twice, and values that are no counts."""

import numpy as np
import numpy.typing as npt
import pandas as pd

from celltron.cells.ingest.source import RowBlock, Source
from celltron.cells.map_rows import BAD_COLUMN, NEGATIVE, NOT_FINITE, NOT_INTEGER, BadValue
from celltron.core import InputError

LARGEST_LOG_VALUE = 20.0  # log1p of a normalised count stays far below; e^20 would be half a billion


def check_cell_ids(source: Source) -> None:
    """Refuse a source that names two cells alike; holds one 64-bit digest a cell, not the names."""
    digests = np.empty(source.obs.num_rows, dtype=np.uint64)
    for start in range(0, len(digests), 100_000):
        stop = min(start + 100_000, len(digests))
        names = source.obs.index(start, stop).to_numpy(zero_copy_only=False)
        digests[start:stop] = pd.util.hash_array(names, categorize=False)
    order = np.argsort(digests, kind="stable")
    for place in np.flatnonzero(digests[order][1:] == digests[order][:-1]):
        first, second = (int(order[place + k]) for k in (0, 1))
        name, other = (source.obs.index(cell, cell + 1)[0].as_py() for cell in (first, second))
        if name == other:
            raise InputError(
                f"{source.name} names cell {name!r} twice (cells {first} and {second}): make obs_names unique "
                "(adata.obs_names_make_unique())"
            )


def describe_bad_value(source: Source, block: RowBlock, bad: BadValue) -> str:
    """One sentence for a value that is no count: which cell and gene, what it looks like and what to do."""
    cell_number = block.start + bad.row
    column = int(block.columns[bad.place])
    if bad.problem == BAD_COLUMN:
        num_genes = source.shape[1]
        return f"{source.name} is damaged: {source.matrix_name} names gene {column} of {num_genes}; copy it again"
    cell = source.obs.index(cell_number, cell_number + 1)[0].as_py()
    gene = source.var.index(column, column + 1)[0].as_py()
    value = block.values[bad.place]
    where = f"{source.matrix_name} of {source.name} holds {value:.6g} for cell {cell!r}, gene {gene!r}"
    others = source.advice()
    instead = f"pass {others}, which holds integers" if others else ""
    if bad.problem == NEGATIVE:
        return f"{where}: counts cannot be negative (scaled values?); {instead or 'convert a file with the raw counts'}"
    if bad.problem == NOT_FINITE:
        return f"{where}: counts must be finite; {instead or 'mend or remove this cell'}"
    if bad.problem == NOT_INTEGER:
        advice = instead or "get the raw counts, or pass --allow-floats if these values are meant"
        return f"{where}: wanted raw integer counts, but these values look {_looks_like(block)}; {advice}"
    return f"{where}: counts above 2^53 are not exact; {instead or 'mend or remove this cell'}"


def _looks_like(block: RowBlock) -> str:
    """Log-normalised values undone by exp(x)-1 sum to one constant in every cell; normalised ones do so as they are."""
    num_rows = min(200, len(block.indptr) - 1)
    values = block.values[: block.indptr[num_rows]].astype(np.float64)
    rows = np.repeat(np.arange(num_rows), np.diff(block.indptr[: num_rows + 1]))
    if len(values) and np.isfinite(values).all() and values.max() < LARGEST_LOG_VALUE:
        if _is_constant(_sums(rows, np.expm1(values), num_rows)):
            return "log-normalised (log1p of counts scaled to one total a cell)"
        return "log-transformed or normalised"
    if _is_constant(_sums(rows, values, num_rows)):
        return "normalised to one total a cell"
    return "normalised or corrected"


def _sums(rows: npt.NDArray[np.int64], values: npt.NDArray[np.float64], num_rows: int) -> npt.NDArray[np.float64]:
    return np.bincount(rows, values, minlength=num_rows).astype(np.float64)


def _is_constant(sums: npt.NDArray[np.float64]) -> bool:
    sums = sums[sums > 0]
    return len(sums) > 1 and bool(np.allclose(sums, np.median(sums), rtol=0.02))
