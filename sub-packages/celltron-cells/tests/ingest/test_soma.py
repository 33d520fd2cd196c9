"""A SOMA experiment on disk gives the counts of the AnnData that it was made of; broken and other ones a sentence."""

import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from celltron.cells.ingest import soma_arrays
from celltron.cells.ingest.soma import open_soma, split_query, tiledb_config
from celltron.cells.ingest.source import SourceOptions
from celltron.core import InputError

tiledbsoma = pytest.importorskip("tiledbsoma")
tiledbsoma_io = pytest.importorskip("tiledbsoma.io")


@pytest.fixture(scope="session")
def data(real: anndata.AnnData) -> anndata.AnnData:
    """300 measured cells x 200 genes, a normalised layer, raw with 260 genes, an embedding."""
    whole = real[:300, :260].copy()
    found = whole[:, :200].copy()
    found.layers["normalised"] = sp.csr_matrix(np.log1p(found.X.toarray().astype(np.float32)))
    found.raw = whole
    found.obsm["X_pca"] = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    numbers = np.arange(300)
    found.obs["kind"] = pd.Categorical(np.where(numbers % 7 == 0, None, np.where(numbers % 2, "β", "a")))
    found.obs["age"] = numbers.astype(np.int16)
    found.obs["flag"] = numbers % 3 == 0
    return found


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory, data: anndata.AnnData) -> Path:
    """The data as tiledbsoma writes it; for reading only."""
    path = tmp_path_factory.mktemp("soma") / "exp"
    tiledbsoma_io.from_anndata(str(path), data, measurement_name="RNA")
    return path


