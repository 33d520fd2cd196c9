"""Several stores as one: compared with dense matrices put together by numpy."""

import hashlib
import json
import os
import resource
import shutil
import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celltron.cells.collection import CellCollection, short_names
from celltron.cells.reader import CellIndexError, Rows
from celltron.cells.store import CellStore
from celltron.cells.tokenize import RankTokenizer
from celltron.core import InputError, MedianTable, Vocabulary, write_artefact
from celltron.core.manifest import seal_manifest

HUMAN = [f"ENSG{i:011d}" for i in range(12)]
MOUSE = [f"ENSMUSG{i:011d}" for i in range(6)]


def write_store(
    path: Path,
    dense: np.ndarray,
    genes: list[str],
    *,
    obs: dict[str, Any] | None = None,
    totals: np.ndarray | None = None,
    shard_cells: int = 3,
    version: int = 2,
) -> Path:
    """A store of any version, written here file by file; counts have the type of ``dense``."""
    counts = dense.dtype.name
    species = ["mouse" if gene in MOUSE else "human" for gene in genes]
    totals = dense.sum(1).astype(np.float64) if totals is None else totals
    columns = {"cell_id": [f"c{i}" for i in range(len(dense))], "source": [path.name] * len(dense)}
    table = pa.table({**columns, "total_counts": totals, **(obs or {})})
    with write_artefact(path, format="celltron-cellstore", version=version) as artefact:
        shards = []
        for i, start in enumerate(range(0, len(dense), shard_cells)):
            part = dense[start : start + shard_cells]
            folder = artefact.folder / "shards" / f"{i:05d}"
            folder.mkdir(parents=True)
            indptr = np.concatenate([[0], np.cumsum((part > 0).sum(1))])
            indptr.astype("<u8").tofile(folder / "indptr.bin")
            np.nonzero(part)[1].astype("<u2").tofile(folder / "indices.bin")
            part[part > 0].tofile(folder / "counts.bin")
            if version > 1:
                totals[start : start + shard_cells].astype("<f8").tofile(folder / "totals.bin")
            pq.write_table(table.slice(start, shard_cells), folder / "obs.parquet")
            shards.append({"cells": len(part), "nnz": int(indptr[-1]), "indices": "uint16", "counts": counts})
        dtypes = {"indptr": "uint64", "totals": "float64", "indices": "uint16", "counts": counts}
        gene_table = {"gene_id": genes, "gene_name": [f"{gene[-3:]} of {path.name}" for gene in genes]}
        gene_table |= {"species": species, "num_cells": (dense > 0).sum(0).astype(np.int64)}
        if version == 1:
            del dtypes["totals"], gene_table["num_cells"]
        pq.write_table(pa.table(gene_table), artefact.folder / "genes.parquet")
        artefact.meta |= {
            "cells": len(dense),
            "genes": len(genes),
            "nnz": sum(shard["nnz"] for shard in shards),
            "species": species[0],
            "sources": [{"name": path.name, "matrix": "X", "gene_column": "var_names", "cells": len(dense)}],
            "unmapped_genes": 0,
            "unmapped_fraction": 0.0,
            "dtypes": dtypes,
            "shards": shards,
            "gene_file": "genes.parquet",
            "total_counts": "all",
            "summed_columns": [],
        }
    return path


def some_counts(seed: int, num_cells: int, num_genes: int, largest: int = 9) -> np.ndarray:
    random = np.random.default_rng(seed)
    dense = random.integers(1, largest, (num_cells, num_genes)) * (random.random((num_cells, num_genes)) < 0.4)
    return dense.astype(np.uint8 if largest < 256 else np.uint16)


def dense_rows(rows: Rows, num_genes: int) -> np.ndarray:
    """The rows as a dense matrix; genes must rise."""
    dense = np.zeros((len(rows.indptr) - 1, num_genes))
    for k in range(len(dense)):
        part = slice(rows.indptr[k], rows.indptr[k + 1])
        assert np.all(np.diff(rows.gene_index[part].astype(np.int64)) > 0)
        dense[k, rows.gene_index[part]] = rows.counts[part]
    return dense


