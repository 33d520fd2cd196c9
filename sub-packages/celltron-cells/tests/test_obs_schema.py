from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from celltron.cells.h5ad_frame import H5adFrame
from celltron.cells.obs_schema import ObsSchema
from celltron.core import InputError

PATH = Path("cells.h5ad")


@pytest.fixture
def obs_of(tmp_path: Path):  # type: ignore[no-untyped-def]
    files = []

    def make(**columns: object) -> H5adFrame:
        files.append(h5py.File(tmp_path / f"{len(files)}.h5", "w"))
        anndata.io.write_elem(files[-1], "obs", pd.DataFrame(columns, index=["c0", "c1"]))
        return H5adFrame(files[-1]["obs"])

    yield make
    for file in files:
        file.close()


def tables(*sources: H5adFrame, wanted: list[str] | None = None) -> tuple[ObsSchema, pa.Table]:
    schema = ObsSchema(wanted=wanted)
    for source in sources:
        schema.add(source, PATH)
    parts = [schema.table(obs, f"file{i}", 0, np.array([1.0, 2.0])) for i, obs in enumerate(sources)]
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
