"""Counts on disk against the counts that went in, whole conversions, and what a failed one leaves behind."""

import errno
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from celltron.cells import CellStore, convert, h5ad_matrix, store_writer
from celltron.core import InputError


def dense_of(store: CellStore) -> np.ndarray:
    indptr, gene_index, counts = store.rows(np.arange(len(store)))
    matrix = sp.csr_matrix((counts, gene_index.astype(np.int64), indptr), shape=(len(store), store.num_genes))
    dense: np.ndarray = matrix.toarray()
    return dense


def partial_folders(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
@pytest.mark.parametrize("where", ["X", "layer", "raw"])
@pytest.mark.parametrize("block_values", [5_000, 2**21])
def test_every_form_gives_the_same_store(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    tmp_path: Path, write_h5ad, counts, genes, obs, monkeypatch, form: str, where: str, block_values: int
) -> None:
    monkeypatch.setattr(h5ad_matrix, "BLOCK_VALUES", block_values)
    path = tmp_path / "a.h5ad"
    forms = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}
    matrix = forms[form](counts.astype(np.float32))
    data = anndata.AnnData(matrix if where != "layer" else None, obs=obs, var=pd.DataFrame(index=genes))
    if where == "layer":
        data.layers["umi"] = matrix
    if where == "raw":
        data.raw = data
        data.X = np.log1p(counts)
    data.write_h5ad(path)
    options = {"X": {}, "layer": {"layer": "umi"}, "raw": {"use_raw": True}}
    report = convert([path], tmp_path / "a.store", shard_cells=90, **options[where])  # type: ignore[arg-type]
    store = CellStore.open(tmp_path / "a.store")
    store.verify()
    assert np.array_equal(dense_of(store), counts)
    assert store.gene_ids == tuple(genes)
    assert np.array_equal(store.total_counts, counts.sum(1))
    assert store.num_shards == 5 and store.dtypes == {"indptr": "uint64", "indices": "uint16", "counts": "uint32"}
    assert (report.num_cells, report.num_genes, report.nnz) == (400, 600, np.count_nonzero(counts))
    assert sorted(p.name for p in (tmp_path / "a.store").iterdir()) == ["genes.parquet", "manifest.json", "shards"]


def test_obs_is_kept(store: CellStore, obs: pd.DataFrame) -> None:
    kept = store.obs
    assert kept["cell_id"].tolist() == obs.index.tolist() and set(kept["source"]) == {"a.h5ad"}
    assert kept["donor"].dtype == "category"
    assert kept["donor"].astype(object).where(kept["donor"].notna(), None).tolist() == obs["donor"].tolist()[:3] + [
        None,
        *obs["donor"].tolist()[4:],
    ]
    for name in ("age", "score", "is_doublet", "note"):
        assert kept[name].tolist() == obs[name].tolist()
    assert kept["total_counts_in_source"].tolist() == obs["total_counts"].tolist()


def test_only_the_asked_obs_columns(tmp_path: Path, write_h5ad, counts, genes, obs) -> None:  # type: ignore[no-untyped-def]
    path = write_h5ad(tmp_path / "a.h5ad", counts, genes, obs=obs)
    convert([path], tmp_path / "a.store", obs_columns=["donor"])
    columns = CellStore.open(tmp_path / "a.store").obs_columns
    assert columns == ["cell_id", "source", "total_counts", "donor"]
    with pytest.raises(InputError, match="no obs column 'patient': it has donor, age"):
        convert([path], tmp_path / "b.store", obs_columns=["patient"])


