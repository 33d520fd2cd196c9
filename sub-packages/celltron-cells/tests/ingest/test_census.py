"""The Census is read as it is laid out: a small local one, opened by hand and by the real client, without network."""

import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anndata
import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp

from celltron.cells.ingest import census as census_module
from celltron.cells.ingest.census import open_census
from celltron.cells.ingest.source import SourceOptions
from celltron.core import InputError

tiledbsoma = pytest.importorskip("tiledbsoma")

NUM_CELLS, NUM_GENES = 240, 120
FILTER = "tissue == 'lung' and is_primary_data == True"


@pytest.fixture(scope="session")
def cells(real: anndata.AnnData) -> anndata.AnnData:
    """Measured counts with the columns of the Census."""
    data = real[:NUM_CELLS, :NUM_GENES].copy()
    random = np.random.default_rng(0)
    data.obs["dataset_id"] = random.choice(["d-1", "d-2", "d-3"], NUM_CELLS)
    data.obs["tissue"] = random.choice(["lung", "blood & bone", "T+"], NUM_CELLS)
    data.obs["cell_type"] = random.choice(["B cell", "CD4-positive, alpha-beta T cell"], NUM_CELLS)
    data.obs["is_primary_data"] = random.random(NUM_CELLS) < 0.7
    return data


def _texts(words: Any, *, is_category: bool = True) -> pa.Array:
    array = pa.array([str(word) for word in words], pa.large_string())
    return array.dictionary_encode() if is_category else array


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, cells: anndata.AnnData) -> Path:
    """A Census of one organism, by calls of the SOMA API."""
    path = tmp_path_factory.mktemp("census") / "soma"
    obs = {"soma_joinid": pa.array(np.arange(NUM_CELLS))}
    obs |= {name: _texts(cells.obs[name]) for name in ("dataset_id", "tissue", "cell_type")}
    obs["is_primary_data"] = pa.array(cells.obs["is_primary_data"].to_numpy())
    var = {
        "soma_joinid": pa.array(np.arange(NUM_GENES)),
        "feature_id": _texts(cells.var_names, is_category=False),
        "feature_name": _texts(cells.var["gene_symbol"], is_category=False),
        "feature_length": pa.array(np.arange(NUM_GENES) + 100),
    }
    counts = sp.coo_matrix(cells.X)
    with tiledbsoma.Collection.create(str(path)) as census:
        experiment = census.add_new_collection("census_data").add_new_collection("homo_sapiens", tiledbsoma.Experiment)
        measurement = experiment.add_new_collection("ms").add_new_collection("RNA", tiledbsoma.Measurement)
        tables = {"obs": (experiment, pa.table(obs), NUM_CELLS), "ms/RNA/var": (measurement, pa.table(var), NUM_GENES)}
        for name, (holder, table, size) in tables.items():
            holder.add_new_dataframe(name.split("/")[-1], schema=table.schema, domain=((0, size - 1),))
        layers = measurement.add_new_collection("X")
        for layer in ("normalized", "raw"):
            layers.add_new_sparse_ndarray(layer, type=pa.float32(), shape=(NUM_CELLS, NUM_GENES))
    root = path / "census_data" / "homo_sapiens"
    for name, (_, table, _) in tables.items():  # in a later moment than the schema, which gets the categories
        with tiledbsoma.open(str(root / name), "w") as frame:
            frame.write(table)
    rows, columns = (pa.array(axis, pa.int64()) for axis in (counts.row, counts.col))
    for layer, factor in (("normalized", 0.5), ("raw", 1)):
        values = pa.array(counts.data * factor, pa.float32())
        with tiledbsoma.open(str(root / "ms" / "RNA" / "X" / layer), "w") as array:
            array.write(pa.table({"soma_dim_0": rows, "soma_dim_1": columns, "soma_data": values}))
    return path


@pytest.fixture
def census(folder: Path) -> Iterator[Any]:
    with tiledbsoma.open(str(folder)) as opened:
        yield opened


def open_it(spec: str, census: Any = None, **options: Any) -> Any:
    return closing(open_census(spec, SourceOptions(**options), census=census))


def test_all_cells(census, cells, read_source) -> None:  # type: ignore[no-untyped-def]
    with open_it("census://homo_sapiens?version=2025-01-30", census) as source:
        assert source.shape == (NUM_CELLS, NUM_GENES) and source.matrix_name == "ms/RNA/X/raw"
        assert (read_source(source) != sp.csr_matrix(cells.X)).nnz == 0
        assert source.obs.index().to_pylist() == [str(i) for i in range(NUM_CELLS)]
        assert source.obs.columns == ["dataset_id", "tissue", "cell_type", "is_primary_data"]
        assert source.var.index().to_pylist() == list(cells.var_names)
        assert source.var.column("feature_name").to_pylist() == list(cells.var["gene_symbol"])
        assert source.identity() == {"organism": "homo_sapiens", "obs": "", "version": "2025-01-30"}
    assert not census.closed


