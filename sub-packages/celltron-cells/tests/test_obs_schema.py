from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from celltron.cells.ingest.anndata_frame import AnndataFrame
from celltron.cells.obs_schema import ObsSchema, look_at_obs
from celltron.core import InputError


class Cells:
    """The part of a source that a table of cells is made of."""

    def __init__(self, obs: AnndataFrame, obsm: dict[str, np.ndarray]) -> None:
        self.name = "cells.h5ad"
        self.obs = obs
        self.obsm = obsm


@pytest.fixture
def obs_of(tmp_path: Path):  # type: ignore[no-untyped-def]
    files = []

    def make(obsm: dict[str, np.ndarray] | None = None, **columns: object) -> Cells:
        files.append(h5py.File(tmp_path / f"{len(files)}.h5", "w"))
        anndata.io.write_elem(files[-1], "obs", pd.DataFrame(columns, index=["c0", "c1"]))
        return Cells(AnndataFrame(files[-1]["obs"], "cells.h5ad"), obsm or {})

    yield make
    for file in files:
        file.close()


def tables(
    *sources: Any,
    wanted: list[str] | None = None,
    obsm: Sequence[str] = (),
    store: dict[str, pa.DataType] | None = None,
) -> tuple[ObsSchema, pa.Table]:
    schema = ObsSchema(store=store or {})
    for source in sources:
        schema.add(look_at_obs(source, wanted, obsm))
    parts = [schema.table(source, f"file{i}", 0, np.array([1.0, 2.0])) for i, source in enumerate(sources)]
    return schema, pa.concat_tables(parts).unify_dictionaries()


def test_own_columns_come_first_and_keep_their_names(obs_of) -> None:  # type: ignore[no-untyped-def]
    _, table = tables(obs_of(total_counts=[7.0, 8.0], source=pd.Categorical(["x", "y"])))
    assert table.column_names == ["cell_id", "source", "total_counts", "total_counts_in_source", "source_in_source"]
    assert table["total_counts"].to_pylist() == [1.0, 2.0] and table["source"].to_pylist() == ["file0", "file0"]
    assert table["total_counts_in_source"].to_pylist() == [7.0, 8.0]


def test_categories_of_two_files_are_one_dictionary(obs_of) -> None:  # type: ignore[no-untyped-def]
    schema, table = tables(obs_of(d=pd.Categorical(["a", "b"])), obs_of(d=pd.Categorical(["b", None])))
    assert table.to_pandas()["d"].dtype == "category"
    assert table["d"].to_pylist() == ["a", "b", "b", None] and not schema.notes


@pytest.mark.parametrize(
    ("first", "second", "joined", "noted"),
    [
        ([1, 2], [1.5, 2.5], [1.0, 2.0, 1.5, 2.5], False),
        (np.array([1, 2], np.int8), np.array([3, 4], np.int32), [1, 2, 3, 4], False),
        (pd.Categorical(["a", "b"]), ["c", "d"], ["a", "b", "c", "d"], False),
        ([1, 2], ["c", "d"], ["1", "2", "c", "d"], True),
        ([True, False], [1.5, 2.5], ["true", "false", "1.5", "2.5"], True),
    ],
)
def test_types_that_differ_between_files(obs_of, first, second, joined, noted) -> None:  # type: ignore[no-untyped-def]
    schema, table = tables(obs_of(x=first), obs_of(x=second))
    assert table["x"].to_pylist() == joined
    assert bool(schema.notes) == noted


def test_a_column_that_one_file_lacks_is_missing_there(obs_of) -> None:  # type: ignore[no-untyped-def]
    _, table = tables(obs_of(a=[1, 2]), obs_of(d=pd.Categorical(["x", "y"])))
    assert table["a"].to_pylist() == [1, 2, None, None] and table["d"].to_pylist() == [None, None, "x", "y"]


def test_only_the_wanted_columns(obs_of) -> None:  # type: ignore[no-untyped-def]
    source = obs_of(a=[1, 2], b=[3, 4])
    assert tables(source, wanted=["b"])[1].column_names[3:] == ["b"]
    with pytest.raises(InputError, match="cells.h5ad has no obs column 'donor': it has a, b"):
        tables(source, wanted=["donor"])


def test_arrays_of_obsm_are_lists_of_one_length(obs_of) -> None:  # type: ignore[no-untyped-def]
    first = obs_of({"X_pca": np.arange(6, dtype=">f4").reshape(2, 3), "other": np.zeros((2, 1))}, a=[1, 2])
    second = obs_of({"X_pca": np.ones((2, 3))}, a=[1, 2])
    _, table = tables(first, second, wanted=[], obsm=["X_pca"])
    assert table.column_names == ["cell_id", "source", "total_counts", "obsm/X_pca"]
    assert table["obsm/X_pca"].type == pa.list_(pa.float64(), 3)
    assert table["obsm/X_pca"].to_pylist() == [[0, 1, 2], [3, 4, 5], [1, 1, 1], [1, 1, 1]]
    half = obs_of({"X_pca": np.ones((2, 3), dtype=np.float16)})
    assert tables(half, obsm=["X_pca"])[1]["obsm/X_pca"].type == pa.list_(pa.float32(), 3)
    with pytest.raises(InputError, match="no obsm array 'X_umap': it has X_pca, other"):
        tables(first, obsm=["X_umap"])
    with pytest.raises(InputError, match="rows of 2 double, the sources before it 3 float"):
        tables(first, obs_of({"X_pca": np.ones((2, 2))}), obsm=["X_pca"])
    with pytest.raises(InputError, match=r"has the shape \(2, 0\), wanted rows of numbers"):
        tables(obs_of({"X_pca": np.ones((2, 0))}), obsm=["X_pca"])


@pytest.mark.parametrize(
    ("there", "values", "stored"),
    [
        (pa.int64(), np.array([1, 2], np.int8), [1, 2]),
        (pa.float64(), [1, 2], [1.0, 2.0]),
        (pa.string(), pd.Categorical(["a", "b"]), ["a", "b"]),
        (pa.string(), [1, 2], ["1", "2"]),
        (pa.dictionary(pa.int32(), pa.string()), ["a", "b"], ["a", "b"]),
    ],
)
def test_columns_are_brought_to_the_types_of_a_store(obs_of, there, values, stored) -> None:  # type: ignore[no-untyped-def]
    _, table = tables(obs_of(x=values), store={"x": there})
    assert table["x"].type == there and table["x"].to_pylist() == stored


@pytest.mark.parametrize(
    ("there", "values"),
    [(pa.int32(), [1, 2]), (pa.int64(), [1.5, 2.5]), (pa.float64(), ["a", "b"]), (pa.bool_(), [1, 2])],
)
def test_a_column_that_does_not_fit_a_store_is_refused(obs_of, there, values) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match="obs column 'x' is .* in the store and .* in the new sources"):
        tables(obs_of(x=values), store={"x": there})


def test_a_number_that_its_type_does_not_hold_is_refused(obs_of) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match="the obs column 'x' of cells.h5ad cannot be stored as double"):
        tables(obs_of(x=[2**53 + 1, 2]), obs_of(x=[0.5, 1.5]))
