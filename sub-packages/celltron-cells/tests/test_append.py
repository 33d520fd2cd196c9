"""Shards added to a store: what it is afterwards, what it is when something goes wrong, what is refused."""

import errno
import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

from celltron.cells import CellStore, convert
from celltron.cells.append import append
from celltron.cells.gene_map import unmapped_names
from celltron.core import InputError, verify_artefact
from celltron.core.durable import lock_folder

from .small_store import seal

MODULE = importlib.import_module("celltron.cells.append")  # the package's name for it is the function


def dense_of(store: CellStore) -> np.ndarray:
    indptr, gene_index, counts = store.rows(np.arange(len(store)))
    shape = (len(store), store.num_genes)
    dense: np.ndarray = sp.csr_matrix((counts, gene_index.astype(np.int64), indptr), shape=shape).toarray()
    return dense


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def store(tmp_path: Path, write_h5ad, counts, genes, obs) -> Path:  # type: ignore[no-untyped-def]
    """50 cells of the first 400 genes in shards of 20."""
    path = write_h5ad(tmp_path / "old.h5ad", counts[50:100, :400], genes[:400], obs=obs[50:100])
    convert([path], tmp_path / "a.store", shard_cells=20)
    return tmp_path / "a.store"


@pytest.fixture
def new(tmp_path: Path, write_h5ad, counts, genes, obs) -> Path:  # type: ignore[no-untyped-def]
    """30 cells of the last 300 genes, in reverse order, a column of obs more and one less, a gene of no name."""
    frame = obs[100:130].drop(columns="note").assign(plate=np.arange(30))
    matrix = np.hstack([counts[100:130, 300:][:, ::-1], np.ones((30, 1))])
    path: Path = write_h5ad(tmp_path / "new.h5ad", matrix, [*genes[300:][::-1], "junk"], obs=frame)
    return path


def test_old_and_new_cells_and_genes(store: Path, new: Path, counts: np.ndarray, genes: list[str]) -> None:
    before = files_of(store)
    report = append(store, new, shard_cells=25)
    both = CellStore.open(store)
    verify_artefact(store)
    assert both.gene_ids == tuple(genes[:400] + genes[400:][::-1])
    expected = np.zeros((80, 600))
    place = [both.gene_ids.index(gene) for gene in genes]
    expected[:50, place[:400]] = counts[50:100, :400]
    expected[50:][:, place[300:]] = counts[100:130, 300:]
    assert np.array_equal(dense_of(both), expected)
    assert both.totals(np.arange(50, 80)).tolist() == (counts[100:130, 300:].sum(1) + 1).tolist()
    assert both.genes["num_cells"].tolist() == (expected > 0).sum(0).tolist()
    assert [shard["cells"] for shard in both.manifest["shards"]] == [20, 20, 10, 25, 5]
    assert [source["name"] for source in both.manifest["sources"]] == ["old.h5ad", "new.h5ad"]
    assert both.manifest["unmapped_genes"] == 1 and both.manifest["total_counts"] == expected.sum() + 30
    assert both.manifest["unmapped_fraction"] == pytest.approx(30 / (expected.sum() + 30))
    assert both.manifest["cells"] == 80 and both.manifest["nnz"] == np.count_nonzero(expected)
    assert sorted(path.name for path in store.iterdir()) == [
        "genes.00001.parquet",
        "genes.parquet",
        "manifest.json",
        "shards",
    ]
    after = files_of(store)
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"
    }
    assert (report.cells_before, report.genes_before, report.num_cells, report.num_genes) == (50, 400, 30, 600)
    assert str(report).startswith(f"{store}: 30 cells added to 50, 200 genes to 400, ")


def test_the_table_of_cells_has_the_columns_of_both(store: Path, new: Path, obs: pd.DataFrame) -> None:
    append(store, [new])
    kept = CellStore.open(store).obs
    assert kept["cell_id"].tolist() == obs.index[50:130].tolist()
    assert kept["source"].tolist() == ["old.h5ad"] * 50 + ["new.h5ad"] * 30
    assert kept["donor"].astype(object).tolist() == obs["donor"].astype(object).tolist()[50:130]
    assert kept["plate"][:50].isna().all() and kept["plate"][50:].tolist() == list(range(30))
    assert kept["plate"].dtype == "Int64"
    assert kept["note"][50:].isna().all() and kept["note"][0] == "μ50"


def test_adding_is_the_same_for_any_number_of_workers_and_more_than_once(
    store: Path, new: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(store, tmp_path / "b.store"))
    again = Path(shutil.copy(new, tmp_path / "again.h5ad"))
    for path, workers in ((store, 1), (other, 4)):
        append(path, new, shard_cells=7, workers=workers)
        append(path, again, shard_cells=7, workers=workers)
    assert files_of(store) == files_of(other)
    assert "genes.parquet" not in files_of(store) and "genes.00002.parquet" in files_of(store)
    assert len(CellStore.open(store)) == 110


