"""The ranked cache: the tokeniser's own tokens, refused when stale or damaged, built once by whoever comes first."""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from celltron.cells import CellStore, Loader, RankTokenizer, build_token_cache, token_cache
from celltron.cells.token_cache import TokenCache, default_cache_path
from celltron.cells.token_rows import copy_tokens
from celltron.core import InputError, MedianTable, Vocabulary, read_manifest, write_artefact


@pytest.fixture(autouse=True)
def small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs and pieces so small that 400 cells have several."""
    monkeypatch.setattr(token_cache, "RUN_CELLS", 150)
    monkeypatch.setattr(token_cache, "PIECE_CELLS", 40)


@pytest.fixture
def tokenizer(store: CellStore) -> RankTokenizer:
    return RankTokenizer.from_store(store, max_length=64)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("with_cls_eos", [False, True])
def test_a_read_is_what_the_tokeniser_gives(store: CellStore, tmp_path: Path, with_cls_eos: bool) -> None:
    vocabulary = Vocabulary.from_genes(store.gene_ids, with_cls_eos=with_cls_eos)
    tokenizer = RankTokenizer.from_store(store, vocabulary=vocabulary, max_length=64)
    cache = build_token_cache(store, tokenizer, tmp_path / "cache")
    cells = np.random.default_rng(0).integers(0, len(store), 700)
    tokens, lengths = tokenizer.tokenize(store, cells)
    rows = cache.encode(store, cells)
    assert cache.dtype == rows.dtype == "uint16"
    assert np.array_equal(rows.lengths, lengths) and np.array_equal(copy_tokens(rows), tokens)
    assert cache.num_tokens == tokenizer.tokenize(store, np.arange(len(store)))[1].sum()


def test_bytes_do_not_depend_on_workers(store: CellStore, tokenizer: RankTokenizer, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    build_token_cache(store, tokenizer, tmp_path / "1", workers=1, progress=lambda *done: seen.append(done))
    build_token_cache(store, tokenizer, tmp_path / "4", workers=4)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "4")
    assert seen[-1] == (400, 400) and seen == sorted(seen)


def test_wide_vocabularies_take_wide_tokens(store: CellStore, tmp_path: Path) -> None:
    genes = [*(f"ENSG{i:011d}" for i in range(70_000)), *store.gene_ids]
    vocabulary = Vocabulary.from_genes(list(dict.fromkeys(genes)))
    tokenizer = RankTokenizer.from_store(store, vocabulary=vocabulary, max_length=64)
    cache = build_token_cache(store, tokenizer, tmp_path / "cache")
    assert cache.dtype == "uint32"
    assert copy_tokens(cache.encode(store, np.arange(9))).tolist() == tokenizer.tokenize(store, range(9))[0].tolist()


def test_batches_from_the_cache_are_the_same(store: CellStore, tokenizer: RankTokenizer, tmp_path: Path) -> None:
    def batches(cache: bool | Path) -> list[tuple[bytes, ...]]:
        with Loader(store, tokenizer, cells_per_batch=7, seed=3, epochs=2, cache=cache) as loader:
            return [tuple(a.tobytes() for a in (b.tokens, b.labels, b.lengths, b.cells)) for b in loader]

    assert batches(tmp_path / "cache") == batches(False) == batches(tmp_path / "cache")
    assert len(batches(False)) == 115


def test_true_keeps_it_beside_the_store(store: CellStore, tokenizer: RankTokenizer, tmp_path: Path) -> None:
    shutil.copytree(store.path, tmp_path / "a.store")
    copied = CellStore.open(tmp_path / "a.store")
    loader = Loader(copied, tokenizer, cells_per_batch=7, seed=3, cache=True)
    assert loader.cache is not None
    assert loader.cache.path == default_cache_path(copied, tokenizer) == next((tmp_path / "a.store.tokens").iterdir())


def test_several_at_once_build_it_once(
    store: CellStore, tokenizer: RankTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "POLL_SECONDS", 0.01)
    built = []
    build = token_cache.build_token_cache

    def counted(*arguments: object, **keywords: object) -> TokenCache:
        cache = build(*arguments, **keywords)  # type: ignore[arg-type]
        built.append(cache)
        return cache

    monkeypatch.setattr(token_cache, "build_token_cache", counted)
    found: list[TokenCache] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(token_cache.open_or_build_cache(store, tokenizer, tmp_path / "cache"))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(built) == 1


def test_what_is_stale_is_refused(store: CellStore, tokenizer: RankTokenizer, counts, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "cache"
    build_token_cache(store, tokenizer, out)
    with pytest.raises(InputError, match=r"is stale: its tokens were made with another max_length; remove it"):
        TokenCache.open(out, store, RankTokenizer.from_store(store, max_length=65))
    medians = MedianTable(list(store.gene_ids), np.full(store.num_genes, 2.0))
    with pytest.raises(InputError, match=r"is stale: .* another medians"):
        Loader(
            store, RankTokenizer.from_store(store, medians=medians, max_length=64), cells_per_batch=7, seed=0, cache=out
        )
    manifest = read_manifest(out, format=token_cache.FORMAT, versions={1})
    kept = {key: manifest[key] for key in ("cells", "tokens", "dtype", "runs", "tokenizer")}
    with write_artefact(tmp_path / "other", format=token_cache.FORMAT, version=1) as artefact:
        shutil.copytree(out / "runs", artefact.folder / "runs")
        artefact.meta |= kept | {"store": "of another"}
    with pytest.raises(InputError, match=r"other holds tokens of another store than .*\.store: remove it"):
        TokenCache.open(tmp_path / "other", store, tokenizer)


def test_a_damaged_cache_is_refused(store: CellStore, tokenizer: RankTokenizer, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    build_token_cache(store, tokenizer, out)
    for name in ("runs/00001.tokens.bin", "runs/00002.ends.bin", "manifest.json"):
        path = out / name
        good = path.read_bytes()
        path.write_bytes(good[:-3])
        with pytest.raises(InputError, match=str(path)):
            TokenCache.open(out, store, tokenizer)
        if name != "manifest.json":
            path.unlink()
            with pytest.raises(InputError, match=str(path)):
                TokenCache.open(out, store, tokenizer)
            path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
            with pytest.raises(InputError, match=f"{path}: its content does not fit its checksum"):
                TokenCache.open(out, store, tokenizer).verify()
        path.write_bytes(good)
    ends = np.fromfile(out / "runs/00000.ends.bin", dtype=np.uint64)
    ends[10] = 2**40
    ends.tofile(out / "runs/00000.ends.bin")
    with pytest.raises(InputError, match=r"00000\.ends\.bin is damaged: a cell ends where it cannot"):
        TokenCache.open(out, store, tokenizer).encode(store, np.array([3, 9]))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dtype", "float32", "must be uint16 or uint32"),
        ("cells", -1, "must list its runs"),
        ("runs", [{"cells": 400, "tokens": 5}], "run 0 has a wrong size"),
        ("runs", [{"cells": 150}], "run 0 must say"),
        ("tokenizer", {}, "must say max_length"),
    ],
)
def test_a_manifest_is_not_trusted(
    store: CellStore, tokenizer: RankTokenizer, tmp_path: Path, key: str, value: object, message: str
) -> None:
    out = tmp_path / "cache"
    build_token_cache(store, tokenizer, out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {key: value}))
    with pytest.raises(InputError, match=message):
        TokenCache.open(out, store, tokenizer)
