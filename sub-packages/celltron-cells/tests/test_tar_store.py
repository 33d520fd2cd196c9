"""Tar shards read over real protocols: the store's cells, order and masks, whatever the network does."""

import http.server
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer

from celltron.cells import CellIndexError, CellStore, Loader, LoaderState, Masking, RankTokenizer
from celltron.cells import tar_files as tar_files_module
from celltron.cells.block_order import BlockOrder
from celltron.cells.memory import copy_rows
from celltron.cells.tar_store import TarStore
from celltron.cells.tar_writer import shard_store
from celltron.core import InputError, load_published_geneformer

BLOCK_CELLS = 16


class Server(http.server.ThreadingHTTPServer):
    """Serves the files of a folder in ranges, with the faults that a test asks for."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[tuple[str, str]] = []
        self.drop_every = 0
        """Close the connection instead of every so many-th answer; with `cut`, in the middle of it."""
        self.cut = False
        self.fail: dict[str, int] = {}
        """Statuses to answer with, by file."""
        self.ignore_ranges = False
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/a.tars"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        server, file = self.server, self.path.removeprefix("/a.tars/").partition("?")[0]
        wanted = self.headers.get("Range", "")
        with server.lock:
            server.requests.append((self.path, wanted))
            drop = server.drop_every and len(server.requests) % server.drop_every == 0
        if drop and not server.cut:
            self.close_connection = True
            return
        status = server.fail.get(file, 200 if (server.folder / file).is_file() else 404)
        body = (server.folder / file).read_bytes() if status == 200 else b""
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
        self.send_response(206 if match and status == 200 and not server.ignore_ranges else status)
        if match and status == 200 and not server.ignore_ranges:
            first, last = int(match[1]), min(int(match[2]), len(body) - 1)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(body)}")
            body = body[first : last + 1]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body[: len(body) // 2] if drop else body)
            self.close_connection = bool(drop)

    def log_message(self, *unused: Any) -> None:
        pass


@pytest.fixture(scope="module")
def folder(store: CellStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of the tests as tar shards."""
    out = tmp_path_factory.mktemp("shards") / "a.tars"
    shard_store(store, out, block_cells=BLOCK_CELLS, shard_bytes=60_000)
    return out


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def s3(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The address of the shards in a bucket, and the options to reach it with."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    storage = {
        "key": "a",
        "secret": "b",
        "client_kwargs": {"endpoint_url": f"http://{host}:{port}", "region_name": "eu-west-1"},
    }
    fs = fsspec.filesystem("s3", **storage)
    fs.mkdir("tars")
    fs.put(str(folder), "tars/a.tars", recursive=True)
    yield "s3://tars/a.tars", storage
    moto.stop()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_files_module, "FIRST_WAIT_SECONDS", 0.001)


@pytest.fixture(params=["folder", "file", "memory", "http", "s3"])
def opened(request: pytest.FixtureRequest, folder: Path) -> Iterator[TarStore]:
    """The shards, opened over each protocol."""
    name, storage = str(folder), None
    if request.param == "file":
        name = f"file://{folder}"
    if request.param == "memory":
        fsspec.filesystem("memory").put(str(folder), "/bucket/a.tars", recursive=True)
        name = "memory://bucket/a.tars"
    if request.param == "http":
        name = request.getfixturevalue("server").address
    if request.param == "s3":
        name, storage = request.getfixturevalue("s3")
    with TarStore.open(name, storage=storage) as shards:
        yield shards


@cache
def tokenizer_of(gene_ids: tuple[str, ...]) -> RankTokenizer:
    vocabulary, medians = load_published_geneformer("gc95M")
    return RankTokenizer(vocabulary, medians, gene_ids, max_length=256)


def loader_of(reader: CellStore | TarStore, state: LoaderState | None = None, **more: Any) -> Loader:
    order = BlockOrder(len(reader), 5, block_cells=BLOCK_CELLS, window_blocks=4)
    if isinstance(reader, TarStore):
        order = BlockOrder(len(reader), 5, bounds=reader.disk_runs, window_blocks=4)
    settings = {"cells_per_batch": 30, "epochs": 2, "masking": Masking()} | more
    return Loader(reader, tokenizer_of(reader.gene_ids), seed=5, order=order, state=state, **settings)


