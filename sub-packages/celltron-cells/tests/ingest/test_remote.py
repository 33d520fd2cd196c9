"""Files behind addresses: a web server and an S3 server on this machine; only what is needed is fetched."""

import http.server
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import anndata
import fsspec
import numpy as np
import pytest
import scipy.sparse as sp

from celltron.cells.ingest import remote
from celltron.cells.ingest.open import expand_sources, open_source
from celltron.cells.ingest.remote import BlockReader, RemoteFile
from celltron.cells.ingest.source import SourceOptions
from celltron.core import InputError


class WebServer(http.server.ThreadingHTTPServer):
    """Serves a folder with ranges; ``log`` holds (method, path, bytes sent) of each answer.

    ``ranges`` False ignores ranges; the first ``failures`` range requests are answered with an error.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.ranges, self.failures = folder, True, 0
        self.log: list[tuple[str, str, int]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        """A client that has seen enough hangs up."""

    def sent(self) -> int:
        return sum(size for method, _, size in self.log if method == "GET")


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WebServer

    def do_HEAD(self) -> None:  # noqa: N802 - the library's name
        self.answer(with_body=False)

    def do_GET(self) -> None:  # noqa: N802 - the library's name
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        path = self.server.folder / self.path.lstrip("/")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if self.server.ranges else None
        if not path.is_file() or (wanted and self.server.failures):
            self.server.failures -= path.is_file()
            self.send_response(503 if path.is_file() else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", '"1"')
        self.end_headers()
        self.server.log.append((self.command, self.path, len(data) if with_body else 0))
        if with_body:
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebServer]:
    (tmp_path / "web").mkdir()
    with WebServer(tmp_path / "web") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, Any]]:
    """fsspec's options for an S3 server with the bucket ``cells``."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    storage = {"key": "a", "secret": "b", "endpoint_url": f"http://{host}:{port}"}
    fsspec.filesystem("s3", **storage).mkdir("cells")
    yield storage
    server.stop()


def open_at(spec: str, storage: dict[str, Any] | None = None, **options: Any) -> Any:
    return closing(open_source(spec, SourceOptions(storage=storage, **options)))


@pytest.fixture
def data(real: anndata.AnnData) -> anndata.AnnData:
    small = real[:150, :500].copy()
    small.X = sp.csr_matrix(small.X.astype(np.float32))
    small.layers["columns"] = sp.csc_matrix(small.X)
    small.layers["dense"] = small.X.toarray()
    return small


LAYERS = (None, "columns", "dense")


@pytest.mark.parametrize("compression", [None, "gzip", "lzf"])
def test_h5ad_over_http(web: WebServer, data, read_source, compression: str | None) -> None:  # type: ignore[no-untyped-def]
    data.write_h5ad(web.folder / "a.h5ad", compression=compression)
    for layer in LAYERS:
        with open_at(f"{web.address}/a.h5ad", layer=layer) as source:
            assert (read_source(source) != data.X).nnz == 0
            assert source.obs.index().to_pylist() == list(data.obs_names)
            assert source.identity() == {"bytes": (web.folder / "a.h5ad").stat().st_size, "changed": '"1"'}


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_only_the_beginning_of_a_long_file_is_fetched(web: WebServer, compression: str | None) -> None:
    """Opening it and looking at its head, or at some rows in the middle, takes some hundredths, or an eighth."""
    random = np.random.default_rng(0)
    columns = np.sort(random.integers(0, 2_000, (10_000, 200)), axis=1)
    values = random.integers(1, 2**24, columns.size).astype(np.float32)
    counts = sp.csr_matrix((values, columns.ravel(), np.arange(0, columns.size + 1, 200)), shape=(10_000, 2_000))
    path = web.folder / "a.h5ad"
    anndata.AnnData(counts).write_h5ad(path, compression=compression)
    with open_at(f"{web.address}/a.h5ad") as source:
        head = source.head(20_000)
        assert np.array_equal(head.values, counts.data[: len(head.values)]) and len(head.values) == 20_000
    assert 0 < web.sent() < path.stat().st_size / 10
    before = web.sent()
    with open_at(f"{web.address}/a.h5ad") as source:
        blocks = list(source.blocks(5_000, 5_100))
    assert np.array_equal(blocks[0].columns, counts[5_000:5_100].indices)
    assert web.sent() - before < path.stat().st_size / 8


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_zarr_over_http(web: WebServer, data, read_source, zarr_format: int) -> None:  # type: ignore[no-untyped-def]
    with anndata.settings.override(zarr_write_format=zarr_format):
        data.write_zarr(web.folder / "a.zarr")
    for layer in LAYERS:
        with open_at(f"{web.address}/a.zarr", layer=layer) as source:
            assert (read_source(source) != data.X).nnz == 0
            assert any(entry["bytes"] > 0 for entry in source.identity().values())
    (web.folder / "a.zarr" / "X" / "indices" / ("0" if zarr_format == 2 else "c/0")).unlink()
    with pytest.raises(InputError, match="a.zarr lacks its chunk X/indices"):
        with open_at(f"{web.address}/a.zarr") as source:
            read_source(source)