def test_unmapped_and_repeated_genes(tmp_path: Path, write_h5ad) -> None:  # type: ignore[no-untyped-def]
    """Two columns of CD3E are summed, a viral gene is left out, but counts in the cell's total."""
    names = ["CD3E", "ENSG00000198851.9", "HIV-gag", "CD8A"]
    matrix = np.array([[1, 2, 10, 0], [0, 5, 0, 3], [0, 0, 7, 0]])
    path = write_h5ad(tmp_path / "a.h5ad", matrix, names)
    report = convert([path], tmp_path / "a.store")
    store = CellStore.open(tmp_path / "a.store")
    assert store.gene_ids == ("ENSG00000198851", "ENSG00000153563")
    assert dense_of(store).tolist() == [[3, 0], [5, 3], [0, 0]]
    assert store.total_counts.tolist() == [13, 8, 7]
    assert (report.num_unmapped, report.num_summed, report.unmapped_names) == (1, 1, ["HIV-gag"])
    assert report.unmapped_fraction == 17 / 28
    assert "1 genes without an Ensembl id left out (60.71% of the counts): HIV-gag" in str(report)
    report = convert([path], tmp_path / "a.store", keep_unmapped=True, replace=True)
    store = CellStore.open(tmp_path / "a.store")
    assert store.gene_ids == ("ENSG00000198851", "HIV-gag", "ENSG00000153563")
    assert dense_of(store).tolist() == [[3, 10, 0], [5, 0, 3], [0, 7, 0]]
    assert report.unmapped_kept and "kept under their own names" in str(report)