@pytest.fixture
def own(tmp_path: Path, written: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(written, tmp_path / "exp")
    return tmp_path / "exp"


def open_it(spec: Any, **options: Any) -> Any:
    return closing(open_soma(str(spec), SourceOptions(**options)))


def test_counts_are_anndatas(data, written, read_source, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(soma_arrays, "READ_VALUES", 4000)
    for spec in (written, f"soma://{written}", f"soma://{written}?measurement=RNA&layer=data"):
        with open_it(spec) as source:
            assert source.shape == (300, 200) and source.matrix_name == "ms/RNA/X/data"
            assert (read_source(source) != sp.csr_matrix(data.X)).nnz == 0
            assert source.obs.index().to_pylist() == list(data.obs_names)
            assert source.var.index().to_pylist() == list(data.var_names)
            assert source.name == str(spec)


def test_columns_and_embeddings(data: anndata.AnnData, written: Path) -> None:
    with open_it(written) as source:
        assert sorted(source.obs.columns) == ["age", "batch", "flag", "kind"] and source.obs.notes == {}
        for name in source.obs.columns:
            wanted = [None if pd.isna(value) else value for value in data.obs[name].tolist()]
            assert source.obs.column(name).to_pylist() == wanted
            assert source.obs.column(name, 13, 19).to_pylist() == wanted[13:19]
        assert source.obs.index(13, 19).to_pylist() == list(data.obs_names[13:19])
        assert source.var.column("gene_symbol").to_pylist() == list(data.var["gene_symbol"])
        assert list(source.obsm) == ["X_pca"] and source.obsm["X_pca"].shape == (300, 4)
        assert np.array_equal(source.obsm["X_pca"][13:19], data.obsm["X_pca"][13:19])


def test_layers_and_raw(data, written, read_source) -> None:  # type: ignore[no-untyped-def]
    with open_it(written, use_raw=True) as source:
        assert source.matrix_name == "ms/raw/X/data"
        assert (read_source(source) != sp.csr_matrix(data.raw.X)).nnz == 0
        assert source.var.index().to_pylist() == list(data.raw.var_names)
    with open_it(f"soma://{written}?layer=normalised") as source:
        assert source.advice() == "--layer data"
        with pytest.raises(
            InputError, match="look log-transformed or normalised; pass --layer data, which holds integers"
        ):
            read_source(source)
    with open_it(written, layer="normalised") as source:
        assert source.matrix_name == "ms/RNA/X/normalised"


@pytest.mark.parametrize(
    ("query", "options", "sentence"),
    [
        ("?layer=x", {}, "has no layer 'x': it has data, normalised; name one"),
        ("", {"layer": "x"}, "has no layer 'x'"),
        ("?measurement=ATAC", {}, "has no measurement 'ATAC': it has RNA, raw"),
        ("?layer=data", {"layer": "normalised"}, "both --layer normalised and layer=data were asked"),
        ("?measurement=RNA", {"use_raw": True}, "both --use-raw and measurement=RNA were asked"),
        ("?columns=a", {}, "has the part 'columns=a': wanted each of measurement, layer at most once"),
        ("?layer=a&layer=b", {}, "has the part 'layer=b'"),
        ("?layer", {}, "has the part 'layer'"),
    ],
)
def test_what_is_not_there(written: Path, query: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        open_it(f"soma://{written}{query}", **options)


def test_an_address_is_unquoted(tmp_path: Path, written: Path) -> None:
    shutil.copytree(written, tmp_path / "a ?b%")
    with open_it(f"soma://{tmp_path}/a%20%3Fb%25?layer=data") as source:
        assert source.shape == (300, 200)
    assert split_query("soma://x?layer=a%26b+c", ["layer"]) == ("soma://x", {"layer": "a&b+c"})


def test_cells_that_were_deleted(tmp_path: Path, data, written, read_source) -> None:  # type: ignore[no-untyped-def]
    """Ids with gaps: a registered subset of cells and genes."""
    uri = str(tmp_path / "exp")
    ids = np.sort(np.random.default_rng(0).permutation(1000)[:300])
    genes = np.arange(200) * 2 + 5
    _write_raw(uri, data, ids, genes)
    with open_it(uri) as source:
        assert source.shape == (300, 200) and source.matrix_name == "ms/RNA/X/raw"
        assert (read_source(source) != sp.csr_matrix(data.X)).nnz == 0
        assert source.obs.index().to_pylist() == [str(i) for i in ids]
        assert source.var.index().to_pylist() == list(data.var_names)


def _write_raw(uri: str, data: anndata.AnnData, ids: np.ndarray, genes: np.ndarray) -> None:
    """As the Census is laid out, by calls of the SOMA API itself."""
    import pyarrow as pa

    with tiledbsoma.Experiment.create(uri) as experiment:
        obs = pa.table({"soma_joinid": ids, "age": data.obs["age"].to_numpy()})
        var = pa.table({"soma_joinid": genes, "feature_id": pa.array(list(data.var_names), pa.large_string())})
        tables = {}
        for name, table in (("obs", obs), ("var", var)):
            domain = ((0, 2000),)
            tables[name] = tiledbsoma.DataFrame.create(f"{uri}/{name}", schema=table.schema, domain=domain)
            tables[name].write(table)
        experiment.set("obs", tables["obs"])
        measurement = experiment.add_new_collection("ms").add_new_collection("RNA", tiledbsoma.Measurement)
        measurement.set("var", tables["var"])
        arrays = measurement.add_new_collection("X")
        counts = sp.coo_matrix(data.X)
        for layer in ("raw", "normalized"):
            array = arrays.add_new_sparse_ndarray(layer, type=pa.float32(), shape=(2001, 2001))
            names = ("soma_dim_0", "soma_dim_1", "soma_data")
            columns = (
                ids[counts.row],
                genes[counts.col],
                counts.data.astype(np.float32) * (1 if layer == "raw" else 0.5),
            )
            array.write(pa.table(dict(zip(names, columns, strict=True))))


def test_identity_changes_with_the_experiment(own: Path) -> None:
    with open_it(own) as source:
        first = source.identity()
        assert first["files"] > 10 and first["bytes"] > 1000
    with tiledbsoma.Experiment.open(str(own), "w") as experiment:
        experiment.metadata["note"] = "x"
    with open_it(own) as source:
        assert source.identity() != first


def test_what_is_no_experiment(tmp_path: Path, own: Path) -> None:
    with pytest.raises(InputError, match="no folder at .*/none: wanted a SOMA experiment"):
        open_it(f"soma://{tmp_path}/none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no SOMA experiment: check the name"):
        open_it(tmp_path / "empty")
    for part, kind in (("ms", "SOMACollection"), ("obs", "SOMADataFrame"), ("ms/RNA", "SOMAMeasurement")):
        with pytest.raises(InputError, match=f"is a {kind}: wanted a SOMAExperiment"):
            open_it(own / part)


@pytest.mark.parametrize("pattern", ["**/a0.tdb", "**/d1.tdb", "**/__fragment_metadata.tdb", "__schema/__1*"])
@pytest.mark.parametrize("how", ["cut", "gone", "zeros"])
def test_damaged_files(own: Path, read_source, pattern: str, how: str) -> None:  # type: ignore[no-untyped-def]
    path = next((own / "ms" / "RNA" / "X" / "data").glob(pattern))
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if how == "cut" else bytes(len(content)))
    with pytest.raises(InputError, match="exp ") as raised, open_it(own) as source:
        read_source(source)
    assert "\n" not in str(raised.value) and "Traceback" not in str(raised.value)


def test_settings_of_tiledb() -> None:
    storage = {"anon": True, "key": "k", "endpoint_url": "http://127.0.0.1:5000/", "vfs.s3.region": "us-west-2"}
    found = tiledb_config("soma+s3://b/x", storage)
    assert found["vfs.s3.no_sign_request"] == "true" and found["vfs.s3.aws_access_key_id"] == "k"
    assert found["vfs.s3.endpoint_override"] == "127.0.0.1:5000" and found["vfs.s3.scheme"] == "http"
    with pytest.raises(InputError, match="soma.s3://b/x does not know the storage option 'anno': wanted anon, key"):
        open_it("soma+s3://b/x", storage={"anno": True})
    assert found["vfs.s3.region"] == "us-west-2" and int(found["soma.init_buffer_bytes"]) < 2**30


def test_behind_an_address(written, data, read_source) -> None:  # type: ignore[no-untyped-def]
    """A server of S3's protocol on this machine."""
    moto, s3fs = pytest.importorskip("moto.server"), pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        storage: dict[str, Any] = {"key": "k", "secret": "s", "endpoint_url": f"http://{host}:{port}"}
        fs = s3fs.S3FileSystem(**storage, skip_instance_cache=True)
        fs.mkdir("bucket")
        fs.put(str(written), "bucket/exp", recursive=True)
        storage["vfs.s3.region"] = "us-east-1"
        with open_it("soma+s3://bucket/exp?layer=data", storage=storage) as source:
            assert (read_source(source) != sp.csr_matrix(data.X)).nnz == 0
            assert source.identity()["files"] > 10
        with pytest.raises(InputError, match="soma.s3://bucket/none holds no SOMA experiment"):
            open_it("soma+s3://bucket/none", storage=storage)
    finally:
        server.stop()