@pytest.mark.parametrize("quoted", [True, False])
def test_a_filter_and_columns(census, cells, read_source, quoted: bool) -> None:  # type: ignore[no-untyped-def]
    text = quote(FILTER) if quoted else FILTER
    is_wanted = ((cells.obs["tissue"] == "lung") & cells.obs["is_primary_data"]).to_numpy()
    assert 10 < is_wanted.sum() < NUM_CELLS // 2
    with open_it(f"census://homo_sapiens?obs={text}&columns=cell_type,tissue", census) as source:
        assert source.shape == (is_wanted.sum(), NUM_GENES)
        assert (read_source(source) != sp.csr_matrix(cells.X[is_wanted])).nnz == 0
        assert source.obs.index().to_pylist() == [str(i) for i in np.flatnonzero(is_wanted)]
        assert source.obs.columns == ["dataset_id", "tissue", "cell_type"]
        for name in source.obs.columns:
            assert source.obs.column(name, 2, 9).to_pylist() == list(cells.obs[name][is_wanted][2:9])
        assert source.identity()["obs"] == FILTER and source.identity()["version"] == "stable"


def test_signs_in_a_filter(census: Any, cells: anndata.AnnData) -> None:
    for word, written in (("blood & bone", "blood %26 bone"), ("T+", "T+")):
        with open_it(f"census://homo_sapiens?obs=tissue == '{written}'", census) as source:
            assert source.shape[0] == (cells.obs["tissue"] == word).sum()


def test_another_layer_has_an_advice(census, read_source) -> None:  # type: ignore[no-untyped-def]
    with open_it("census://homo_sapiens", census, layer="normalized") as source:
        with pytest.raises(InputError, match="wanted raw integer counts.* pass --layer raw, which holds integers"):
            read_source(source)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("census://human", "names no organism of the Census: wanted homo_sapiens"),
        ("census://", "names no organism of the Census"),
        (
            "census://homo_sapiens?obs=tissue = 'lung'",
            "the obs filter \"tissue = 'lung'\" of census://.* cannot be used",
        ),
        (
            "census://homo_sapiens?obs=tissu == 'lung'",
            "cannot be used .Column tissu does not exist.* dataset_id, tissue",
        ),
        ("census://homo_sapiens?obs=tissue == 'moon'", "no cell of census://.* fits the obs filter"),
        ("census://homo_sapiens?columns=donor", "has no obs column 'donor': it has dataset_id, tissue"),
        ("census://homo_sapiens?filter=x", "has the part 'filter=x': wanted each of version, obs, columns, uri"),
        ("census://homo_sapiens?version=x&uri=y", "names both a version and a uri"),
    ],
)
def test_what_is_not_there(census: Any, spec: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        open_it(spec, census)


def test_raw_and_unknown_layers(census: Any) -> None:
    with pytest.raises(InputError, match="has no raw, .*leave --use-raw out; counts are in its layer raw"):
        open_it("census://homo_sapiens", census, use_raw=True)
    with pytest.raises(InputError, match="has no layer 'x': it has normalized, raw"):
        open_it("census://homo_sapiens", census, layer="x")


def test_a_collection_that_is_no_census(tmp_path: Path) -> None:
    with tiledbsoma.Collection.create(str(tmp_path / "other")) as other:
        other.metadata["x"] = 1
    with tiledbsoma.open(str(tmp_path / "other")) as other:
        with pytest.raises(InputError, match="leads to no Census .it has no census_data."):
            open_it("census://homo_sapiens", other)


def test_a_copy_through_the_client(folder, cells, read_source) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("cellxgene_census")
    with open_it(f"census://homo_sapiens?uri={folder}") as source:
        assert (read_source(source) != sp.csr_matrix(cells.X)).nnz == 0
        assert source.identity()["files"] > 10
    with pytest.raises(InputError, match="no folder at /nowhere: wanted a copy of the Census"):
        open_it("census://homo_sapiens?uri=/nowhere")


class Client:
    """Stands in for what the client asks the network; the rest is the client's own."""

    releases = {"stable": "2025-01-30", "latest": "2025-11-08", "2025-01-30": "2025-01-30"}

    def __init__(self, folder: Path) -> None:
        self.folder, self.opened = folder, list[dict[str, Any]]()

    def get_census_version_description(self, version: str) -> dict[str, Any]:
        if version not in self.releases:
            raise ValueError(f"Unable to locate Census version: {version}.")
        return {"release_build": self.releases[version]}

    def open_soma(self, **arguments: Any) -> Any:
        self.opened.append(arguments)
        return tiledbsoma.open(str(self.folder))


def test_releases_are_resolved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(folder)
    monkeypatch.setattr(census_module, "_client", lambda spec: client)
    for version, wanted in (
        ("", "2025-01-30"),
        ("?version=latest", "2025-11-08"),
        ("?version=2025-01-30", "2025-01-30"),
    ):
        with open_it(f"census://homo_sapiens{version}", storage={"vfs.s3.region": "us-west-2"}) as source:
            assert source.identity()["version"] == wanted
        assert client.opened[-1]["census_version"] == wanted
        assert client.opened[-1]["tiledb_config"]["vfs.s3.region"] == "us-west-2"
    with pytest.raises(InputError, match="asks for the Census release '2020-01-01', which is none or was retracted"):
        open_it("census://homo_sapiens?version=2020-01-01")


def test_no_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(folder)

    def fail(version: str) -> None:
        raise ConnectionError("no route to host")

    client.get_census_version_description = fail  # type: ignore[method-assign, assignment]
    monkeypatch.setattr(census_module, "_client", lambda spec: client)
    with pytest.raises(InputError, match="census://homo_sapiens cannot be reached .no route to host."):
        open_it("census://homo_sapiens")


def test_the_client_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cellxgene_census", None)
    with pytest.raises(InputError, match=r"needs cellxgene-census: pip install 'celltron-cells\[census\]'"):
        open_it("census://homo_sapiens")
