from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa

from celltron.cells.ingest.anndata_frame import AnndataFrame, as_text

ROWS = 7


def frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "category": pd.Categorical(["a", None, "ü", "a", "b", "a", "ü"]),
            "ordered": pd.Categorical(list("xyzxyzx"), ordered=True),
            "numbered": pd.Categorical([1, 2, 3, 1, 2, 3, 1]),
            "word": ["Δ", "b", "c", "d", "e", "f", "日本"],
            "whole": np.arange(ROWS, dtype=np.int16),
            "half": np.arange(ROWS, dtype=np.float16) / 2,
            "true": np.array([True, False] * 3 + [True]),
            "nullable": pd.array([1, None, 3, 4, 5, 6, 7], dtype="Int64"),
            "maybe": pd.array([True, None, False, True, True, False, True], dtype="boolean"),
        },
        index=[f"cell {i}" for i in range(ROWS)],
    )


def expected(column: "pd.Series", start: int, stop: int) -> list:
    values = column.iloc[start:stop]
    if isinstance(values.dtype, pd.CategoricalDtype):
        return [None if value is np.nan or value is None else str(value) for value in values]
    return [None if value is pd.NA else value for value in values.tolist()]


def test_columns_in_runs_of_rows(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        anndata.io.write_elem(file, "obs", frame())
        read = AnndataFrame(file["obs"], "x")
        assert read.num_rows == ROWS and read.columns == list(frame().columns)
        assert read.index(2, 4).to_pylist() == ["cell 2", "cell 3"]
        for name in read.columns:
            for start, stop in ((0, ROWS), (2, 5), (6, 7)):
                assert read.column(name, start, stop).to_pylist() == expected(frame()[name], start, stop), name
        assert read.notes == {"numbered": "categories that are not text"}
        assert pa.types.is_dictionary(read.column("category").type)


def test_an_index_of_numbers_becomes_text(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        group = file.create_group("obs")
        group.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "id"})
        group.attrs["column-order"] = np.array([], dtype="S1")
        group["id"] = np.array([10, 20])
        assert AnndataFrame(group, "x").index().to_pylist() == ["10", "20"]


def test_fixed_length_bytes_and_broken_unicode_do_not_crash(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        group = file.create_group("obs")
        group.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "id"})
        group.attrs["column-order"] = ["bytes"]
        group["id"] = np.array([b"a", b"b"])
        group["bytes"] = np.array([b"\xff\xfe", b"good"])
        assert AnndataFrame(group, "x").column("bytes").to_pylist() == ["\ufffd\ufffd", "good"]


def test_the_frame_of_anndata_0_7_is_read(tmp_path: Path) -> None:
    """Encoding version 0.1.0: categories in a group of their own, named by a reference."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        group = file.create_group("obs")
        group.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.1.0", "_index": "id"})
        group.attrs["column-order"] = ["kind"]
        group["id"] = np.array(["a", "b", "c"], dtype=object)
        group["kind"] = np.array([0, -1, 1], dtype=np.int8)
        group["__categories/kind"] = np.array(["T", "B"], dtype=object)
        group["kind"].attrs["categories"] = group["__categories/kind"].ref
        read = AnndataFrame(group, "x")
        assert read.index().to_pylist() == ["a", "b", "c"]
        assert read.column("kind").to_pylist() == ["T", None, "B"]


def test_the_table_of_anndata_0_6_is_read(tmp_path: Path) -> None:
    """One compound dataset for each of obs and var."""
    kinds = np.dtype([("index", "S4"), ("n", "<i4")])
    with h5py.File(tmp_path / "x.h5ad", "w") as file:
        file["X"] = np.eye(2, dtype=np.float32)
        file["obs"] = np.array([(b"c0", 5), (b"c1", 6)], dtype=kinds)
        file["var"] = np.array([(b"g0", 5), (b"g1", 6)], dtype=kinds)
    with h5py.File(tmp_path / "x.h5ad", "r") as file:
        read = AnndataFrame(file["obs"], "x")
        assert read.index().to_pylist() == ["c0", "c1"]
        assert read.column("n", 1, 2).to_pylist() == [6]


def test_mixed_values_become_text() -> None:
    from celltron.cells.ingest.anndata_frame import _series_reader

    read, note = _series_reader(pd.Series([1, "two", None, 3.5], dtype=object))
    assert note == "values of several kinds"
    assert read(0, 4).to_pylist() == ["1", "two", None, "3.5"]


def test_text_of_numbers() -> None:
    assert as_text(pa.array([1, None, 3])).to_pylist() == ["1", None, "3"]
