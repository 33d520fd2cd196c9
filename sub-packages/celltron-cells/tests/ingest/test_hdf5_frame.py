"""Datasets of HDF5 as columns: texts of any kind, numbers, runs of rows."""

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pytest

from celltron.cells.ingest.hdf5_frame import DatasetFrame, is_plain
from celltron.core import InputError


@pytest.fixture
def file(tmp_path: Path) -> Iterator[h5py.File]:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["fixed"] = np.array([b"a", b"bc", b"", b"d"])
        file["text"] = ["α", "b", "", "δ"]
        file["number"] = np.arange(4, dtype=">i4")
        file["flag"] = np.array([True, False, True, True])
        file["pair"] = np.array([(1, 2.0)] * 4, dtype=[("x", "i4"), ("y", "f4")])
        file["short"] = np.arange(3)
        yield file


def test_columns(file: h5py.File) -> None:
    names = ["text", "number", "flag"]
    frame = DatasetFrame("a.h5", 4, file["fixed"], {name: file[name] for name in names})
    assert frame.num_rows == 4 and frame.columns == names and frame.notes == {}
    assert frame.index().to_pylist() == ["a", "bc", "", "d"] and frame.index(1, 3).to_pylist() == ["bc", ""]
    assert frame.column("text", 2).to_pylist() == ["", "δ"]
    assert frame.column("number", 1, 3) == pa.array([1, 2], pa.int32())
    assert frame.column("flag", 0, 2) == pa.array([True, False])


def test_texts_are_decoded_and_rows_numbered(file: h5py.File) -> None:
    columns = {"text": file["text"], "number": file["number"]}
    frame = DatasetFrame("a.h5", 4, None, columns, lambda texts: pa.array([f"<{text}>" for text in texts.to_pylist()]))
    assert frame.column("text", 0, 2).to_pylist() == ["<α>", "<b>"]
    assert frame.column("number").to_pylist() == [0, 1, 2, 3]
    assert frame.index(2).to_pylist() == ["<2>", "<3>"]


def test_what_is_no_column(file: h5py.File) -> None:
    assert not is_plain(file["pair"]) and is_plain(file["text"]) and is_plain(file["fixed"]) and is_plain(file["flag"])
    for name, kind in (("pair", "pair is .*'x'.*"), ("short", r"short is int64 of the shape \(3,\)")):
        with pytest.raises(
            InputError, match=f"a.h5 is truncated or damaged .*{kind}, wanted texts or numbers for 4 rows"
        ):
            DatasetFrame("a.h5", 4, None, {"x": file[name]})
