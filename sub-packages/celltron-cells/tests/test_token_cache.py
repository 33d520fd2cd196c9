"""The ranked cache: the tokeniser's own tokens, refused when stale or damaged, built once by whoever comes first.

A build that broke off is gone on with from its complete runs.
"""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from celltron.cells import CellStore, Loader, RankTokenizer, build_token_cache, convert, token_cache
from celltron.cells.token_cache import TokenCache, default_cache_path
from celltron.cells.token_rows import copy_tokens
from celltron.core import InputError, MedianTable, Vocabulary, read_manifest, write_artefact

RUN_CELLS = 150


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces so small that a run has several."""
    monkeypatch.setattr(token_cache, "PIECE_CELLS", 40)


@pytest.fixture
def tokenizer(store: CellStore) -> RankTokenizer:
    return RankTokenizer.from_store(store, max_length=64)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("frame", [(), ("<cls>",), ("<cls>", "<eos>")])
def test_a_read_is_what_the_tokeniser_gives(store: CellStore, tmp_path: Path, frame: tuple[str, ...]) -> None:
    vocabulary = Vocabulary(["<pad>", "<mask>", *frame, *store.gene_ids])
    tokenizer = RankTokenizer.from_store(store, vocabulary=vocabulary, max_length=64)
    cache = build_token_cache(store, tokenizer, tmp_path / "cache", run_cells=RUN_CELLS)
    cells = np.random.default_rng(0).integers(0, len(store), 700)
    tokens, lengths = tokenizer.tokenize(store, cells)
    rows = cache.encode(store, cells)
    assert cache.dtype == rows.dtype == "uint16"
    assert np.array_equal(rows.lengths, lengths) and np.array_equal(copy_tokens(rows), tokens)
    assert cache.num_tokens == tokenizer.tokenize(store, np.arange(len(store)))[1].sum()


def test_bytes_do_not_depend_on_workers(store: CellStore, tokenizer: RankTokenizer, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    build_token_cache(
        store, tokenizer, tmp_path / "1", run_cells=RUN_CELLS, workers=1, progress=lambda *done: seen.append(done)
    )
    build_token_cache(store, tokenizer, tmp_path / "4", run_cells=RUN_CELLS, workers=4)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "4")
    assert seen[-1] == (400, 400) and seen == sorted(seen)


@pytest.mark.parametrize("run_cells", [1, 7, 399, 400, 401])
def test_runs_of_any_size_give_the_same_tokens(
    store: CellStore, tokenizer: RankTokenizer, tmp_path: Path, run_cells: int
) -> None:
    cache = build_token_cache(store, tokenizer, tmp_path / "cache", run_cells=run_cells)
    assert len(cache.manifest["runs"]) == -(-400 // run_cells)
    cells = np.arange(len(store))[::-1].copy()
    assert np.array_equal(copy_tokens(cache.encode(store, cells)), tokenizer.tokenize(store, cells)[0])


def test_runs_without_cells_are_refused(store: CellStore, tokenizer: RankTokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run_cells is 0: wanted 1 or more cells in a run"):
        build_token_cache(store, tokenizer, tmp_path / "cache", run_cells=0)


def test_wide_vocabularies_take_wide_tokens(store: CellStore, tmp_path: Path) -> None:
    genes = [*(f"ENSG{i:011d}" for i in range(70_000)), *store.gene_ids]
    vocabulary = Vocabulary.from_genes(list(dict.fromkeys(genes)))
    tokenizer = RankTokenizer.from_store(store, vocabulary=vocabulary, max_length=64)
    cache = build_token_cache(store, tokenizer, tmp_path / "cache", run_cells=RUN_CELLS)
    assert cache.dtype == "uint32"
    assert copy_tokens(cache.encode(store, np.arange(9))).tolist() == tokenizer.tokenize(store, range(9))[0].tolist()


def test_batches_from_the_cache_are_the_same(store: CellStore, tokenizer: RankTokenizer, tmp_path: Path) -> None:
    def batches(cache: bool | Path) -> list[tuple[bytes, ...]]:
        with Loader(store, tokenizer, cells_per_batch=7, seed=3, epochs=2, cache=cache) as loader:
            return [tuple(a.tobytes() for a in (b.tokens, b.labels, b.lengths, b.cells)) for b in loader]

    build_token_cache(store, tokenizer, tmp_path / "small runs", run_cells=RUN_CELLS)
    assert batches(tmp_path / "cache") == batches(False) == batches(tmp_path / "cache")
    assert batches(tmp_path / "small runs") == batches(False)
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
    build_token_cache(store, tokenizer, out, run_cells=RUN_CELLS)
    with pytest.raises(InputError, match=r"is stale: its tokens were made with another max_length; remove it"):
        TokenCache.open(out, store, RankTokenizer.from_store(store, max_length=65))
    medians = MedianTable(list(store.gene_ids), np.full(store.num_genes, 2.0))
    with pytest.raises(InputError, match=r"is stale: .* another medians"):
        Loader(
            store, RankTokenizer.from_store(store, medians=medians, max_length=64), cells_per_batch=7, seed=0, cache=out
        )
    manifest = read_manifest(out, format=token_cache.FORMAT, versions={1})
    kept = {key: manifest[key] for key in ("cells", "tokens", "dtype", "run_cells", "runs", "tokenizer")}
    with write_artefact(tmp_path / "other", format=token_cache.FORMAT, version=1) as artefact:
        shutil.copytree(out / "runs", artefact.folder / "runs")
        artefact.meta |= kept | {"store": "of another"}
    with pytest.raises(InputError, match=r"other holds tokens of another store than .*\.store: remove it"):
        TokenCache.open(tmp_path / "other", store, tokenizer)


def test_a_damaged_cache_is_refused(store: CellStore, tokenizer: RankTokenizer, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    build_token_cache(store, tokenizer, out, run_cells=RUN_CELLS)
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
        ("run_cells", 0, "run_cells must be how many cells a run has"),
        ("run_cells", None, "run_cells must be how many cells a run has"),
        ("run_cells", 149, "run 0 has a wrong size"),
        ("run_cells", 400, "run 0 has a wrong size"),
        ("tokenizer", {}, "must say max_length"),
    ],
)
def test_a_manifest_is_not_trusted(
    store: CellStore, tokenizer: RankTokenizer, tmp_path: Path, key: str, value: object, message: str
) -> None:
    out = tmp_path / "cache"
    build_token_cache(store, tokenizer, out, run_cells=RUN_CELLS)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {key: value}))
    with pytest.raises(InputError, match=message):
        TokenCache.open(out, store, tokenizer)


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The cells that were tokenised since the test began or the list was cleared."""
    cells_so_far: list[int] = []
    tokenize = RankTokenizer.tokenize

    def watched(self: RankTokenizer, store: CellStore, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cells_so_far.extend(cells.tolist())
        return tokenize(self, store, cells)

    monkeypatch.setattr(RankTokenizer, "tokenize", watched)
    return cells_so_far


@pytest.fixture
def stopped(store: CellStore, tokenizer: RankTokenizer, tmp_path: Path, tokenised: list[int]) -> Path:
    """What Ctrl-C left in the middle of the last of three runs."""

    def progress(done: int, total: int) -> None:
        if done > 2 * RUN_CELLS:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_token_cache(store, tokenizer, tmp_path / "cache", run_cells=RUN_CELLS, workers=1, progress=progress)
    assert not (tmp_path / "cache").exists()
    tokenised.clear()
    return tmp_path / ".cache.partial"


def assert_as_if_undisturbed(out: Path, store: CellStore, tokenizer: RankTokenizer, run_cells: int) -> None:
    """The cache is what a build in one go writes, and nothing is left beside it."""
    build_token_cache(store, tokenizer, out.with_name("whole"), run_cells=run_cells)
    assert files_of(out) == files_of(out.with_name("whole"))
    assert not out.with_name(f".{out.name}.partial").exists()


def test_the_same_call_goes_on(
    store: CellStore, tokenizer: RankTokenizer, tmp_path: Path, stopped: Path, tokenised: list[int]
) -> None:
    """Complete runs are kept, and their cells are not tokenised again."""
    seen: list[tuple[int, int]] = []
    build_token_cache(
        store, tokenizer, tmp_path / "cache", run_cells=RUN_CELLS, progress=lambda *done: seen.append(done)
    )
    assert sorted(tokenised) == list(range(300, 400))
    assert seen == [(150, 400), (300, 400), (340, 400), (380, 400), (400, 400)]
    assert_as_if_undisturbed(tmp_path / "cache", store, tokenizer, RUN_CELLS)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("name", ["runs/00000.tokens.bin", "runs/00000.ends.bin", "work/00000.json"])
def test_a_damaged_run_is_made_again(  # noqa: PLR0913
    store: CellStore,
    tokenizer: RankTokenizer,
    tmp_path: Path,
    stopped: Path,
    tokenised: list[int],
    damage: Callable[[Path], None],
    name: str,
) -> None:
    damage(stopped / name)
    build_token_cache(store, tokenizer, tmp_path / "cache", run_cells=RUN_CELLS)
    assert sorted(tokenised) == [*range(150), *range(300, 400)]
    assert_as_if_undisturbed(tmp_path / "cache", store, tokenizer, RUN_CELLS)


@pytest.mark.parametrize("change", ["store", "max_length", "medians", "run_cells", "content.json"])
def test_what_is_left_of_another_cache_is_dropped(  # type: ignore[no-untyped-def] # noqa: PLR0913
    store: CellStore, tokenizer: RankTokenizer, write_h5ad, counts, genes, tmp_path, stopped, tokenised, change: str
) -> None:
    run_cells = 149 if change == "run_cells" else RUN_CELLS
    if change == "store":
        convert([write_h5ad(tmp_path / "b.h5ad", counts[::-1], genes)], tmp_path / "b.store")
        store = CellStore.open(tmp_path / "b.store")
    elif change == "max_length":
        tokenizer = RankTokenizer.from_store(store, max_length=63)
    elif change == "medians":
        medians = MedianTable(list(store.gene_ids), np.full(store.num_genes, 2.0))
        tokenizer = RankTokenizer.from_store(store, medians=medians, max_length=64)
    elif change == "content.json":
        flip(stopped / "work" / "content.json")
    build_token_cache(store, tokenizer, tmp_path / "cache", run_cells=run_cells)
    assert sorted(tokenised) == list(range(400))
    assert_as_if_undisturbed(tmp_path / "cache", store, tokenizer, run_cells)
