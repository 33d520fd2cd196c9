"""One shard against numpy: its arrays, its types, its checksums, its table of cells."""

import errno
import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from celltron.cells import store_writer
from celltron.cells.ingest.source import RowBlock
from celltron.cells.map_rows import MappedRows, make_room, map_rows
from celltron.cells.store_writer import ShardWriter, read_record, write_record, write_tables


def block_of(dense: np.ndarray) -> RowBlock:
    rows, columns = np.nonzero(dense)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(dense)))])
    return RowBlock(start=0, indptr=indptr, columns=columns.astype(np.int32), values=dense[rows, columns])


def rows_of(dense: np.ndarray) -> MappedRows:
    genes = np.arange(dense.shape[1], dtype=np.int32)
    rows = map_rows(block_of(dense), genes, make_room(dense.shape[1]), allow_floats=True)
    assert isinstance(rows, MappedRows)
    return rows


def words(*names: str | None) -> pa.DictionaryArray:
    return pa.array(names).dictionary_encode()


@pytest.mark.parametrize("block_rows", [1, 6, 20])
@pytest.mark.parametrize(
    ("large", "dtypes"),
    [
        ({}, ("<u2", "<u1")),
        ({(15, 3): 300, (19, 0): 70_000}, ("<u2", "<u4")),
        ({(7, 2): 0.25, (9, 2): 300}, ("<u2", "<f4")),
    ],
)
def test_a_shard_takes_the_smallest_types(  # type: ignore[no-untyped-def]
    tmp_path: Path, block_rows: int, large, dtypes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small counts first, large ones later: what is there is rewritten, the same whatever the blocks."""
    monkeypatch.setattr(store_writer, "COPY_VALUES", 5)
    dense = np.random.default_rng(0).poisson(1.0, (20, 9)).astype(float)
    for place, value in large.items():
        dense[place] = value
    writer = ShardWriter(tmp_path / "00000", num_genes=9)
    for start in range(0, 20, block_rows):
        writer.add(rows_of(dense[start : start + block_rows]))
    writer.end_rows()
    assert np.array_equal(writer.totals(3, 11), dense[3:11].sum(1))
    writer.write_obs([pa.table({"cell_id": [f"c{i}" for i in range(20)]})])
    record = writer.finish(tmp_path / "num_cells")
    folder = tmp_path / "00000"
    assert np.array_equal(np.fromfile(folder / "counts.bin", dtypes[1]), dense[dense > 0])
    assert np.array_equal(np.fromfile(folder / "indices.bin", dtypes[0]), np.nonzero(dense)[1])
    assert np.array_equal(np.diff(np.fromfile(folder / "indptr.bin", "<u8")), (dense > 0).sum(1))
    assert np.array_equal(np.fromfile(folder / "totals.bin", "<f8"), dense.sum(1))
    assert np.array_equal(np.fromfile(tmp_path / "num_cells", "<i8"), (dense > 0).sum(0))
    assert record.manifest_entry() == {
        "cells": 20,
        "nnz": np.count_nonzero(dense),
        "indices": np.dtype(dtypes[0]).name,
        "counts": np.dtype(dtypes[1]).name,
    }
    assert record.total_counts == dense.sum() and record.unmapped_counts == 0
    assert sorted(record.files) == sorted(path.name for path in folder.iterdir())
    for name, entry in record.files.items():
        data = (folder / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_a_record_holds_only_while_every_file_is_what_it_was(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "0", num_genes=2)
    writer.add(rows_of(np.array([[1.0, 2.0], [0.0, 3.0]])))
    writer.end_rows()
    writer.write_obs([pa.table({"cell_id": ["a", "b"]})])
    record = writer.finish(tmp_path / "n")
    path = tmp_path / "0.json"
    arguments = (path, tmp_path / "n", tmp_path / "0")
    assert read_record(*arguments) is None
    write_record(record, path)
    assert read_record(*arguments) == record
    for file in [path, tmp_path / "n", *(tmp_path / "0").iterdir()]:
        data = file.read_bytes()
        for damage in (data[:-1], bytes([data[0] ^ 1]) + data[1:], b""):
            file.write_bytes(damage)
            assert read_record(*arguments) is None, file
        file.unlink()
        assert read_record(*arguments) is None, file
        file.write_bytes(data)
    assert read_record(*arguments) == record
    for text in ("[]", '{"cells": 1}', "null"):
        path.write_text(text)
        assert read_record(*arguments) is None


def test_parts_of_a_table_are_row_groups(tmp_path: Path) -> None:
    """Categories of a part that has more words than rows are cut to those in use; the order of the words stays."""
    many = words("z", *(f"w{i}" for i in range(100)), None, "b").slice(100)
    assert len(many.dictionary) == 102
    few = words("b", "z", "b")
    file = tmp_path / "t.parquet"
    entry = write_tables([pa.table({"d": many}), pa.table({"d": few})], file)
    assert entry["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    table = pq.read_table(file)
    assert pq.ParquetFile(file).num_row_groups == 2
    assert pa.types.is_dictionary(table["d"].type) and table["d"].to_pylist() == ["w99", None, "b", "b", "z", "b"]
    assert table["d"].chunk(0).dictionary.to_pylist() == ["w99", "b"]
    with pytest.raises(AssertionError, match="no table"):
        write_tables([], file)


def test_a_full_disk_while_a_table_is_written(  # type: ignore[no-untyped-def]
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    """The error has the file's name, and arrow writes nothing more, not even when its writer is collected."""

    class FullDisk(store_writer.HashedFile):
        def write(self, data: object) -> int:
            if self.tell() > 100:
                raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
            return super().write(data)

    monkeypatch.setattr(store_writer, "HashedFile", FullDisk)
    numbers = pa.table({"x": np.random.default_rng(0).random(50_000)})
    with pytest.raises(OSError) as caught:
        write_tables([numbers, numbers], tmp_path / "t.parquet")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "t.parquet")
    del caught
    assert capfd.readouterr().err == ""