def assert_same_batches(found: list[Any], wanted: list[Any]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        for name in ("tokens", "labels", "lengths", "cells", "epochs"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_the_same_cells(opened: TarStore, store: CellStore) -> None:
    cells = np.random.default_rng(0).integers(0, 400, 700)
    for found, wanted in zip(opened.rows(cells), store.rows(cells), strict=True):
        assert np.array_equal(found, wanted)
    assert np.array_equal(opened.totals(cells), store.totals(cells))
    assert (len(opened), opened.num_genes, opened.nnz) == (400, 600, store.nnz)
    assert opened.gene_ids == store.gene_ids
    assert opened.genes_fingerprint == store.genes_fingerprint
    assert opened.fingerprint == store.fingerprint
    pd.testing.assert_frame_equal(opened.genes, store.genes)
    pd.testing.assert_series_equal(opened.obs_column("donor"), store.obs_column("donor"))
    pd.testing.assert_series_equal(opened.obs_column("donor"), store.obs_column("donor"))  # kept
    assert opened.disk_runs.tolist() == list(range(0, 401, BLOCK_CELLS))
    assert opened.blocks_of(np.array([0, 15, 16, 399])).tolist() == [0, 0, 1, 24]


def test_the_same_batches_and_going_on_anywhere(opened: TarStore, store: CellStore) -> None:
    wanted = list(loader_of(store))
    with loader_of(opened) as loader:
        found, states = [], []
        for batch in loader:
            found.append(batch)
            states.append(loader.state)
    assert_same_batches(found, wanted)
    assert sorted(np.concatenate([b.cells for b in found[: 400 // 30 + 1]])[:400]) == list(range(400))
    for i in (0, 12, 13, 20):
        with loader_of(opened, state=states[i], prefetch=0) as loader:
            assert_same_batches([next(loader), next(loader)], wanted[i + 1 : i + 3])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batches(folder: Path, store: CellStore, world_size: int) -> None:
    wanted = list(loader_of(store))
    with TarStore.open(folder, cache_bytes=50_000) as shards:
        parts = [list(loader_of(shards, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for i, batch in enumerate(wanted):
        for name in ("tokens", "labels", "cells"):
            assert np.array_equal(np.concatenate([getattr(p[i], name) for p in parts]), getattr(batch, name))


@settings(max_examples=30, deadline=None)
@given(cells=st.lists(st.integers(0, 399), max_size=30), cache_bytes=st.sampled_from([0, 20_000, 10**9]))
def test_any_cells_whatever_is_held(folder: Path, counts: np.ndarray, cells: list[int], cache_bytes: int) -> None:
    with TarStore.open(folder, cache_bytes=cache_bytes, fetchers=2) as shards:
        indptr, gene_index, values = shards.rows(cells)
        assert shards.cached_bytes <= cache_bytes
        assert np.array_equal(shards.totals(np.array(cells, dtype=np.int64)), counts[cells].sum(1))
    for k, cell in enumerate(cells):
        part = slice(indptr[k], indptr[k + 1])
        assert np.array_equal(gene_index[part], np.flatnonzero(counts[cell]))
        assert np.array_equal(values[part], counts[cell][counts[cell] > 0])


def test_what_was_located_outlives_the_cache(folder: Path, store: CellStore) -> None:
    shards = TarStore.open(folder, cache_bytes=0)
    cells = np.arange(400)
    located = shards.locate(cells)
    assert {part.count_dtype for part in located} > {"uint8"} and len(located) > 1
    assert sorted(np.concatenate([part.slots for part in located])) == list(range(400))
    shards.close()
    del shards
    assert np.array_equal(copy_rows(located, 400, "uint16", "uint32").counts, store.rows(cells).counts)


def test_threads_fetch_each_block_once(server: Server, store: CellStore) -> None:
    with TarStore.open(server.address) as shards:
        server.requests.clear()
        cells = [np.random.default_rng(seed).permutation(400) for seed in range(6)]
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(shards.rows, cells))
        ranges = [request for request in server.requests if ".tar" in request[0].removeprefix("/a.tars")]
        assert len(ranges) == len(set(ranges)) == shards.num_blocks
    for rows, order in zip(found, cells, strict=True):
        assert np.array_equal(rows.counts, store.rows(order).counts)


def test_prefetch(server: Server) -> None:
    with TarStore.open(server.address) as shards:
        shards.prefetch(np.array([3, 4]))
        shards.rows([3 * BLOCK_CELLS, 4 * BLOCK_CELLS])
        assert shards.cached_bytes == int(shards.blocks.length[[3, 4]].sum())


def test_cells_that_are_not_there(folder: Path) -> None:
    with TarStore.open(folder) as shards:
        with pytest.raises(CellIndexError, match="no cell 400 in .*a.tars: its cells are numbered 0 to 399"):
            shards.rows([400])
        with pytest.raises(InputError, match="has no obs column 'patient': it has cell_id"):
            shards.obs_column("patient")
        assert repr(shards).endswith("a.tars', 400 cells x 600 genes)")
        assert "25 blocks of 16 cells" in shards.info() and "a.store" in shards.info()
    with pytest.raises(InputError, match="closed"):
        shards.rows([0])
    for wrong in ({"cache_bytes": -1}, {"fetchers": 0}):
        with pytest.raises(InputError, match="wanted"):
            TarStore.open(folder, **wrong)


@pytest.mark.parametrize("cut", [False, True])
def test_a_server_that_drops_connections(server: Server, store: CellStore, cut: bool) -> None:
    server.drop_every, server.cut = 3, cut
    with TarStore.open(server.address, fetchers=3) as shards:
        assert np.array_equal(shards.rows(np.arange(400)).counts, store.rows(np.arange(400)).counts)
        pd.testing.assert_series_equal(shards.obs_column("age"), store.obs_column("age"))


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_never_recovers(server: Server, status: int) -> None:
    with TarStore.open(server.address) as shards:
        server.fail["shard-000001.tar"] = status
        first = int(np.searchsorted(shards.blocks.tar, 1))
        server.requests.clear()
        with pytest.raises(InputError, match=rf"shard-000001.tar cannot be reached \({status}"):
            shards.rows([first * BLOCK_CELLS])
        assert len(server.requests) == tar_files_module.READ_ATTEMPTS
        server.fail.clear()
        assert len(shards.rows([first * BLOCK_CELLS]).indptr) == 2


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (404, "there is nothing at http://127.*shard-000001.tar: check the address"),
        (403, "shard-000001.tar may not be read with these credentials"),
        (401, "shard-000001.tar may not be read with these credentials"),
    ],
)
def test_a_server_that_refuses(server: Server, status: int, words: str) -> None:
    shards = TarStore.open(server.address)
    server.fail["shard-000001.tar"] = status
    server.requests.clear()
    with pytest.raises(InputError, match=words):
        shards.rows(np.arange(400))
    assert len([path for path, _ in server.requests if "shard-000001" in path]) <= np.sum(shards.blocks.tar == 1)
    shards.close()
    with pytest.raises(InputError, match=words):
        TarStore.open(server.address)
    server.fail["manifest.json"] = status
    with pytest.raises(InputError, match=words.replace("shard-000001.tar", "manifest.json")):
        TarStore.open(server.address)


def test_a_server_that_ignores_ranges(server: Server) -> None:
    server.ignore_ranges = True
    with pytest.raises(InputError, match="does not answer range requests: download the shards"):
        TarStore.open(server.address)
    assert not [path for path, asked in server.requests if asked and path.endswith(".tar")]


def test_nobody_listens() -> None:
    with pytest.raises(InputError, match=r"http://127.0.0.1:9/x/manifest.json cannot be reached"):
        TarStore.open("http://127.0.0.1:9/x")


def test_a_secret_in_the_address_is_sent_and_not_told(server: Server) -> None:
    with TarStore.open(server.address + "?sig=s3cret") as shards:
        shards.rows([0])
        assert all(path.endswith("?sig=s3cret") for path, _ in server.requests)
        server.fail["shard-000001.tar"] = 403
        with pytest.raises(InputError) as caught:
            shards.rows(np.arange(400))
        assert "s3cret" not in str(caught.value) + shards.name + shards.info()


def test_missing_things_in_a_bucket(s3: tuple[str, dict[str, Any]], folder: Path) -> None:
    address, storage = s3
    with pytest.raises(InputError, match="there is nothing at s3://tars/b.tars/manifest.json"):
        TarStore.open("s3://tars/b.tars", storage=storage)
    fs = fsspec.filesystem("s3", **storage)
    fs.put(str(folder), "tars/c.tars", recursive=True)
    with TarStore.open("s3://tars/c.tars", storage=storage) as shards:
        fs.rm("tars/c.tars/shard-000002.tar")
        with pytest.raises(InputError, match="there is nothing at s3://tars/c.tars/shard-000002.tar"):
            shards.rows(np.arange(400))
    with pytest.raises(InputError, match="s3://tars/c.tars/shard-000002.tar is missing"):
        TarStore.open("s3://tars/c.tars", storage=storage)


def test_a_protocol_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match=r"gs://bucket/a.tars needs .*pip install 'celltron-cells\[gcs\]'"):
        TarStore.open("gs://bucket/a.tars")
    with pytest.raises(InputError, match="unknown scheme 'nowhere'"):
        TarStore.open("nowhere://bucket/a.tars")


def test_forked_processes_read(server: Server, store: CellStore) -> None:
    with TarStore.open(server.address) as shards:
        wanted = store.rows(np.arange(400)).counts
        assert np.array_equal(shards.rows(np.arange(400)).counts, wanted)
        pids = []
        for _ in range(2):
            pids.append(os.fork())
            if pids[-1] == 0:
                code = 1
                try:
                    code = int(not np.array_equal(shards.rows(np.arange(400)).counts, wanted))
                finally:
                    os._exit(code)
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]


def test_no_wrong_number_from_a_file_that_changed(server: Server, folder: Path, tmp_path: Path) -> None:
    """A tar that was replaced after opening: its blocks do not fit the list that was read."""
    shutil.copytree(folder, tmp_path / "a.tars")
    server.folder = tmp_path / "a.tars"
    with TarStore.open(server.address) as shards:
        tar = tmp_path / "a.tars" / "shard-000000.tar"
        tar.write_bytes((folder / "shard-000001.tar").read_bytes().ljust(tar.stat().st_size, b"\0"))
        with pytest.raises(InputError, match=r"shard-000000.tar, block 0 \(cells 0 to 15, at byte 0\) does not fit"):
            shards.rows([0])
