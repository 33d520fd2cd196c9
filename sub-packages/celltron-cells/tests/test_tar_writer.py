"""Writing tar shards: what is in them, for whom they are readable, and that a broken-off run goes on."""

import filecmp
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import webdataset

from celltron.cells import CellStore, convert
from celltron.cells import tar_writer as tar_writer_module
from celltron.cells.collection import CellCollection
from celltron.cells.reader import Located, Rows
from celltron.cells.tar_store import TarStore
from celltron.cells.tar_writer import shard_store
from celltron.core import InputError, verify_artefact

SMALL: dict[str, Any] = {"block_cells": 16, "shard_bytes": 60_000}


@pytest.fixture(scope="module")
def shards(store: CellStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of the tests in tars of a few blocks."""
    out = tmp_path_factory.mktemp("shards") / "a.tars"
    shard_store(store, out, workers=2, **SMALL)
    return out


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def assert_same_files(first: Path, second: Path) -> None:
    assert files_of(first) == files_of(second)
    assert filecmp.cmpfiles(first, second, files_of(first), shallow=False)[0] == files_of(first)


def test_webdataset_reads_the_tars(shards: Path, counts: np.ndarray) -> None:
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    assert len(urls) > 3
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(samples) == 25
    back, totals = np.zeros_like(counts), np.full(len(counts), -1.0)
    for sample in samples:
        indptr, cells = sample["indptr.npy"], sample["cells.npy"]
        assert sample["__key__"][:6] in sample["__url__"]
        totals[cells] = sample["totals.npy"]
        for i, cell in enumerate(cells):
            part = slice(indptr[i], indptr[i + 1])
            back[cell, sample["indices.npy"][part]] = sample["counts.npy"][part]
    assert np.array_equal(back, counts)
    assert np.array_equal(totals, counts.sum(1))


def test_the_files(shards: Path, store: CellStore) -> None:
    verify_artefact(shards)
    manifest = json.loads((shards / "manifest.json").read_text())
    num_tars = len(manifest["shards"])
    tables = ["blocks.parquet", "genes.parquet", *(f"obs-{i:06d}.parquet" for i in range(num_tars))]
    assert sorted(manifest["files"]) == sorted([*tables, *(f"shard-{i:06d}.tar" for i in range(num_tars))])
    assert (manifest["format"], manifest["version"], manifest["cells"]) == ("celltron-tar-shards", 1, 400)
    assert manifest["store_fingerprint"] == store.fingerprint
    blocks = pq.read_table(shards / "blocks.parquet").to_pandas()
    assert blocks["cells"].tolist() == [16] * 25
    assert blocks["first_cell"].tolist() == list(range(0, 400, 16))
    for i in range(num_tars):
        obs = pq.read_table(shards / f"obs-{i:06d}.parquet").to_pandas()
        first = int(blocks["first_cell"][blocks["tar"] == i].iloc[0])
        assert obs["cell_id"].tolist() == store.obs_column("cell_id").tolist()[first : first + len(obs)]
        with tarfile.open(shards / f"shard-{i:06d}.tar") as tar:
            assert [m.name for m in tar.getmembers()][0] == f"{i:06d}-0000.indptr.npy"
        # The first is longer than was planned, for it has the count of 70,000.
        assert (shards / f"shard-{i:06d}.tar").stat().st_size <= 61_024 or i == 0
        assert manifest["shards"][i]["blocks"] >= 2 or i == num_tars - 1


def test_the_same_bytes_whatever_the_threads(shards: Path, store: CellStore, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = shard_store(store, tmp_path / "b.tars", workers=1, progress=lambda *n: seen.append(n), **SMALL)
    assert_same_files(shards, tmp_path / "b.tars")
    assert seen == [(16 * i, 400) for i in range(1, 26)]
    assert (report.num_cells, report.num_blocks, report.nnz) == (400, 25, store.nnz)
    assert "400 cells in 25 blocks, " in str(report) and f"{report.num_tars} tar shards" in str(report)
    assert report.num_bytes == sum(p.stat().st_size for p in shards.iterdir() if p.name != "manifest.json")


def test_sizes_of_blocks_and_tars(store: CellStore, tmp_path: Path) -> None:
    report = shard_store(store, tmp_path / "one.tars", block_cells=10_000)
    assert (report.num_tars, report.num_blocks) == (1, 1)
    report = shard_store(store, tmp_path / "many.tars", block_cells=150, shard_bytes=1)
    assert (report.num_tars, report.num_blocks) == (3, 3)
    assert TarStore.open(tmp_path / "many.tars").disk_runs.tolist() == [0, 150, 300, 400]
    for wrong in ({"block_cells": 0}, {"shard_bytes": 0}, {"workers": 0}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))} is 0: wanted 1 or more"):
            shard_store(store, tmp_path / "c.tars", **wrong)
    assert not (tmp_path / "c.tars").exists()


def test_a_block_that_would_be_too_large(store: CellStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_writer_module, "MOST_BLOCK_BYTES", 300_000)
    with pytest.raises(InputError, match="block_cells is 400: that many cells may take .* take fewer cells"):
        shard_store(store, tmp_path / "c.tars", block_cells=400)
    assert shard_store(store, tmp_path / "c.tars", block_cells=10).num_blocks == 40


def test_counts_take_the_smallest_type_of_their_block(shards: Path) -> None:
    blocks = pq.read_table(shards / "blocks.parquet").to_pandas()
    assert blocks["counts"][0] == "uint32"  # cell 11 has a count of 70,000
    assert {"uint8", "uint16"} & set(blocks["counts"])
    assert set(blocks["indices"]) == {"uint16"}


def test_fractional_counts(tmp_path: Path, write_h5ad: Callable[..., Path], genes: list[str]) -> None:
    dense = np.random.default_rng(0).random((30, 600)).astype(np.float32) * (np.arange(600) % 7 == 0)
    dense[:16] = np.round(dense[:16] * 9)
    convert([write_h5ad(tmp_path / "f.h5ad", dense, genes)], tmp_path / "f.store", allow_floats=True, shard_cells=20)
    store = CellStore.open(tmp_path / "f.store")
    shard_store(store, tmp_path / "f.tars", block_cells=8)
    with TarStore.open(tmp_path / "f.tars") as shards:
        found = shards.rows(np.arange(30))
        for one, other in zip(found, store.rows(np.arange(30)), strict=True):
            assert np.array_equal(one, other)
        assert found.counts.dtype == np.float32


def test_an_empty_store(tmp_path: Path) -> None:
    out = tmp_path / "e.tars"
    report = shard_store(FewCells(0), out)
    assert (report.num_cells, report.num_tars) == (0, 0)
    with TarStore.open(out) as shards:
        assert len(shards) == 0 and shards.num_genes == 3 and len(shards.rows([]).indptr) == 1
        shards.verify()


class FewCells:
    """A reader of cells that count 1, 2, 3 in three genes; it knows of genes only their ids, and has no obs."""

    name, num_genes, gene_maps, fingerprint = "few", 3, (None,), "0" * 64
    gene_ids = ("ENSG1", "ENSG2", "ENSG3")
    obs_columns: list[str] = []

    def __init__(self, num_cells: int) -> None:
        self.num_cells = num_cells
        self.gene_index = np.array([0, 1, 2])

    def __len__(self) -> int:
        return self.num_cells

    def locate(self, cells: np.ndarray) -> list[Any]:
        none = np.zeros(len(cells), dtype=np.uint64)
        sizes, totals = np.full(len(cells), 3), np.full(len(cells), 6.0)
        return [Located(np.arange(len(cells)), none, none, sizes, totals, "uint16", "uint8", 0, ())]

    def rows(self, cells: np.ndarray) -> Any:
        n = len(cells)
        return Rows(np.arange(n + 1) * 3, np.tile(self.gene_index, n), np.tile([1, 2, 3], n))

    def totals(self, cells: np.ndarray) -> np.ndarray:
        return np.full(len(cells), 6.0)


def test_a_reader_without_obs(tmp_path: Path) -> None:
    shard_store(FewCells(10), tmp_path / "x.tars", block_cells=4)
    with TarStore.open(tmp_path / "x.tars") as shards:
        assert shards.gene_ids == FewCells.gene_ids and shards.obs_columns == []
        assert shards.rows([9, 0]).counts.tolist() == [1, 2, 3, 1, 2, 3]
        shards.verify()
        assert "species not given" in shards.info() and "obs: no columns" in shards.info()


def test_a_collection(
    tmp_path: Path, write_h5ad: Callable[..., Path], counts: np.ndarray, genes: list[str], obs: pd.DataFrame
) -> None:
    for name, part, columns in (("a", slice(0, 40), slice(0, 300)), ("b", slice(40, 70), slice(590, 200, -1))):
        table = obs.iloc[part].copy()
        write_h5ad(tmp_path / f"{name}.h5ad", counts[part, columns], genes[columns], obs=table)
        convert([tmp_path / f"{name}.h5ad"], tmp_path / f"{name}.store")
    collection = CellCollection.open([tmp_path / "a.store", tmp_path / "b.store"])
    shard_store(collection, tmp_path / "ab.tars", block_cells=16)
    with TarStore.open(tmp_path / "ab.tars") as shards:
        for found, wanted in zip(shards.rows(np.arange(70)), collection.rows(np.arange(70)), strict=True):
            assert np.array_equal(found, wanted)
        assert shards.gene_ids == collection.gene_ids and shards.fingerprint == collection.fingerprint
        for name in collection.obs_columns:
            pd.testing.assert_series_equal(shards.obs_column(name), collection.obs_column(name))
        shards.verify()


def test_damage_is_not_carried_over(tmp_path: Path) -> None:
    reader = FewCells(10)
    reader.gene_index = np.array([0, 2, 1])
    with pytest.raises(InputError, match="few is damaged in cells 0 to 3: the genes of a cell do not rise"):
        shard_store(reader, tmp_path / "x.tars", block_cells=4)
    assert list(tmp_path.iterdir()) == []


class Stopped(KeyboardInterrupt):
    """Ctrl-C at a moment of the test's choice."""


def stop_after(num_blocks: int) -> Callable[[int, int], None]:
    calls: list[int] = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == num_blocks:
            raise Stopped

    return progress


@pytest.mark.parametrize("num_blocks", [1, 9, 25])
def test_a_stopped_run_goes_on(
    shards: Path, store: CellStore, tmp_path: Path, num_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, partial = tmp_path / "c.tars", tmp_path / ".c.tars.partial"
    with pytest.raises(Stopped):
        shard_store(store, out, workers=1, progress=stop_after(num_blocks), **SMALL)
    assert not out.exists()
    done = len(list((partial / "done").glob("0*.json")))
    assert (num_blocks == 1) == (done == 0)
    (partial / ".manifest.json.12ab.tmp").write_text("of a kill in the last step")
    written: list[str] = []
    write = tar_writer_module.write_tables
    monkeypatch.setattr(
        tar_writer_module, "write_tables", lambda tables, path: written.append(path.name) or write(tables, path)
    )
    shard_store(store, out, workers=1, **SMALL)
    assert_same_files(shards, out)
    num_tars = len(list(out.glob("*.tar")))
    assert len([name for name in written if name.startswith("obs")]) == num_tars - done
    assert not partial.exists()


def test_what_another_run_left_is_not_used(shards: Path, store: CellStore, tmp_path: Path) -> None:
    out, partial = tmp_path / "c.tars", tmp_path / ".c.tars.partial"
    for other in ({"block_cells": 15, "shard_bytes": 60_000}, {"block_cells": 16, "shard_bytes": 30_000}):
        with pytest.raises(Stopped):
            shard_store(store, out, workers=1, progress=stop_after(25), **other)
    assert len(list(partial.glob("*.tar"))) > len(list(shards.glob("*.tar")))
    shard_store(store, out, **SMALL)
    assert_same_files(shards, out)


@pytest.mark.parametrize("name", ["shard-000001.tar", "obs-000000.parquet"])
def test_a_tar_that_changed_meanwhile_is_written_again(
    shards: Path, store: CellStore, tmp_path: Path, name: str
) -> None:
    out, partial = tmp_path / "c.tars", tmp_path / ".c.tars.partial"
    with pytest.raises(Stopped):
        shard_store(store, out, workers=1, progress=stop_after(25), **SMALL)
    data = bytearray((partial / name).read_bytes())
    data[1000] ^= 1
    (partial / name).write_bytes(data)
    shard_store(store, out, **SMALL)
    assert_same_files(shards, out)


def test_an_existing_folder(shards: Path, store: CellStore, tmp_path: Path) -> None:
    out = tmp_path / "c.tars"
    shutil.copytree(shards, out)
    with pytest.raises(InputError, match="c.tars exists already"):
        shard_store(store, out)
    shard_store(store, out, block_cells=100, replace=True)
    assert TarStore.open(out).num_blocks == 4
    verify_artefact(out)


def test_obs_keeps_its_types(shards: Path, store: CellStore) -> None:
    with TarStore.open(shards) as opened:
        assert opened.obs_columns == store.obs_columns
        for name in store.obs_columns:
            pd.testing.assert_series_equal(opened.obs_column(name), store.obs_column(name))