def test_s3(tmp_path: Path, s3: dict[str, Any], data, read_source) -> None:  # type: ignore[no-untyped-def]
    data.write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    data.write_zarr(tmp_path / "b.zarr")
    fs = fsspec.filesystem("s3", **s3)
    fs.put(str(tmp_path / "a.h5ad"), "cells/deep/a.h5ad")
    fs.put(str(tmp_path / "b.zarr"), "cells/deep/b.zarr", recursive=True)
    wanted = ["s3://cells/deep/a.h5ad", "s3://cells/deep/b.zarr"]
    assert expand_sources(["s3://cells", "s3://cells/*/a.h5ad"], s3) == wanted
    fs.copy("cells/deep/b.zarr", "cells/otherwise", recursive=True)
    for spec in [*wanted, "s3://cells/otherwise"]:
        for layer in LAYERS:
            with open_at(spec, s3, layer=layer) as source:
                assert (read_source(source) != data.X).nnz == 0
                assert source.identity()["bytes"] > 0
    for spec, pattern in (
        ("s3://cells/none.h5ad", "nothing at s3://cells/none.h5ad: check the address"),
        ("s3://cells/none.zarr", "s3://cells/none.zarr holds no zarr group"),
        ("s3://cells/deep", "s3://cells/deep is a folder, but none of counts: wanted an .h5ad"),
    ):
        with pytest.raises(InputError, match=pattern):
            open_at(spec, s3)


@pytest.mark.parametrize("name", ["a.h5ad", "a.zarr"])
def test_memory(data, read_source, tmp_path: Path, name: str) -> None:  # type: ignore[no-untyped-def]
    fs = fsspec.filesystem("memory")
    getattr(data, "write_zarr" if name.endswith("zarr") else "write_h5ad")(tmp_path / name)
    fs.put(str(tmp_path / name), f"/here/{name}", recursive=name.endswith("zarr"))
    try:
        assert expand_sources(["memory://here"]) == [f"memory:///here/{name}"]
        with open_at(f"memory:///here/{name}") as source:
            assert (read_source(source) != data.X).nnz == 0
    finally:
        fs.rm("/here", recursive=True)