def test_a_name_without_id_is_counted_once(store: Path, new: Path, tmp_path: Path, write_h5ad, counts, genes) -> None:  # type: ignore[no-untyped-def]
    append(store, new)
    other = write_h5ad(tmp_path / "other.h5ad", np.ones((4, 402)), [*genes[:400], "scrap", "junk"])
    report = append(store, other)
    opened = CellStore.open(store)
    assert report.num_unmapped == 2 and opened.manifest["unmapped_genes"] == 2
    path = store / opened.manifest["gene_file"]
    assert unmapped_names(pq.read_table(path)) == ["junk", "scrap"]

    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    seal(store)
    again = Path(shutil.copy(new, tmp_path / "again.h5ad"))
    with pytest.raises(InputError, match="genes.00002.parquet does not name its 2 genes without an Ensembl id"):
        append(store, again)


def test_an_open_store_goes_on_with_what_it_opened(store: Path, new: Path) -> None:
    old = CellStore.open(store)
    append(store, new)
    assert len(old) == 50 and dense_of(old).shape == (50, 400) and len(old.genes) == 400 and len(old.obs) == 50


def test_shards_of_other_types(store: Path, tmp_path: Path, write_h5ad, counts, genes) -> None:  # type: ignore[no-untyped-def]
    """Fractions and large counts beside the small ones that are there; fractions only when they are asked for."""
    corrected = counts[:20] * 0.5 + 0.25 * (counts[:20] > 0)
    path = write_h5ad(tmp_path / "c.h5ad", corrected, genes)
    with pytest.raises(InputError, match="wanted raw integer counts"):
        append(store, path)
    append(store, path, allow_floats=True)
    both = CellStore.open(store)
    assert [shard["counts"] for shard in both.manifest["shards"]][3:] == ["float32"]
    assert both.dtypes["counts"] == "float32"
    assert np.array_equal(dense_of(both)[50:, [both.gene_ids.index(gene) for gene in genes]], corrected)


def test_what_cannot_be_added(store: Path, new: Path, tmp_path: Path, write_h5ad, counts, genes) -> None:  # type: ignore[no-untyped-def]
    before = files_of(store)

    def refused(words: str, sources: Any, **options: Any) -> None:
        with pytest.raises(InputError, match=words):
            append(store, sources, **options)
        assert files_of(store) == before and not (store / ".append").exists()

    refused("species is 'mouse', but .* holds human genes", new, species="mouse")
    refused("old.h5ad is in .*a.store already", [new, tmp_path / "old.h5ad"])
    refused("no file at", tmp_path / "none.h5ad")
    odd = write_h5ad(
        tmp_path / "odd.h5ad", counts[:3], genes, obs=pd.DataFrame({"age": ["x"] * 3}, index=["a", "b", "c"])
    )
    refused("the obs column 'age' is int64 in the store and text in the new sources", odd)
    bad = counts[:30].copy()
    bad[29, 599] = -1
    refused("counts cannot be negative", write_h5ad(tmp_path / "bad.h5ad", bad, genes))
    with pytest.raises(InputError, match="does not exist"):
        append(tmp_path / "none.store", new)
    append(store, odd, obs_columns=[])


def test_a_store_of_version_1_is_refused(store: Path, new: Path) -> None:
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["version"] = 1
    del manifest["dtypes"]["totals"]
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="version 1, to which nothing can be added: convert its sources again"):
        append(store, new)


@pytest.mark.parametrize("key", ["total_counts", "summed_columns"])
def test_a_damaged_manifest_is_refused(store: Path, new: Path, key: str) -> None:
    manifest = json.loads((store / "manifest.json").read_text())
    manifest[key] = "many"
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=f"manifest.json is damaged: {key} must be a number"):
        append(store, new)


def test_a_table_of_genes_without_numbers_of_cells_is_refused(store: Path, new: Path) -> None:
    table = pq.read_table(store / "genes.parquet")
    pq.write_table(table.drop_columns("num_cells"), store / "genes.parquet")
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["files"]["genes.parquet"]["bytes"] = (store / "genes.parquet").stat().st_size
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="genes.parquet is damaged: it has no whole numbers num_cells"):
        append(store, new)
    assert not (store / ".append").exists()


def test_two_writers(store: Path, new: Path) -> None:
    lock = lock_folder(store)
    assert lock
    with pytest.raises(InputError, match="being added to by another process"):
        append(store, new)
    os.close(lock)
    append(store, new)


