"""Counts on disk against the counts that went in, whole conversions, and what broken-off ones leave behind."""

import errno
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

from celltron.cells import CellStore, convert, convert_work, source_pool, store_writer
from celltron.cells.ingest import anndata_matrix, row_order
from celltron.cells.ingest.source import RowBlock
from celltron.core import InputError
from celltron.core.durable import HashedFile


def dense_of(store: CellStore) -> np.ndarray:
    indptr, gene_index, counts = store.rows(np.arange(len(store)))
    matrix = sp.csr_matrix((counts, gene_index.astype(np.int64), indptr), shape=(len(store), store.num_genes))
    dense: np.ndarray = matrix.toarray()
    return dense


def totals_of(store: CellStore) -> list[float]:
    totals: list[float] = store.totals(np.arange(len(store))).tolist()
    return totals


def partial_folders(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class WatchedSource:
    """A source whose rows are counted when they are read; ``before`` is called with each block."""

    def __init__(self, source: Any, rows: list[int], before: Callable[[RowBlock], None] | None) -> None:
        self._source, self._rows, self._before = source, rows, before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def blocks(self, start: int, stop: int) -> Iterator[RowBlock]:
        for block in self._source.blocks(start, stop):
            if self._before is not None:
                self._before(block)
            self._rows += range(block.start, block.start + len(block.indptr) - 1)
            yield block


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Has every source watched from now on; returns the list of the rows that are read."""
    open_source = source_pool.open_source

    def watch(before: Callable[[RowBlock], None] | None = None) -> list[int]:
        rows: list[int] = []
        monkeypatch.setattr(
            source_pool, "open_source", lambda spec, options: WatchedSource(open_source(spec, options), rows, before)
        )
        return rows

    return watch


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
@pytest.mark.parametrize("where", ["X", "layer", "raw"])
@pytest.mark.parametrize("block_values", [5_000, 2**21])
def test_every_form_gives_the_same_store(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    tmp_path: Path, write_h5ad, counts, genes, obs, monkeypatch, form: str, where: str, block_values: int
) -> None:
    monkeypatch.setattr(anndata_matrix, "BLOCK_VALUES", block_values)
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
    assert np.array_equal(dense_of(store), counts)
    assert store.gene_ids == tuple(genes)
    assert totals_of(store) == counts.sum(1).tolist()
    assert store.num_shards == 5
    assert store.dtypes == {"indptr": "uint64", "indices": "uint16", "counts": "uint32", "totals": "float64"}
    assert store.genes["num_cells"].tolist() == (counts > 0).sum(0).tolist()
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
    assert totals_of(store) == [13, 8, 7]
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


def test_fractions_when_they_are_meant(tmp_path: Path, write_h5ad, counts, genes) -> None:  # type: ignore[no-untyped-def]
    corrected = (counts * 0.5).astype(np.float32)
    path = write_h5ad(tmp_path / "a.h5ad", corrected, genes)
    with pytest.raises(InputError, match="wanted raw integer counts"):
        convert([path], tmp_path / "a.store")
    convert([path], tmp_path / "a.store", allow_floats=True, shard_cells=100)
    store = CellStore.open(tmp_path / "a.store")
    assert store.dtypes["counts"] == "float32"
    assert np.array_equal(dense_of(store), corrected)


def test_progress_ends_at_the_number_of_cells(  # type: ignore[no-untyped-def]
    tmp_path: Path, write_h5ad, counts, genes, monkeypatch
) -> None:
    monkeypatch.setattr(anndata_matrix, "BLOCK_VALUES", 10_000)
    seen: list[tuple[int, int]] = []
    path = write_h5ad(tmp_path / "a.h5ad", counts, genes)
    convert([path], tmp_path / "a.store", progress=lambda done, total: seen.append((done, total)))
    assert len(seen) > 3 and seen == sorted(seen) and seen[-1] == (400, 400)


def test_sources_and_options_are_checked(tmp_path: Path, write_h5ad, counts, genes) -> None:  # type: ignore[no-untyped-def]
    path = write_h5ad(tmp_path / "a.h5ad", counts[:5], genes)
    with pytest.raises(InputError, match="no source was named"):
        convert([], tmp_path / "a.store")
    with pytest.raises(InputError, match="workers is 0"):
        convert([path], tmp_path / "a.store", workers=0)
    with pytest.raises(InputError, match="obsm is 'X_pca': wanted a list of names"):
        convert([path], tmp_path / "a.store", obsm="X_pca")
    with pytest.raises(TypeError, match="laier"):
        convert([path], tmp_path / "a.store", laier="counts")
    with pytest.raises(InputError, match="shard_cells is 0"):
        convert([path], tmp_path / "a.store", shard_cells=0)
    with pytest.raises(InputError, match="species is 'yeast': wanted one of human, mouse"):
        convert([path], tmp_path / "a.store", species="yeast")  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5ad"]
    report = convert([path, tmp_path / "." / "a.h5ad", tmp_path], tmp_path / "a.store")
    assert len(report.sources) == 1 and report.num_cells == 5


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


@pytest.mark.parametrize("point", ["array", "table", "record", "scratch", "fsync"])
def test_a_full_disk_leaves_nothing(  # type: ignore[no-untyped-def]
    tmp_path: Path, write_h5ad, counts, genes, monkeypatch, point: str
) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", counts, genes, form="csc")
    calls = 0

    def after(number: int, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls > number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        return call

    module, name, number = {
        "array": (store_writer.np, "ascontiguousarray", 9),
        "table": (store_writer.pq.ParquetWriter, "write_table", 1),
        "record": (store_writer, "write_atomically", 2),
        "scratch": (row_order, "_write", 3),
        "fsync": (row_order.os, "fsync", 4),
    }[point]
    monkeypatch.setattr(module, name, after(number, getattr(module, name)))
    with pytest.raises(OSError, match="No space left") as caught:
        convert([path], tmp_path / "a.store", shard_cells=100)
    assert calls > number and caught.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(caught.value.filename)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5ad"]


def test_a_full_disk_names_the_file(tmp_path: Path, write_h5ad, counts, genes, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    write = HashedFile.write

    def write_some(self: HashedFile, data: object) -> int:
        if self.path.name == "counts.bin" and self.tell():
            monkeypatch.setattr(self, "_stream", FullDisk())
        return write(self, data)

    class FullDisk:
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            pass

    monkeypatch.setattr(anndata_matrix, "BLOCK_VALUES", 5_000)
    monkeypatch.setattr(HashedFile, "write", write_some)
    with pytest.raises(OSError) as caught:
        convert([write_h5ad(tmp_path / "a.h5ad", counts, genes)], tmp_path / "a.store", workers=2)
    assert Path(str(caught.value.filename)).name == "counts.bin"


def test_a_defect_leaves_nothing(tmp_path: Path, write_h5ad, counts, genes) -> None:  # type: ignore[no-untyped-def]
    def fail(done: int, total: int) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        convert([write_h5ad(tmp_path / "a.h5ad", counts, genes)], tmp_path / "a.store", progress=fail)
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


@pytest.fixture
def mixed(tmp_path: Path, write_h5ad, counts, genes, obs) -> Path:  # type: ignore[no-untyped-def]
    """A folder of three files of different forms, genes and columns; whole and large counts, an empty cell."""
    folder = tmp_path / "in"
    folder.mkdir()
    write_h5ad(folder / "a.h5ad", counts[:130], genes, obs=obs[:130])
    reverse = list(reversed(range(600)))
    write_h5ad(folder / "b.h5ad", counts[130:140][:, reverse], genes[::-1], obs=obs[130:140], form="csc")
    write_h5ad(folder / "c.h5ad", counts[140:], genes, obs=obs[140:].drop(columns="note"), form="dense", dtype=np.int32)
    return folder


def test_the_bytes_do_not_depend_on_the_number_of_workers(  # type: ignore[no-untyped-def]
    tmp_path: Path, mixed: Path, counts, genes, monkeypatch
) -> None:
    """Shards of 60 cells: the third has cells of all three files."""
    monkeypatch.setattr(anndata_matrix, "BLOCK_VALUES", 3_000)
    monkeypatch.setattr(convert_work, "OBS_ROWS", 25)
    for workers in (1, 2, 4):
        report = convert(mixed, tmp_path / f"{workers}.store", shard_cells=60, workers=workers)
    first = files_of(tmp_path / "1.store")
    assert files_of(tmp_path / "2.store") == first and files_of(tmp_path / "4.store") == first
    store = CellStore.open(tmp_path / "4.store")
    assert np.array_equal(dense_of(store), counts)
    assert store.obs["source"].tolist() == ["a.h5ad"] * 130 + ["b.h5ad"] * 10 + ["c.h5ad"] * 260
    assert store.obs["cell_id"].tolist() == [f"cell{i}" for i in range(400)]
    assert store.obs["note"].tolist()[:140] == [f"μ{i}" for i in range(140)] and store.obs["note"][140:].isna().all()
    assert [shard["cells"] for shard in store.manifest["shards"]] == [60] * 6 + [40]
    assert pq.ParquetFile(tmp_path / "1.store/shards/00000/obs.parquet").num_row_groups == 3
    assert report.shards_kept == 0 and not report.is_dropped


def test_each_shard_has_the_smallest_types(tmp_path: Path, write_h5ad, counts, genes) -> None:  # type: ignore[no-untyped-def]
    dense = np.minimum(counts, 200).astype(np.float64)
    dense[50, 3], dense[120, 0], dense[180, 9] = 256, 2**20 + 0.5, 2**33
    path = write_h5ad(tmp_path / "a.h5ad", dense, genes, dtype=np.float64)
    convert([path], tmp_path / "a.store", shard_cells=50, allow_floats=True)
    store = CellStore.open(tmp_path / "a.store")
    kinds = ["uint8", "uint16", "float32", "uint64", "uint8", "uint8", "uint8", "uint8"]
    assert [shard["counts"] for shard in store.manifest["shards"]] == kinds
    assert store.dtypes["counts"] == "float32"
    assert np.array_equal(dense_of(store), dense.astype(np.float32))


def test_arrays_of_obsm_come_along_when_they_are_named(  # type: ignore[no-untyped-def]
    tmp_path: Path, write_h5ad, counts, genes
) -> None:
    pca = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)
    path = write_h5ad(tmp_path / "a.h5ad", counts, genes, obsm={"X_pca": pca, "X_umap": pca[:, :2]})
    convert([path], tmp_path / "a.store", obsm=["X_pca"], shard_cells=170)
    obs = CellStore.open(tmp_path / "a.store").obs
    assert [name for name in obs.columns if name.startswith("obsm/")] == ["obsm/X_pca"]
    assert np.array_equal(np.stack(obs["obsm/X_pca"].to_list()), pca)


def test_a_value_that_is_no_count_is_found_in_whatever_shard(  # type: ignore[no-untyped-def]
    tmp_path: Path, write_h5ad, counts, genes, monkeypatch
) -> None:
    monkeypatch.setattr("celltron.cells.convert_plan.HEAD_VALUES", 100)
    bad = counts.astype(np.float32)
    bad[333, 17] = -1
    before = set(threading.enumerate())
    with pytest.raises(InputError, match=f"-1 for cell 'cell333', gene '{genes[17]}': counts cannot be negative"):
        convert([write_h5ad(tmp_path / "a.h5ad", bad, genes)], tmp_path / "a.store", shard_cells=50, workers=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5ad"]
    assert set(threading.enumerate()) <= before


def stop_after(num_cells: int) -> Callable[[int, int], None]:
    """Ctrl-C when so many cells are done."""

    def progress(done: int, total: int) -> None:
        if done >= num_cells:
            raise KeyboardInterrupt

    return progress


@pytest.fixture
def stopped(tmp_path: Path, mixed: Path) -> Path:
    """What Ctrl-C left after some of seven shards."""
    with pytest.raises(KeyboardInterrupt, match="interrupted; the same command goes on with .*a.store"):
        convert(mixed, tmp_path / "a.store", shard_cells=60, workers=1, progress=stop_after(200))
    return tmp_path / ".a.store.partial"


def test_the_same_command_goes_on(tmp_path: Path, mixed: Path, stopped: Path, watch) -> None:  # type: ignore[no-untyped-def]
    """Complete shards are the same files afterwards, and their rows are not read again."""
    assert not (tmp_path / "a.store").exists()
    complete = sorted(path.stem for path in (stopped / "work").glob("0*.json"))
    assert 1 <= len(complete) <= 6
    inodes = {
        path.relative_to(stopped): path.stat().st_ino for n in complete for path in (stopped / "shards" / n).iterdir()
    }
    rows = watch()
    seen: list[tuple[int, int]] = []
    report = convert(mixed, tmp_path / "a.store", shard_cells=60, workers=2, progress=lambda *news: seen.append(news))
    assert report.shards_kept == len(complete) and report.cells_kept == 60 * len(complete)
    assert f"went on where a broken-off run stopped: {len(complete)} shards" in str(report)
    assert len(rows) == 400 - report.cells_kept
    assert seen == sorted(seen) and seen[0][0] >= 60 and seen[-1] == (400, 400)
    assert {name: (tmp_path / "a.store" / name).stat().st_ino for name in inodes} == inodes
    convert(mixed, tmp_path / "whole.store", shard_cells=60)
    assert files_of(tmp_path / "a.store") == files_of(tmp_path / "whole.store")
    assert not partial_folders(tmp_path)


def test_another_plan_drops_what_was_left(tmp_path: Path, mixed: Path, stopped: Path, watch) -> None:  # type: ignore[no-untyped-def]
    rows = watch()
    report = convert(mixed, tmp_path / "a.store", shard_cells=60, obs_columns=["donor"])
    assert report.is_dropped and report.shards_kept == 0 and len(rows) == 400
    assert "dropped what a broken-off run with other sources or options had left" in str(report)
    convert(mixed, tmp_path / "whole.store", shard_cells=60, obs_columns=["donor"])
    assert files_of(tmp_path / "a.store") == files_of(tmp_path / "whole.store")


def test_a_changed_source_drops_what_was_left(  # type: ignore[no-untyped-def]
    tmp_path: Path, mixed: Path, stopped: Path, write_h5ad, counts, genes, obs
) -> None:
    write_h5ad(mixed / "a.h5ad", counts[:130] + 1, genes, obs=obs[:130])
    report = convert(mixed, tmp_path / "a.store", shard_cells=60)
    assert report.is_dropped and np.array_equal(dense_of(CellStore.open(tmp_path / "a.store"))[:130], counts[:130] + 1)


def test_a_slip_does_not_cost_what_was_left(tmp_path: Path, mixed: Path, stopped: Path) -> None:
    with pytest.raises(InputError, match="no layer 'coutns'"):
        convert(mixed, tmp_path / "a.store", shard_cells=60, layer="coutns")
    with pytest.raises(InputError, match="no file at"):
        convert(mixed / "none", tmp_path / "a.store", shard_cells=60)
    assert convert(mixed, tmp_path / "a.store", shard_cells=60).shards_kept > 0


@pytest.mark.parametrize("damage", ["counts", "obs", "record", "num_cells", "missing", "plan", "stray"])
def test_damaged_leftovers_are_made_anew(tmp_path: Path, mixed: Path, stopped: Path, damage: str) -> None:
    file = {
        "counts": stopped / "shards/00000/counts.bin",
        "obs": stopped / "shards/00000/obs.parquet",
        "record": stopped / "work/00000.json",
        "num_cells": stopped / "work/00000.num_cells",
        "missing": stopped / "shards/00000/totals.bin",
        "plan": stopped / "work/plan.json",
        "stray": stopped / "stray",
    }[damage]
    if damage == "missing":
        file.unlink()
    elif damage == "stray":
        file.write_text("x")
        (stopped / "manifest.json").write_text("{}")
        (stopped / "shards/00006").mkdir(exist_ok=True)
        (stopped / "shards/00006/stray").write_text("x")
    else:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 255
        file.write_bytes(data)
    report = convert(mixed, tmp_path / "a.store", shard_cells=60)
    assert report.is_dropped == (damage == "plan")
    convert(mixed, tmp_path / "whole.store", shard_cells=60)
    assert files_of(tmp_path / "a.store") == files_of(tmp_path / "whole.store")


def test_a_record_of_another_shard_is_not_taken(tmp_path: Path, mixed: Path, stopped: Path) -> None:
    """Nothing but the files of its own folder makes a record true."""
    (stopped / "work/00000.json").write_bytes((stopped / "work/00001.json").read_bytes())
    convert(mixed, tmp_path / "a.store", shard_cells=60)
    convert(mixed, tmp_path / "whole.store", shard_cells=60)
    assert files_of(tmp_path / "a.store") == files_of(tmp_path / "whole.store")


def test_ctrl_c_ends_the_threads_between_blocks(  # type: ignore[no-untyped-def]
    tmp_path: Path, write_h5ad, counts, genes, watch, monkeypatch
) -> None:
    monkeypatch.setattr(anndata_matrix, "BLOCK_VALUES", 1_000)
    watch(lambda block: time.sleep(0.02))
    path = write_h5ad(tmp_path / "a.h5ad", counts, genes)
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        convert([path], tmp_path / "a.store", shard_cells=200, workers=2, progress=stop_after(1))
    assert set(threading.enumerate()) <= before
    assert json.loads((tmp_path / ".a.store.partial/work/plan.json").read_text())["options"]["shard_cells"] == 200