def test_file_address(data, read_source, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data.write_h5ad(tmp_path / "a.h5ad")
    with open_at(f"file://{tmp_path}/a.h5ad") as source:
        assert (read_source(source) != data.X).nnz == 0


def test_a_server_without_ranges_is_refused_and_not_emptied(web: WebServer, data) -> None:  # type: ignore[no-untyped-def]
    data.write_h5ad(web.folder / "a.h5ad")
    web.ranges = False
    with pytest.raises(InputError, match="a.h5ad does not answer range requests: download it and name the copy"):
        open_at(f"{web.address}/a.h5ad")


def test_passing_failures_are_tried_again(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.001)
    (web.folder / "a").write_bytes(bytes(range(200)))
    file = RemoteFile(f"{web.address}/a", None)
    web.failures = 2
    assert file.read_many([(3, 4)])[0].tolist() == [3, 4, 5, 6]
    web.failures = 100
    with pytest.raises(InputError, match=r"/a cannot be reached .*503"):
        file.read_many([(3, 4)])


def test_ranges_close_together_are_fetched_as_one(web: WebServer) -> None:
    content = np.random.default_rng(0).integers(0, 256, 2**18, dtype=np.uint8)
    (web.folder / "a").write_bytes(content.tobytes())
    file = RemoteFile(f"{web.address}/a", None)
    web.log.clear()
    ranges = [(0, 10), (10, 0), (20, 1000), (2**17, 5), (2**17 + 5, 7)]
    for (offset, length), read in zip(ranges, file.read_many(ranges), strict=True):
        assert np.array_equal(read, content[offset : offset + length]) and read.flags.writeable
    assert len(web.log) == 2
    with pytest.raises(InputError, match="names bytes 262140 to 262150 of 262144"):
        file.read_many([(2**18 - 4, 10)])


def test_blocks_are_kept_and_let_go(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 64)
    monkeypatch.setattr(remote, "KEPT_BLOCKS", 3)
    content = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8).tobytes()
    (web.folder / "a").write_bytes(content)
    reader = BlockReader(RemoteFile(f"{web.address}/a", None))
    web.log.clear()
    for offset, length in ((0, 10), (5, 50), (60, 10), (0, 64), (990, 100), (1000, 5), (100, 700)):
        reader.seek(offset)
        assert reader.read(length) == content[offset : offset + length]
        assert reader.tell() == min(offset + length, max(offset, 1000))
    assert len(reader._blocks) == 3


def test_a_file_read_from_front_to_back_is_fetched_in_ever_larger_parts(web: WebServer, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(remote, "BLOCK_BYTES", 10)
    (web.folder / "a").write_bytes(bytes(range(250)))
    reader = BlockReader(RemoteFile(f"{web.address}/a", None))
    web.log.clear()
    assert b"".join(reader.read(10) for _ in range(25)) == bytes(range(250))
    assert [size for _, _, size in web.log] == [10, 20, 40, 80, 100]


def test_addresses_that_lead_nowhere(web: WebServer) -> None:
    with pytest.raises(InputError, match="there is nothing at http://.*/none.h5ad: check the address"):
        open_at(f"{web.address}/none.h5ad")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(InputError, match=f"http://127.0.0.1:{port}/a.h5ad cannot be reached .*: check the address"):
        open_at(f"http://127.0.0.1:{port}/a.h5ad")
    (web.folder / "text.h5ad").write_bytes(b"no HDF5" * 1000)
    with pytest.raises(InputError, match="text.h5ad is not an .h5ad file"):
        open_at(f"{web.address}/text.h5ad")
    with pytest.raises(InputError, match="unknown scheme 'ftps3'"):
        open_at("ftps3://a/b.h5ad")


def test_a_cut_file_is_refused(web: WebServer, data) -> None:  # type: ignore[no-untyped-def]
    data.write_h5ad(web.folder / "a.h5ad", compression="gzip")
    whole = (web.folder / "a.h5ad").read_bytes()
    for kept in (len(whole) // 2, len(whole) - 10):
        (web.folder / "a.h5ad").write_bytes(whole[:kept])
        with pytest.raises(InputError, match="a.h5ad is truncated or damaged"):
            open_at(f"{web.address}/a.h5ad")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise ImportError("Install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    for scheme, extra in (("gs", "gcs"), ("s3", "s3"), ("az", "azure"), ("https", "http")):
        with pytest.raises(InputError, match=re.escape(f"pip install 'celltron-cells[{extra}]'")):
            open_at(f"{scheme}://bucket/a.h5ad")