def dense_union(members: list[tuple[list[str], np.ndarray]]) -> tuple[list[str], np.ndarray]:
    """Independent of the code: gene ids in first-seen order, and all cells in them."""
    ids: list[str] = []
    for genes, _ in members:
        ids += [gene for gene in genes if gene not in ids]
    parts = []
    for genes, dense in members:
        part = np.zeros((len(dense), len(ids)), dtype=dense.dtype)
        part[:, [ids.index(gene) for gene in genes]] = dense
        parts.append(part)
    return ids, np.concatenate(parts)


MEMBERS: list[tuple[str, list[str], np.ndarray]] = [
    ("a.store", [HUMAN[i] for i in (3, 1, 2, 0)], some_counts(0, 7, 4)),
    ("b.store", [HUMAN[i] for i in (5, 0, 3, 9, 1)], some_counts(1, 4, 5, 60_000)),
    ("c.store", [*MOUSE[::-1]], some_counts(2, 5, 6)),
    ("d.store", [HUMAN[i] for i in (3, 1, 2, 0)], some_counts(3, 2, 4).astype(np.float32) / 2),
]
OBS: list[dict[str, Any]] = [
    {
        "donor": pa.array(["x", "y", None, "x", "x", "y", "y"]).dictionary_encode(),
        "age": pa.array(range(7), pa.int32()),
    },
    {"donor": pa.array(["z", "x", "x", "z"]).dictionary_encode(), "age": [2**53 + 1] * 4, "is_old": [True] * 4},
    {"age": [1.5] * 5, "store": ["own"] * 5, "is_old": [False] * 5},
    {"donor": ["x", None]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collection")
    for (name, genes, dense), obs in zip(MEMBERS, OBS, strict=True):
        write_store(folder / name, dense, genes, obs=obs, totals=dense.sum(1) + 3.0)
    return folder


@pytest.fixture(scope="module")
def collection(folder: Path) -> CellCollection:
    return CellCollection.open([folder / name for name, *_ in MEMBERS])


@pytest.fixture(scope="module")
def union() -> tuple[list[str], np.ndarray]:
    return dense_union([(genes, dense) for _, genes, dense in MEMBERS])


class FromAfar:
    """A reader that is no CellStore, as tar shards are: the collection knows no shards of it."""

    def __init__(self, store: CellStore) -> None:
        self.store = store
        self.gene_maps = store.gene_maps
        self.num_genes, self.nnz, self.name, self.manifest = store.num_genes, store.nnz, store.name, store.manifest

    def __len__(self) -> int:
        return len(self.store)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


class Turned(FromAfar):
    """A reader with gene maps of its own: its gene ids are those of its store the other way round."""

    def __init__(self, store: CellStore) -> None:
        super().__init__(store)
        self.gene_maps = (np.arange(store.num_genes)[::-1].copy(),)

    @cached_property
    def gene_ids(self) -> tuple[str, ...]:
        return self.store.gene_ids[::-1]

    @property
    def genes_fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.gene_ids).encode()).hexdigest()

    def rows(self, cells: Any) -> Rows:
        indptr, genes, counts = self.store.rows(cells)
        turned = [
            (self.num_genes - 1 - genes[begin:end][::-1].astype(np.int64), counts[begin:end][::-1])
            for begin, end in zip(indptr[:-1], indptr[1:], strict=True)
        ]
        nothing = (np.zeros(0, dtype=np.uint16), counts[:0])
        parts = [np.concatenate(arrays) for arrays in zip(nothing, *turned, strict=True)]
        return Rows(indptr, parts[0].astype(np.uint16), parts[1].astype(counts.dtype))


def open_stores(folder: Path, wrap: Callable[[CellStore], Any] = lambda store: store) -> CellCollection:
    return CellCollection([wrap(CellStore.open(folder / name)) for name, *_ in MEMBERS])