def test_several_files_with_different_genes(tmp_path: Path, write_h5ad, counts, genes) -> None:  # type: ignore[no-untyped-def]
    """Same cell ids and same file name in two folders: told apart by the source column."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    first = write_h5ad(tmp_path / "one" / "x.h5ad", counts[:30, :400], genes[:400])
    order = np.random.default_rng(0).permutation(np.arange(300, 600))
    second = write_h5ad(tmp_path / "two" / "x.h5ad", counts[30:50][:, order], [genes[i] for i in order], form="csc")
    report = convert([first, second], tmp_path / "a.store", shard_cells=13)
    store = CellStore.open(tmp_path / "a.store")
    new = [genes[i] for i in order if i >= 400]
    assert list(store.gene_ids) == genes[:400] + new
    expected = np.zeros((50, 600))
    expected[:30, :400] = counts[:30, :400]
    place = {gene: i for i, gene in enumerate(store.gene_ids)}
    for i in order:
        expected[30:, place[genes[i]]] = counts[30:50, i]
    assert np.array_equal(dense_of(store), expected)
    assert store.obs["source"].nunique() == 2 and len(report.sources) == 2
    store.verify()


def test_fractions_when_they_are_meant(tmp_path: Path, write_h5ad, counts, genes) -> None:  # type: ignore[no-untyped-def]
    corrected = (counts * 0.5).astype(np.float32)
    path = write_h5ad(tmp_path / "a.h5ad", corrected, genes)
    with pytest.raises(InputError, match="wanted raw integer counts"):
        convert([path], tmp_path / "a.store")
    convert([path], tmp_path / "a.store", allow_floats=True, shard_cells=100)
    store = CellStore.open(tmp_path / "a.store")
    assert store.dtypes["counts"] == "float32"
    assert np.array_equal(dense_of(store), corrected)
    store.verify()


def test_progress_ends_at_the_number_of_cells(  # type: ignore[no-untyped-def]
    tmp_path: Path, write_h5ad, counts, genes, monkeypatch
) -> None:
    monkeypatch.setattr(h5ad_matrix, "BLOCK_VALUES", 10_000)
    seen: list[tuple[int, int]] = []
    path = write_h5ad(tmp_path / "a.h5ad", counts, genes)
    convert([path], tmp_path / "a.store", progress=lambda done, total: seen.append((done, total)))
    assert len(seen) > 3 and seen == sorted(seen) and seen[-1] == (400, 400)


def test_sources_and_options_are_checked(tmp_path: Path, write_h5ad, counts, genes) -> None:  # type: ignore[no-untyped-def]
    path = write_h5ad(tmp_path / "a.h5ad", counts[:5], genes)
    with pytest.raises(InputError, match="no source files"):
        convert([], tmp_path / "a.store")
    with pytest.raises(InputError, match="given twice"):
        convert([path, tmp_path / "." / "a.h5ad"], tmp_path / "a.store")
    with pytest.raises(InputError, match="shard_cells is 0"):
        convert([path], tmp_path / "a.store", shard_cells=0)
    with pytest.raises(InputError, match="species is 'yeast': wanted one of human, mouse"):
        convert([path], tmp_path / "a.store", species="yeast")  # type: ignore[arg-type]
    assert not (tmp_path / "a.store").exists()


def test_an_output_in_use_is_left_alone(tmp_path: Path, write_h5ad, counts, genes) -> None:  # type: ignore[no-untyped-def]
    first = write_h5ad(tmp_path / "a.h5ad", counts[:5], genes)
    second = write_h5ad(tmp_path / "b.h5ad", counts[:7], genes)
    convert([first], tmp_path / "a.store")
    with pytest.raises(InputError, match="a.store exists already"):
        convert([second], tmp_path / "a.store")
    assert len(CellStore.open(tmp_path / "a.store")) == 5
    with pytest.raises(InputError):
        convert([tmp_path / "none.h5ad"], tmp_path / "a.store", replace=True)
    assert len(CellStore.open(tmp_path / "a.store")) == 5
    convert([second], tmp_path / "a.store", replace=True)
    assert len(CellStore.open(tmp_path / "a.store")) == 7
    assert not partial_folders(tmp_path)


def _full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("point", ["append", "table", "scratch", "fsync"])
def test_a_full_disk_leaves_nothing(  # type: ignore[no-untyped-def]
    tmp_path: Path, write_h5ad, counts, genes, monkeypatch, point: str
) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", counts, genes, form="csc")
    calls = 0

    def after(number: int, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            return _full() if calls > number else real(*args, **kwargs)

        return call

    if point == "append":
        monkeypatch.setattr(store_writer.np, "ascontiguousarray", after(3, np.ascontiguousarray))
    elif point == "table":
        monkeypatch.setattr(store_writer.pq, "write_table", after(1, store_writer.pq.write_table))
    elif point == "scratch":
        monkeypatch.setattr(h5ad_matrix, "_order_by", after(1, h5ad_matrix._order_by))
    else:
        monkeypatch.setattr("os.fsync", after(0, lambda fd: None))
    with pytest.raises(OSError, match="No space left") as caught:
        convert([path], tmp_path / "a.store", shard_cells=100)
    assert caught.value.errno == errno.ENOSPC
    if point in ("append", "table"):
        assert "shards" in str(caught.value.filename)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5ad"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_conversion_leaves_nothing(  # type: ignore[no-untyped-def]
    tmp_path: Path, write_h5ad, counts, genes, error: type[BaseException]
) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", counts, genes)

    def interrupt(done: int, total: int) -> None:
        raise error

    with pytest.raises(error):
        convert([path], tmp_path / "a.store", progress=interrupt)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5ad"]


def test_the_report_is_a_few_lines(tmp_path: Path, write_h5ad, counts, genes) -> None:  # type: ignore[no-untyped-def]
    numbered = pd.DataFrame({"plate": pd.Categorical([1, 2] * 200)}, index=[f"c{i}" for i in range(400)])
    report = convert([write_h5ad(tmp_path / "a.h5ad", counts, genes, obs=numbered)], tmp_path / "a.store")
    lines = str(report).splitlines()
    assert len(lines) == 4 and "400 cells x 600 genes" in lines[0]
    assert lines[2] == "  a.h5ad: 400 cells from X, genes by var_names"
    assert lines[3] == "obs columns stored as text: plate (categories that are not text)"
    assert report.num_bytes == sum(
        file.stat().st_size for file in (tmp_path / "a.store").rglob("*") if file.suffix in (".bin", ".parquet")
    )