def test_a_store_that_is_replaced_meanwhile_is_left_alone(store: Path, new: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.h5ad"
    with pytest.raises(InputError, match="was replaced meanwhile"):
        append(store, new, progress=lambda *news: convert([old], store, shard_cells=20, replace=True, obs_columns=[]))
    assert len(CellStore.open(store)) == 50 and "donor" not in CellStore.open(store).obs_columns
    verify_artefact(store)


def stop_after(num_cells: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= num_cells:
            raise KeyboardInterrupt

    return progress


@pytest.fixture
def whole(store: Path, new: Path, tmp_path: Path) -> dict[str, bytes]:
    """The files of the store after an append that nothing disturbed."""
    path = Path(shutil.copytree(store, tmp_path / "whole.store"))
    append(path, new, shard_cells=7)
    return files_of(path)


def test_the_same_command_goes_on(store: Path, new: Path, whole: dict[str, bytes]) -> None:
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        append(store, new, shard_cells=7, workers=1, progress=stop_after(20))
    verify_artefact(store)
    assert len(CellStore.open(store)) == 50
    report = append(store, new, shard_cells=7)
    assert 1 <= report.shards_kept < 5 and report.cells_kept == 7 * report.shards_kept
    assert files_of(store) == whole


def test_another_append_drops_what_was_left(store: Path, new: Path, whole: dict[str, bytes]) -> None:
    with pytest.raises(KeyboardInterrupt):
        append(store, new, shard_cells=8, workers=1, progress=stop_after(20))
    report = append(store, new, shard_cells=7)
    assert report.is_dropped and report.shards_kept == 0 and files_of(store) == whole


class Died(BaseException):
    """As if the process had been killed: nothing is tidied up."""


@pytest.mark.parametrize(
    "point", ["first shard moved", "all moved", "manifest aside", "done", "committed", "tidied halfway"]
)
def test_dying_at_the_end(  # type: ignore[no-untyped-def]
    store: Path, new: Path, whole: dict[str, bytes], monkeypatch, point: str
) -> None:
    """The old store or the new one is there at every step of the end, and the same command brings it to its end."""
    old = files_of(store)

    def die(*arguments: Any, **more: Any) -> None:
        raise Died

    def after(owner: Any, name: str, number: int) -> None:
        real = getattr(owner, name)
        calls = 0

        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > number:
                raise Died
            return real(*arguments, **more)

        monkeypatch.setattr(owner, name, call)

    if point == "first shard moved":
        after(Path, "rename", 1)
    elif point == "all moved":
        monkeypatch.setattr(MODULE, "write_atomically", die)
    elif point == "manifest aside":
        after(os, "replace", 1 + 5 + 1)  # plan, records, done
    elif point == "done":
        monkeypatch.setattr(MODULE, "write_manifest", die)
    elif point == "committed":
        monkeypatch.setattr(MODULE, "_clear", die)
    else:
        after(shutil, "rmtree", 6)  # shards that are begun, then work/
    with pytest.raises(Died):
        append(store, new, shard_cells=7, workers=1)
    monkeypatch.undo()
    verify_artefact(store)
    is_new = point in ("committed", "tidied halfway")
    assert len(CellStore.open(store)) == (80 if is_new else 50)
    if not is_new:
        assert {name: files_of(store)[name] for name in old} == old
    report = append(store, new, shard_cells=7)
    assert files_of(store) == whole and not (store / ".append").exists()
    assert (report.num_cells, report.cells_before) == (30, 50)
    assert (report.shards_kept > 0) == (not is_new)


def test_a_full_disk_leaves_the_old_store(store: Path, new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files_of(store)

    def full(*arguments: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("write_tables", "sync_tree", "sync_folder", "write_manifest"):
        with monkeypatch.context() as patch:
            patch.setattr(MODULE, name, full)
            with pytest.raises(OSError) as caught:
                append(store, new, shard_cells=7)
        assert caught.value.errno == errno.ENOSPC and str(store) in str(caught.value.filename)
        assert files_of(store) == before and not (store / ".append").exists(), name


def test_the_genes_own_columns_are_joined(store: Path, new: Path, tmp_path: Path, write_h5ad, counts, genes) -> None:  # type: ignore[no-untyped-def]
    var = pd.DataFrame({"chrom": [str(i) for i in range(450)]}, index=genes[:450])
    append(store, write_h5ad(tmp_path / "v.h5ad", counts[:5, :450], genes, var=var))
    table = pq.read_table(store / "genes.00001.parquet")
    assert table["chrom"].type == pa.string()
    assert table["chrom"].to_pylist() == [None] * 400 + [str(i) for i in range(400, 450)]