def test_the_union_of_genes_comes_in_first_seen_order(collection: CellCollection, union: tuple) -> None:
    ids, dense = union
    assert list(collection.gene_ids) == ids and collection.num_genes == len(ids) == 12
    assert collection.genes_fingerprint == hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    assert len(collection) == 18 and collection.nnz == (dense > 0).sum()
    assert collection.species == ("human", "human", "mouse", "human")
    # a and d have one list between them.
    assert len(collection.gene_maps) == 3
    for places, (_, genes, _) in zip(collection.gene_maps, MEMBERS, strict=False):
        assert places is not None and [ids[i] for i in places] == genes


def test_rows_in_any_order_with_repeats(collection: CellCollection, union: tuple) -> None:
    cells = [17, 0, 6, 7, 10, 11, 15, 16, 0, 0, 3]
    rows = collection.rows(cells)
    assert np.array_equal(dense_rows(rows, 12), union[1][cells])
    assert rows.counts.dtype == np.float32 and rows.gene_index.dtype == np.uint16 and rows.indptr.dtype == np.int64
    gene_index, counts = collection[8]
    assert np.array_equal(gene_index, np.flatnonzero(union[1][8])) and np.array_equal(counts, union[1][8][gene_index])
    assert len(collection.rows([]).counts) == 0 and collection.rows([]).counts.dtype == np.float32


@pytest.mark.parametrize("wrap", [lambda store: store, FromAfar, Turned])
def test_readers_of_other_kinds_read_the_same(folder: Path, union: tuple, wrap: Any) -> None:
    collection = open_stores(folder, wrap)
    cells = np.array([12, 1, 17, 9, 9, 0, 13])
    ids = [union[0].index(gene) for gene in collection.gene_ids]
    assert np.array_equal(dense_rows(collection.rows(cells), 12), union[1][cells][:, ids])
    assert np.array_equal(collection.totals(cells), union[1][cells].sum(1) + 3)
    seen = np.zeros((len(cells), 12))
    slots = []
    for part in collection.locate(cells):
        places = collection.gene_maps[part.member]
        assert places is not None
        for k, slot in enumerate(part.slots):
            size = int(part.sizes[k])
            genes = read_memory(int(part.index_addresses[k]), part.index_dtype, size)
            seen[slot, places[genes]] = read_memory(int(part.count_addresses[k]), part.count_dtype, size)
            assert part.totals[k] == union[1][cells[slot]].sum() + 3
        slots += part.slots.tolist()
    assert sorted(slots) == list(range(len(cells)))
    assert np.array_equal(seen, union[1][cells][:, ids])


def read_memory(address: int, dtype: str, size: int) -> np.ndarray:
    import ctypes

    return np.frombuffer(ctypes.string_at(address, size * np.dtype(dtype).itemsize), dtype=dtype)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, list[str], np.ndarray]]:
    """Stores of all sorts, one of them without cells, two with one gene list."""
    folder, random, pool = tmp_path_factory.mktemp("pool"), np.random.default_rng(7), []
    for i, num_cells in enumerate([3, 0, 6, 1, 4, 5, 2]):
        genes = list(random.permutation(HUMAN + MOUSE)[: random.integers(1, 10)]) if i != 3 else pool[2][1]
        dense = some_counts(i, num_cells, len(genes))
        path = write_store(folder / f"{i}.store", dense, [str(gene) for gene in genes], shard_cells=1 + i % 3)
        pool.append((path, [str(gene) for gene in genes], dense))
    return pool


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_members_and_any_cells(pool: list[tuple[Path, list[str], np.ndarray]], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(range(len(pool))), min_size=1, unique=True))
    paths, lists, parts = zip(*(pool[i] for i in chosen), strict=True)
    ids, dense = dense_union(list(zip(lists, parts, strict=True)))
    collection = CellCollection.open(paths)
    assert list(collection.gene_ids) == ids and len(collection) == len(dense)
    cells = data.draw(st.lists(st.integers(0, len(dense) - 1), max_size=20)) if len(dense) else []
    assert np.array_equal(dense_rows(collection.rows(cells), len(ids)), dense[cells])
    assert np.array_equal(collection.totals(np.array(cells, dtype=np.int64)), dense[cells].sum(1))
    assert collection.disk_runs[0] == 0 and collection.disk_runs[-1] == len(dense)
    assert np.all(np.diff(collection.disk_runs) > 0)
    if len(dense):
        assert collection.obs_column("cell_id").tolist() == [f"c{k}" for part in parts for k in range(len(part))]
        names = [path.name for path, part in zip(paths, parts, strict=True) for _ in part]
        assert collection.obs_column("store").tolist() == names


