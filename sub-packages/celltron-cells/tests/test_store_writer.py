from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from celltron.cells.map_rows import MappedRows, index_dtype
from celltron.cells.store_writer import StoreWriter, count_dtype, wider_dtype


@pytest.mark.parametrize(
    ("largest", "dtype"),
    [(0.0, "uint8"), (255.0, "uint8"), (256.0, "uint16"), (65_536.0, "uint32"), (2.0**32, "uint64")],
)
def test_the_smallest_type_that_holds_the_counts(largest: float, dtype: str) -> None:
    assert count_dtype(largest, is_whole=True) == dtype
    assert count_dtype(largest, is_whole=False) == "float32"


def test_types_of_indices_and_of_two_shards() -> None:
    assert index_dtype(65_536) == "uint16" and index_dtype(65_537) == "uint32"
    assert wider_dtype("uint16", "uint8") == "uint16" and wider_dtype("uint32", "float32") == "float32"


def rows_of(dense: np.ndarray) -> MappedRows:
    rows, genes = np.nonzero(dense)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(dense)))])
    return MappedRows(
        indptr=indptr,
        genes=genes,
        values=dense[rows, genes].astype(float),
        totals=dense.sum(1).astype(float),
        unmapped_total=0.0,
        largest=float(dense.max(initial=0)),
        is_whole=True,
    )


@pytest.mark.parametrize("shard_cells", [1, 3, 7, 100])
def test_shards_are_cut_and_widened(tmp_path: Path, shard_cells: int) -> None:
    """Small counts first, large ones later: earlier shards are rewritten in the wider type."""
    dense = np.random.default_rng(0).poisson(1.0, (20, 9))
    dense[15, 3], dense[19, 0] = 300, 70_000
    writer = StoreWriter(tmp_path, num_genes=9, shard_cells=shard_cells)
    for start in range(0, 20, 6):
        part = dense[start : start + 6]
        writer.append(rows_of(part), pa.table({"cell_id": [f"c{i}" for i in range(start, start + len(part))]}))
    meta = writer.finish(meta={})
    assert meta["cells"] == 20 and meta["nnz"] == np.count_nonzero(dense) and meta["dtypes"]["counts"] == "uint32"
    counts = np.concatenate(
        [np.fromfile(tmp_path / f"shards/{i:05d}/counts.bin", "<u4") for i in range(len(meta["shards"]))]
    )
    assert np.array_equal(counts, dense[dense > 0])
    for i, shard in enumerate(meta["shards"]):
        indptr = np.fromfile(tmp_path / f"shards/{i:05d}/indptr.bin", "<u8")
        assert len(indptr) == shard["cells"] + 1 and indptr[0] == 0 and indptr[-1] == shard["nnz"]
    assert not list(tmp_path.rglob("*.wide"))
