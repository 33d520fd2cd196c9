"""The verbs that deal with cells, and training on what they make: caches, tar shards, several stores, other orders."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

from celltron.cells import CellStore, RankTokenizer, TarStore, TokenCache, convert
from celltron.core import load_published_geneformer

Celltron = Callable[..., Any]


def succeed(ended: Any) -> str:
    assert ended.code == 0, ended.stderr
    assert not ended.left_running
    return str(ended.stdout)


@pytest.fixture
def train(celltron: Celltron, tiny_config: Path, tmp_path: Path, read_metrics: Any) -> Callable[..., list[float]]:
    """Trains four steps and gives their losses."""

    def run(name: str, *words: object) -> list[float]:
        succeed(celltron("train", "--config", tiny_config, "--out", tmp_path / f"run {name}", *words))
        return [line["loss"] for line in read_metrics(tmp_path / f"run {name}") if "loss" in line]

    return run


@pytest.fixture
def store(tiny_store: Path, tmp_path: Path) -> Path:
    """A store that may be changed."""
    return Path(shutil.copytree(tiny_store, tmp_path / "a.store"))


def test_append(celltron: Celltron, store: Path, tiny_cells: anndata.AnnData, tmp_path: Path) -> None:
    more = tiny_cells[:20].copy()
    more.obs_names = [f"more{i}" for i in range(20)]
    more.write_h5ad(tmp_path / "more.h5ad")
    assert "20 cells added to 97" in succeed(celltron("append", store, tmp_path / "more.h5ad"))
    appended = CellStore.open(store)
    assert len(appended) == 117 and np.array_equal(appended[97][1], appended[0][1])
    succeed(celltron("verify", store))
    assert "more.h5ad" in succeed(celltron("info", store))


def test_every_bad_file_is_listed(celltron: Celltron, store: Path) -> None:
    (store / "genes.parquet").unlink()
    counts = store / "shards" / "00000" / "counts.bin"
    counts.write_bytes(counts.read_bytes()[:-1] + b"\xff")
    ended = celltron("verify", store, "--workers", 2)
    assert ended.code == 2 and len(ended.stdout.splitlines()) == 2 and ended.stderr.count("\n") == 1
    for path in (store / "genes.parquet", counts):
        assert f"{path}: " in ended.stdout
    assert "; 2 of 17 files are bad (also shards/00000/counts.bin)" in ended.stderr


def test_medians_in_another_scratch_folder(celltron: Celltron, store: Path, tmp_path: Path) -> None:
    succeed(celltron("medians", store, "--out", tmp_path / "a.json"))
    (tmp_path / "scratch").mkdir()
    succeed(celltron("medians", store, "--out", tmp_path / "b.json", "--scratch", tmp_path / "scratch"))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    ended = celltron("medians", store, "--out", tmp_path / "c.json", "--scratch", tmp_path / "none")
    assert ended.code == 2 and "none" in ended.stderr and not (tmp_path / "c.json").exists()


def test_tokenize(celltron: Celltron, store: Path, tmp_path: Path) -> None:
    printed = succeed(celltron("tokenize", store, "--vocabulary", "gc30M", "--max-length", 32))
    (cache,) = Path(f"{store}.tokens").iterdir()
    assert str(cache) in printed and "97 cells" in printed
    vocabulary, medians = load_published_geneformer("gc30M")
    opened = CellStore.open(store)
    tokenizer = RankTokenizer(vocabulary, medians, opened.gene_ids, max_length=32)
    assert TokenCache.open(cache, opened, tokenizer).num_tokens == tokenizer.tokenize(opened, np.arange(97))[1].sum()
    assert "celltron-tokens" in succeed(celltron("info", cache))
    succeed(celltron("verify", cache))


def test_training_from_the_cache_is_the_same(train: Callable[..., list[float]], store: Path) -> None:
    plain = train("plain", "--data", store)
    assert train("cached", "--data", store, "data.cache=true") == plain and len(plain) == 4
    (cache,) = Path(f"{store}.tokens").iterdir()
    changed = cache.stat().st_mtime_ns
    assert train("again", "--data", store, "data.cache=true") == plain and cache.stat().st_mtime_ns == changed


def test_training_from_tar_shards(
    celltron: Celltron, train: Callable[..., list[float]], store: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    assert "97 cells" in succeed(celltron("shard", store, "--out", shards, "--block-cells", 10))
    succeed(celltron("verify", shards))
    assert "97 cells" in succeed(celltron("info", shards))
    blocks = "data.order.block_cells=10", "data.order.window_blocks=2"
    assert train("shards", "--data", shards, blocks[1]) == train("store", "--data", store, *blocks)
    with TarStore.open(shards) as opened:
        assert len(opened) == 97


def test_training_on_several_stores(
    train: Callable[..., list[float]], store: Path, tiny_cells: anndata.AnnData, tmp_path: Path
) -> None:
    other = tiny_cells[:30, 40:].copy()
    other.obs_names = [f"other{i}" for i in range(30)]
    other.write_h5ad(tmp_path / "b.h5ad")
    convert([tmp_path / "b.h5ad"], tmp_path / "b.store")
    losses = train("both", "--data", store, tmp_path / "b.store", "data.validation_by=store")
    assert len(losses) == 4 and np.isfinite(losses).all()


@pytest.mark.parametrize(
    "words", [["data.order.balance_by=donor"], ["data.order.length_window=2"], ["data.test_fraction=0.2"]]
)
def test_training_in_other_orders(train: Callable[..., list[float]], store: Path, words: list[str]) -> None:
    losses = train("other", "--data", store, *words)
    assert len(losses) == 4 and np.isfinite(losses).all()
    assert losses != train("plain", "--data", store)


def test_what_cannot_be(celltron: Celltron, tiny_config: Path, store: Path, tmp_path: Path) -> None:
    def refusal(*words: object) -> str:
        ended = celltron(*words)
        assert ended.code == 2 and ended.stderr.count("\n") == 1, ended.stderr
        return str(ended.stderr)

    train = ["train", "--config", tiny_config, "--data", store, "--out", tmp_path / "run"]
    assert "no collection" in refusal(*train, "data.order.use_store_weights=true")
    assert "nothing" in refusal(*train, "data.order.balance_by=nothing")
    assert "exclude each other" in refusal(*train, "data.order.balance_by=donor", "data.order.block_cells=5")
    assert "KEY=VALUE" in refusal("medians", store, "--out", tmp_path / "m.json", "--storage", "anon")
    assert "none.h5ad" in refusal("append", store, tmp_path / "none.h5ad")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "run") == ["a.store"]