def test_a_collection_of_one_is_the_store(folder: Path) -> None:
    store = CellStore.open(folder / "b.store")
    collection = CellCollection([store])
    assert collection.fingerprint == store.fingerprint and collection.genes_fingerprint == store.genes_fingerprint
    assert collection.gene_ids == store.gene_ids and collection.gene_maps == store.gene_maps == (None,)
    assert collection.name == store.name and collection.genes.equals(store.genes)
    for ours, theirs in zip(collection.rows([3, 0]), store.rows([3, 0]), strict=True):
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    for ours, theirs in zip(collection.locate(np.array([2, 1])), store.locate(np.array([2, 1])), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(ours[:-1], theirs[:-1], strict=True))
    assert np.array_equal(collection.disk_runs, store.disk_runs)
    assert collection.obs_columns == [*store.obs_columns, "store"]
    for name in store.obs_columns:
        pd.testing.assert_series_equal(collection.obs_column(name), store.obs_column(name))
    assert CellCollection.open(folder / "c.store").obs_column("store").tolist() == ["own"] * 5


def test_obs_columns_are_united(collection: CellCollection) -> None:
    assert collection.obs_columns == [
        "cell_id",
        "source",
        "total_counts",
        "donor",
        "age",
        "is_old",
        "store_in_source",
        "store",
    ]
    assert (
        collection.obs_column("store").tolist() == ["a.store"] * 7 + ["b.store"] * 4 + ["c.store"] * 5 + ["d.store"] * 2
    )
    assert collection.obs_column("store_in_source").dropna().tolist() == ["own"] * 5
    assert collection.obs_column("store_in_source").isna().tolist() == [True] * 11 + [False] * 5 + [True] * 2
    donors = ["x", "y", None, "x", "x", "y", "y", "z", "x", "x", "z", *[None] * 5, "x", None]
    found = collection.obs_column("donor")
    assert found.name == "donor" and [None if pd.isna(value) else value for value in found] == donors
    # 2 ** 53 + 1 is no float64: beside 1.5 it is kept as text, not rounded.
    ages = [*map(str, range(7)), *[str(2**53 + 1)] * 4, *["1.5"] * 5]
    assert collection.obs_column("age").tolist() == [*ages, None, None]
    old = collection.obs_column("is_old")
    assert old.isna().tolist() == [True] * 7 + [False] * 9 + [True] * 2 and old[7] and not old[11]
    assert collection.obs["total_counts"].tolist() == collection.totals(np.arange(18)).tolist()
    with pytest.raises(InputError, match="no obs column 'patient': it has cell_id, .*store; name one of these"):
        collection.obs_column("patient")


def test_gene_table(collection: CellCollection, union: tuple) -> None:
    genes = collection.genes
    assert genes["gene_id"].tolist() == union[0]
    assert genes["species"].tolist() == ["mouse" if gene in MOUSE else "human" for gene in union[0]]
    assert genes["num_cells"].tolist() == (union[1] > 0).sum(0).tolist()
    first = {gene: name for name, genes, _ in reversed(MEMBERS) for gene in genes}
    assert genes["gene_name"].tolist() == [f"{gene[-3:]} of {first[gene]}" for gene in union[0]]


