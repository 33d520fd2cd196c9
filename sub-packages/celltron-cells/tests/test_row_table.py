"""Cells found in runs of two kinds, read back where their addresses point."""

import ctypes

import numpy as np
import pytest

from celltron.cells.memory import address_of
from celltron.cells.row_table import RowTable, locate_rows
from celltron.core import InputError

KINDS = [("uint16", "uint8", 0), ("uint32", "float32", 3)]
ROWS = [[[(1, 5), (4, 6)], [], [(0, 7)]], [[(2, 0.5)], [(1, 1.5), (3, 2.5)]], [[(9, 255)]]]
"""Of each run, of each of its cells: gene index and count."""
KIND_OF_RUN = [0, 1, 0]


def table_of(ends_dtype: str) -> tuple[RowTable, list[np.ndarray]]:
    """The runs as arrays, which must be kept, and where they are."""
    arrays: list[np.ndarray] = []
    columns: list[list[int]] = [[], [], [], []]
    for rows, kind in zip(ROWS, KIND_OF_RUN, strict=True):
        pairs = [pair for row in rows for pair in row]
        run = [
            np.cumsum([0] + [len(row) for row in rows]).astype(ends_dtype),
            np.array([gene for gene, _ in pairs], dtype=KINDS[kind][0]),
            np.array([count for _, count in pairs], dtype=KINDS[kind][1]),
            np.array([10.0 + sum(count for _, count in row) for row in rows]),
        ]
        arrays += run
        for column, array in zip(columns, run, strict=True):
            column.append(address_of(array))
    sizes = np.array([[np.dtype(name).itemsize for name in KINDS[kind][:2]] for kind in KIND_OF_RUN], dtype=np.uint64)
    starts = np.cumsum([0] + [len(rows) for rows in ROWS])
    nnz = np.array([sum(map(len, rows)) for rows in ROWS])
    addresses = [np.array(column, dtype=np.uint64) for column in columns]
    return RowTable(starts, nnz, *addresses, sizes[:, 0], sizes[:, 1], np.array(KIND_OF_RUN)), arrays


def damage(run: int) -> InputError:
    return InputError(f"run {run}")


@pytest.mark.parametrize("ends_dtype", ["uint32", "uint64"])
@pytest.mark.parametrize("cells", [[5, 0, 3, 4, 0, 1, 2], [0, 2], [4], []])
def test_what_lies_there(ends_dtype: str, cells: list[int]) -> None:
    table, arrays = table_of(ends_dtype)
    asked = np.array(cells, dtype=np.int64)
    run_of = np.searchsorted(table.starts, asked, side="right") - 1
    parts = locate_rows(asked, run_of, table, np.empty(0, ends_dtype), KINDS, memory=(arrays,), damage=damage)
    rows = [row for run in ROWS for row in run]
    slots: list[int] = []
    for part in parts:
        assert (part.index_dtype, part.count_dtype, part.member) in KINDS and part.memory == (arrays,)
        assert np.all(np.diff(part.slots) > 0)
        for k, slot in enumerate(part.slots.tolist()):
            size = int(part.sizes[k])
            genes, counts = (
                np.frombuffer(ctypes.string_at(int(address), size * np.dtype(dtype).itemsize), dtype).tolist()
                for address, dtype in (
                    (part.index_addresses[k], part.index_dtype),
                    (part.count_addresses[k], part.count_dtype),
                )
            )
            row = rows[cells[slot]]
            assert list(zip(genes, counts, strict=True)) == row
            assert part.totals[k] == 10 + sum(count for _, count in row)
            slots.append(slot)
    assert sorted(slots) == list(range(len(cells)))
    assert len(parts) == len({KIND_OF_RUN[run] for run in run_of})


@pytest.mark.parametrize(
    ("ends_dtype", "wrong"), [("uint32", 4), ("uint64", 4), ("uint64", 2**63), ("uint32", 2**32 - 1)]
)
def test_a_cell_that_ends_elsewhere(ends_dtype: str, wrong: int) -> None:
    table, arrays = table_of(ends_dtype)
    arrays[4][1] = wrong  # of the second run, which has three counts
    with pytest.raises(InputError, match="run 1"):
        locate_rows(np.array([0, 3]), np.array([0, 1]), table, np.empty(0, ends_dtype), KINDS, memory=(), damage=damage)
