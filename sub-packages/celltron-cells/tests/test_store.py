"""Reading a store, and every way in which one may be damaged."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celltron.cells import CellIndexError, CellStore
from celltron.core import InputError


def test_one_cell(store: CellStore, counts: np.ndarray) -> None:
    for i in (0, 7, 149, 150, 399):
        gene_index, values = store[i]
        assert np.array_equal(gene_index, np.flatnonzero(counts[i]))
        assert np.array_equal(values, counts[i][counts[i] > 0])
    assert len(list(store)) == len(store) == 400


@settings(max_examples=40, deadline=None)
@given(cells=st.lists(st.integers(0, 399), max_size=30))
def test_rows_in_any_order_with_repeats(store: CellStore, counts: np.ndarray, cells: list[int]) -> None:
    indptr, gene_index, values = store.rows(cells)
    assert len(indptr) == len(cells) + 1
    for k, cell in enumerate(cells):
        part = slice(indptr[k], indptr[k + 1])
        assert np.array_equal(gene_index[part], np.flatnonzero(counts[cell]))
        assert np.array_equal(values[part], counts[cell][counts[cell] > 0])


def test_rows_are_copies(store: CellStore) -> None:
    _, gene_index, values = store.rows([0])
    gene_index[:], values[:] = 0, 0
    assert store[0][1].min() > 0


@pytest.mark.parametrize("cell", [400, -1, 10**12])
def test_a_cell_out_of_range(store: CellStore, cell: int) -> None:
    with pytest.raises(CellIndexError, match=f"no cell {cell} in .*: its cells are numbered 0 to 399"):
        store[cell]
    with pytest.raises(InputError):
        store.rows([0, cell])


def test_gene_ids_cost_one_column(fresh_store: Path) -> None:
    opened = CellStore.open(fresh_store)
    ids = opened.gene_ids
    assert "genes" not in vars(opened) and ids == tuple(opened.genes["gene_id"])


@pytest.mark.parametrize("cells", [[0.5], ["a"], [[0, 1]], [True]])
def test_cells_must_be_whole_numbers(store: CellStore, cells: list[Any]) -> None:
    with pytest.raises(InputError, match="list of whole numbers"):
        store.rows(cells)


def test_tables(store: CellStore, genes: list[str], obs: pd.DataFrame, counts: np.ndarray) -> None:
    assert store.genes["gene_id"].tolist() == genes and set(store.genes["species"]) == {"human"}
    assert store.obs_column("age").tolist() == obs["age"].tolist()
    assert np.array_equal(store.total_counts, counts.sum(1))
    with pytest.raises(InputError, match="no obs column 'patient': it has cell_id, source, total_counts, donor"):
        store.obs_column("patient")
    assert "400 cells x 600 genes (human)" in store.info() and "a.h5ad, 400 cells from X" in store.info()
    assert "400 cells" in repr(store)


def test_fingerprint_is_of_the_content(store: CellStore, fresh_store: Path, tmp_path: Path) -> None:
    shutil.copytree(fresh_store, tmp_path / "copy")
    opened = CellStore.open(fresh_store)
    assert CellStore.open(tmp_path / "copy").fingerprint == opened.fingerprint != store.fingerprint


def test_a_read_only_store_can_be_read(fresh_store: Path) -> None:
    for path in [*fresh_store.rglob("*"), fresh_store]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        store = CellStore.open(fresh_store)
        assert len(store.rows(np.arange(20)).indptr) == 21
        store.verify()
    finally:
        for path in [fresh_store, *fresh_store.rglob("*")]:
            path.chmod(0o755)


def test_threads_read_the_same(store: CellStore) -> None:
    expected = store.rows(np.arange(400)).gene_index
    fresh = CellStore.open(store.path)
    results: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: results.append(fresh.rows(np.arange(400)).gene_index)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and all(np.array_equal(result, expected) for result in results)


def test_verify_reports_bytes(store: CellStore) -> None:
    seen: list[tuple[int, int]] = []
    store.verify(lambda done, total: seen.append((done, total)))
    assert (
        seen[-1][0]
        == seen[-1][1]
        == sum(f.stat().st_size for f in store.path.rglob("*") if f.suffix != ".json" and f.is_file())
    )


def edit(store: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((store / "manifest.json").read_text())
    change(manifest)
    (store / "manifest.json").write_text(json.dumps(manifest))


def refuse(store: Path, pattern: str) -> None:
    with pytest.raises(InputError, match=pattern) as caught:
        CellStore.open(store)
    assert "\n" not in str(caught.value)


def test_no_store_at_all(tmp_path: Path, fresh_store: Path) -> None:
    refuse(tmp_path / "none", "none")
    refuse(fresh_store / "genes.parquet", "is a file, wanted the folder of a CellStore")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "manifest.json")


@pytest.mark.parametrize(
    "name",
    ["genes.parquet", *(f"shards/00001/{n}" for n in ("indptr.bin", "indices.bin", "counts.bin", "obs.parquet"))],
)
def test_a_missing_or_short_file(fresh_store: Path, name: str) -> None:
    data = (fresh_store / name).read_bytes()
    (fresh_store / name).write_bytes(data[:-1])
    refuse(fresh_store, name)
    (fresh_store / name).write_bytes(data + b"\0")
    refuse(fresh_store, name)
    (fresh_store / name).unlink()
    refuse(fresh_store, name)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', "\x00\xff", "[" * 100_000])
def test_a_manifest_that_is_no_manifest(fresh_store: Path, text: str) -> None:
    (fresh_store / "manifest.json").write_text(text, encoding="latin-1")
    refuse(fresh_store, "manifest.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(version=3),
        lambda m: m.update(version="1"),
        lambda m: m.update(format="celltron-split"),
        lambda m: m.update(cells=21),
        lambda m: m.update(cells=-1),
        lambda m: m.update(cells=True),
        lambda m: m.update(genes="600"),
        lambda m: m.update(nnz=10**30),
        lambda m: m.pop("dtypes"),
        lambda m: m["dtypes"].update(counts="object"),
        lambda m: m["dtypes"].update(indices="uint32"),
        lambda m: m["dtypes"].update(counts=["uint8"]),
        lambda m: m.update(shards={}),
        lambda m: m["shards"].pop(),
        lambda m: m["shards"].append(m["shards"][0]),
        lambda m: m["shards"][0].update(cells=13),
        lambda m: m["shards"][1].update(nnz=-5),
        lambda m: m.update(shards=[7]),
        lambda m: m["files"].pop("genes.parquet"),
        lambda m: m["files"].pop("shards/00000/obs.parquet"),
        lambda m: m.update(files=[]),
        lambda m: m.update(sources=[{"name": 5}]),
        lambda m: m.update(species=None),
        lambda m: m.pop("unmapped_fraction"),
    ],
)
def test_a_manifest_that_does_not_fit(fresh_store: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit(fresh_store, change)
    refuse(fresh_store, "manifest.json")


@pytest.mark.parametrize(
    "name",
    [
        "genes.parquet",
        "shards/00000/indptr.bin",
        "shards/00001/indices.bin",
        "shards/00001/counts.bin",
        "shards/00000/obs.parquet",
    ],
)
def test_verify_finds_one_flipped_bit(fresh_store: Path, name: str) -> None:
    data = bytearray((fresh_store / name).read_bytes())
    data[len(data) // 2] ^= 1
    (fresh_store / name).write_bytes(bytes(data))
    with pytest.raises(InputError, match=name):
        CellStore.open(fresh_store).verify()


@pytest.mark.parametrize("name", ["genes.parquet", "shards/00000/obs.parquet"])
def test_garbage_in_a_table_is_a_sentence(fresh_store: Path, name: str) -> None:
    size = (fresh_store / name).stat().st_size
    (fresh_store / name).write_bytes(b"\x5a" * size)
    store = CellStore.open(fresh_store)
    with pytest.raises(InputError, match="damaged"):
        _ = store.genes, store.obs


def test_garbage_in_indptr_does_not_read_beyond_the_shard(fresh_store: Path) -> None:
    path = fresh_store / "shards/00000/indptr.bin"
    for values in (np.full(13, 2**63, "<u8"), np.full(13, 10**9, "<u8"), np.arange(13, 0, -1).astype("<u8")):
        path.write_bytes(values.tobytes())
        with pytest.raises(InputError, match="indptr.bin is damaged"):
            CellStore.open(fresh_store).rows([3, 4])