def test_stores_of_version_1_have_their_totals_in_obs(tmp_path: Path) -> None:
    dense = some_counts(5, 5, 4)
    old = write_store(tmp_path / "old", dense, HUMAN[:4], version=1, totals=np.arange(5.0) + 50)
    new = write_store(tmp_path / "new", dense, HUMAN[2:6])
    collection = CellCollection.open([new, old])
    assert collection.totals(np.array([9, 6, 0])).tolist() == [54.0, 51.0, dense[0].sum()]
    assert "num_cells" not in collection.genes


def test_tokens_are_those_of_each_store(folder: Path) -> None:
    collection = CellCollection.open([folder / "c.store", folder / "a.store"])
    genes = sorted(collection.gene_ids)
    random = np.random.default_rng(8)
    vocabulary = Vocabulary.from_genes(genes)
    medians = MedianTable(tuple(genes), random.random(len(genes)) + 0.5)
    ours = RankTokenizer(vocabulary, medians, collection.gene_ids, max_length=5)
    for i, member in enumerate(collection.members):
        theirs = RankTokenizer(vocabulary, medians, member.gene_ids, max_length=5)
        for cells in (np.arange(len(member)), np.array([1, 0, 1])):
            for a, b in zip(
                ours.tokenize(collection, cells + collection.starts[i]), theirs.tokenize(member, cells), strict=True
            ):
                assert np.array_equal(a, b)
    mixed = np.array([11, 2, 4, 8])
    tokens, lengths = ours.tokenize(collection, mixed)
    alone = [ours.tokenize(collection, mixed[k : k + 1])[0] for k in range(4)]
    assert np.array_equal(tokens, np.concatenate(alone)) and lengths.sum() == len(tokens)


def test_threads_read_the_same(folder: Path, union: tuple) -> None:
    collection = open_stores(folder)
    found: list[np.ndarray] = []
    cells = np.random.default_rng(0).integers(0, 18, 200)
    threads = [threading.Thread(target=lambda: found.append(collection.totals(cells))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(np.array_equal(totals, union[1][cells].sum(1) + 3) for totals in found)


def test_equal_lists_are_gone_through_once(tmp_path: Path) -> None:
    names = [write_store(tmp_path / f"{i}.store", some_counts(i, 2, 12), HUMAN) for i in range(40)]
    collection = CellCollection.open(names)
    assert collection.gene_maps == (None,) and collection.gene_ids == tuple(HUMAN)
    # A batch over all stores is one call of one kernel.
    assert len(collection.locate(np.arange(80))) == 1
    assert not any("genes" in vars(member) or "gene_ids" in vars(member) for member in collection.members)


def test_a_written_collection_opens_again(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "data")
    paths = [tmp_path / "data" / name for name in ("b.store", "a.store")]
    CellCollection.open(paths, weights={"a.store": 3, str(paths[0]): 0.5}).write(tmp_path / "ab.json")
    manifest = json.loads((tmp_path / "ab.json").read_text())
    assert manifest["format"] == "celltron-collection" and manifest["version"] == 1
    assert [store["path"] for store in manifest["stores"]] == ["data/b.store", "data/a.store"]
    shutil.move(tmp_path / "data", tmp_path / "moved" / "data")
    shutil.move(tmp_path / "ab.json", tmp_path / "moved" / "ab.json")
    collection = CellCollection.open(tmp_path / "moved" / "ab.json")
    assert collection.names == ("b.store", "a.store") and collection.weights == (0.5, 3.0)
    assert collection.name == str(tmp_path / "moved" / "ab.json")
    assert CellCollection.open(tmp_path / "moved" / "ab.json", weights=[1, 2]).weights == (1.0, 2.0)
    fingerprints = [CellStore.open(folder / name).fingerprint for name in ("b.store", "a.store")]
    assert collection.fingerprint == hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest()


def test_a_changed_store_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    for name in ("a.store", "b.store"):
        shutil.copytree(folder / name, tmp_path / name)
    CellCollection.open([tmp_path / "a.store", tmp_path / "b.store"]).write(tmp_path / "ab.json")
    shutil.rmtree(tmp_path / "b.store")
    shutil.copytree(folder / "c.store", tmp_path / "b.store")
    with pytest.raises(InputError, match=r"ab.json names .*b.store, which holds something else"):
        CellCollection.open(tmp_path / "ab.json")
    shutil.rmtree(tmp_path / "b.store")
    with pytest.raises(InputError, match=r"b.store does not exist"):
        CellCollection.open(tmp_path / "ab.json")


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda m: m.update(format="x"), "no celltron-collection file"),
        (lambda m: m.update(version=2), "version 2, wanted 1"),
        (lambda m: m.update(version=True), "version True, wanted 1"),
        (lambda m: m.update(stores=[]), "damaged: each of its stores"),
        (lambda m: m["stores"][0].update(path=5), "damaged: each of its stores"),
        (lambda m: m["stores"][0].update(path="a\0"), "damaged: each of its stores"),
        (lambda m: m["stores"][0].update(fingerprint="0"), "damaged: each of its stores"),
        (lambda m: m["stores"][0].update(weight=-1), "damaged: each of its stores"),
        (lambda m: m["stores"][0].update(weight=float("nan")), "damaged: each of its stores"),
        (lambda m: m["stores"][0].update(weight=10**400), "damaged: each of its stores"),
        (lambda m: m["stores"][0].update(weight=2), "some of its stores have no weight"),
        (lambda m: m["stores"][0].pop("weight"), "damaged: each of its stores"),
        (lambda m: m["stores"].append(m["stores"][0]), "comes twice in a collection"),
    ],
)
def test_a_changed_file_is_refused(
    collection: CellCollection, tmp_path: Path, change: Callable[[dict[str, Any]], None], pattern: str
) -> None:
    collection.write(tmp_path / "c.json")
    manifest = json.loads((tmp_path / "c.json").read_text())
    change(manifest)
    (tmp_path / "c.json").write_text(json.dumps(seal_manifest(manifest)))
    with pytest.raises(InputError, match=pattern):
        CellCollection.open(tmp_path / "c.json")


def test_a_weight_is_under_the_checksum(folder: Path, tmp_path: Path) -> None:
    CellCollection.open([folder / "a.store", folder / "b.store"], weights=[1.5, 2]).write(tmp_path / "c.json")
    text = (tmp_path / "c.json").read_text()
    for changed in (text.replace("1.5", "7.5"), text.replace("manifest_sha256", "sha256")):
        (tmp_path / "c.json").write_text(changed)
        with pytest.raises(InputError, match=r"c.json is damaged: it does not fit its own checksum"):
            CellCollection.open(tmp_path / "c.json")
    (tmp_path / "c.json").write_text(json.dumps(json.loads(text)))
    assert CellCollection.open(tmp_path / "c.json").weights == (1.5, 2.0)


def test_what_is_no_collection(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no collection at"):
        CellCollection.open(tmp_path / "none.json")
    for text in ("{", "[]", "\x00", "[" * 50_000):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(InputError, match=r"c.json is no celltron-collection file"):
            CellCollection.open(tmp_path / "c.json")
    with pytest.raises(InputError, match="at least one"):
        CellCollection.open([])
    with pytest.raises(InputError, match="is a collection itself"):
        CellCollection([CellCollection.open(folder / "a.store")])
    shutil.copytree(folder / "a.store", tmp_path / "copy")
    with pytest.raises(InputError, match="copy comes twice as .*a.store in a collection: give it once, and a larger"):
        CellCollection.open([folder / "a.store", tmp_path / "copy"])


@pytest.mark.parametrize("cell", [18, -1, 10**12])
def test_a_cell_out_of_range(collection: CellCollection, cell: int) -> None:
    for read in (collection.rows, collection.totals):
        with pytest.raises(CellIndexError, match=f"no cell {cell} in collection of 4 stores .*: .* 0 to 17"):
            read(np.array([0, cell]))


@pytest.mark.parametrize(
    ("weights", "pattern"),
    [
        ([1, 2, 3], "there are 3 weights for 4 stores"),
        ([1, 2, 3, -1], "the weight of store d.store is -1"),
        ([1, 2, 3, float("nan")], "the weight of store d.store is nan"),
        ([1, 2, 3, True], "the weight of store d.store is True"),
        ([1, 2, 3, "1"], "the weight of store d.store is '1'"),
        ([0, 0, 0, 0], "all stores are 0"),
        ({"a.store": 1}, "weights has none for store b.store"),
        ({"a.stor": 1}, "weights names 'a.stor', which is no store of the collection: try a.store"),
    ],
)
def test_weights_are_checked(folder: Path, weights: Any, pattern: str) -> None:
    with pytest.raises(InputError, match=pattern):
        CellCollection.open([folder / name for name, *_ in MEMBERS], weights=weights)


def test_counts_that_no_type_holds_together_are_refused(tmp_path: Path) -> None:
    large = write_store(tmp_path / "large", np.array([[2**60 + 1]], dtype=np.uint64), HUMAN[:1])
    part = write_store(tmp_path / "part", np.array([[0.5]], dtype=np.float32), HUMAN[:1])
    small = write_store(tmp_path / "small", np.array([[7]], dtype=np.uint8), HUMAN[:1])
    with pytest.raises(InputError, match="which no type holds"):
        CellCollection.open([large, part]).rows([0])
    assert CellCollection.open([small, large]).rows([1, 0]).counts.tolist() == [2**60 + 1, 7]


def test_damaged_members_are_named(folder: Path, tmp_path: Path) -> None:
    for name in ("a.store", "b.store"):
        shutil.copytree(folder / name, tmp_path / name)
    names = [tmp_path / "a.store", tmp_path / "b.store"]
    indices = tmp_path / "b.store" / "shards" / "00000" / "indices.bin"
    good = indices.read_bytes()
    indices.write_bytes(b"\xff" * len(good))
    with pytest.raises(InputError, match="is damaged: cell 7 names a gene beyond those it has; run celltron verify"):
        CellCollection.open(names).rows([0, 7])
    indices.write_bytes(good)
    indptr = tmp_path / "b.store" / "shards" / "00000" / "indptr.bin"
    indptr.write_bytes(b"\xff" * indptr.stat().st_size)
    with pytest.raises(InputError, match=r"b.store/shards/00000/indptr.bin is damaged"):
        CellCollection.open(names).locate(np.array([0, 8]))
    genes = tmp_path / "a.store" / "genes.parquet"
    genes.write_bytes(b"x" * genes.stat().st_size)
    with pytest.raises(InputError, match=r"a.store/genes.parquet is damaged"):
        CellCollection.open(names)


def test_a_gene_that_comes_twice_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "twice", some_counts(0, 2, 3), [HUMAN[0], HUMAN[1], HUMAN[0]])
    with pytest.raises(InputError, match="twice is damaged: wanted 3 different gene ids"):
        CellCollection.open(tmp_path / "twice")


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["/x/a", "/y/a", "/x/b"]) == ("x/a", "y/a", "b")
    assert short_names(["/p/x/a", "/q/x/a", "s3://p/y/a"]) == ("p/x/a", "q/x/a", "y/a")
    assert short_names(["/a", "a", "/b/a"]) == ("/a", "a", "/b/a") and short_names(["/"]) == ("/",)


def test_info_names_every_store(collection: CellCollection, folder: Path) -> None:
    text = collection.info()
    assert "18 cells x 12 genes (human, mouse)" in text and "c.store: 5 cells x 6 genes (mouse)" in text
    assert "weight" not in text and "weight 3" in CellCollection.open(folder / "a.store", weights=[3]).info()
    assert "18 cells x 12 genes" in repr(collection)


def test_more_stores_than_a_process_may_have_files(tmp_path: Path) -> None:
    names = [write_store(tmp_path / f"{i}.store", some_counts(i, 2, 12), HUMAN) for i in range(40)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        assert len(CellCollection.open(names).rows(np.arange(80)).indptr) == 81
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
