"""Damage to whatever lies on disk: every file of a store, of ranked tokens and of tar shards, and a collection's file.

`verify` names the file, whatever happened to it; what is cut or missing is refused when it is opened; and reading what
was damaged ends in a sentence or in numbers, never in a crash.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from celltron.cells import CellStore, RankTokenizer, build_token_cache, compute_medians
from celltron.cells.collection import CellCollection
from celltron.cells.tar_store import TarStore
from celltron.cells.tar_writer import shard_store
from celltron.cells.token_cache import TokenCache
from celltron.cells.verify import DamageError, verify_store
from celltron.core import InputError, MedianTable, verify_artefact

from .small_store import seal, write_small_store

GENES = [f"ENSG{i:011d}" for i in range(16)]
STORE_FILES = ["manifest.json", "genes.parquet"]
STORE_FILES += [f"shards/0000{i}/{name}" for i in range(2) for name in ("indptr.bin", "indices.bin", "counts.bin")]
STORE_FILES += [f"shards/0000{i}/{name}" for i in range(2) for name in ("totals.bin", "obs.parquet")]
TOKEN_FILES = ["manifest.json", "runs/00000.ends.bin", "runs/00000.tokens.bin"]
TAR_FILES = ["manifest.json", "blocks.parquet", "genes.parquet"]
TAR_FILES += [f"{name}-00000{i}.{end}" for i in range(3) for name, end in (("shard", "tar"), ("obs", "parquet"))]
FILES = [("store", name) for name in STORE_FILES] + [("tokens", name) for name in TOKEN_FILES]
FILES += [("tars", name) for name in TAR_FILES]
FLIPS = 4


class Artefact(NamedTuple):
    folder: Path
    other: Path
    """One of the same kind with other content."""
    open: Callable[[Path], Any]
    verify: Callable[[Path], None]


def make_counts(seed: int) -> np.ndarray:
    counts_CG = np.random.default_rng(seed).poisson(1.0, (21, 16))
    counts_CG[:, 0] += 1
    counts_CG[15, 3] = 1000
    return counts_CG


def make_tokenizer(store: CellStore) -> RankTokenizer:
    return RankTokenizer.from_store(store, medians=MedianTable(GENES, np.arange(1, 17)), max_length=9)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artefact]:
    """Of each kind one artefact, and one with other counts."""
    folder = tmp_path_factory.mktemp("good")
    stores = [write_small_store(folder / f"store{i}", make_counts(i), GENES, shard_cells=12) for i in range(2)]
    opened = [CellStore.open(path) for path in stores]
    for i, store in enumerate(opened):
        build_token_cache(store, make_tokenizer(store), folder / f"tokens{i}")
        shard_store(store, folder / f"tars{i}", block_cells=5, shard_bytes=14_000)

    def open_tokens(path: Path) -> TokenCache:
        return TokenCache.open(path, opened[0], make_tokenizer(opened[0]))

    return {
        "store": Artefact(*stores, CellStore.open, verify_store),
        "tokens": Artefact(folder / "tokens0", folder / "tokens1", open_tokens, verify_artefact),
        "tars": Artefact(folder / "tars0", folder / "tars1", TarStore.open, lambda path: TarStore.open(path).verify()),
    }


@pytest.fixture
def copy(good: dict[str, Artefact], tmp_path: Path) -> Callable[[str], Artefact]:
    """A copy of an artefact, to be damaged."""

    def make(kind: str) -> Artefact:
        shutil.copytree(good[kind].folder, tmp_path / kind)
        return good[kind]._replace(folder=tmp_path / kind)

    return make


def refuse(action: Callable[[Path], Any], folder: Path, *names: str) -> None:
    """The action ends in one sentence that names one of these files."""
    with pytest.raises(InputError) as caught:
        action(folder)
    assert "\n" not in str(caught.value)
    assert any(str(folder / name) in str(caught.value) for name in names), (names, str(caught.value))


@pytest.mark.parametrize("kind", ["store", "tokens", "tars"])
def test_nothing_is_wrong_and_no_file_is_forgotten(good: dict[str, Artefact], kind: str) -> None:
    artefact = good[kind]
    artefact.verify(artefact.folder)
    there = {path.relative_to(artefact.folder).as_posix() for path in artefact.folder.rglob("*") if path.is_file()}
    assert there == {name for of, name in FILES if of == kind}


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_a_flipped_bit(copy: Callable[[str], Artefact], kind: str, name: str) -> None:
    artefact = copy(kind)
    data = (artefact.folder / name).read_bytes()
    draw = random.Random(f"{kind}/{name}")
    for place in [0, len(data) - 1, *(draw.randrange(len(data)) for _ in range(FLIPS))]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << draw.randrange(8)
        if name == "manifest.json" and json_or_none(damaged) == json.loads(data):
            continue  # white space for white space
        (artefact.folder / name).write_bytes(damaged)
        refuse(artefact.verify, artefact.folder, name)


def json_or_none(data: bytes | bytearray) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_cut_grown_or_missing(copy: Callable[[str], Artefact], kind: str, name: str) -> None:
    artefact = copy(kind)
    path = artefact.folder / name
    data = path.read_bytes()
    for part in (data[:-1], data[: len(data) // 2], b"", data + b"\0"):
        path.write_bytes(part)
        if part == data[:-1] and name == "manifest.json" and part.endswith(b"}"):
            continue  # its last line break is not needed
        refuse(artefact.open, artefact.folder, name)
        refuse(artefact.verify, artefact.folder, name)
    path.unlink()
    in_sentence = "" if name == "manifest.json" else name  # then it is the folder that lacks it
    refuse(artefact.open, artefact.folder, in_sentence)
    refuse(artefact.verify, artefact.folder, in_sentence)


@pytest.mark.parametrize("kind", ["store", "tokens", "tars"])
def test_two_files_swapped(copy: Callable[[str], Artefact], kind: str) -> None:
    artefact = copy(kind)
    names = [name for of, name in FILES if of == kind and name != "manifest.json"]
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            a, b = (artefact.folder / first).read_bytes(), (artefact.folder / second).read_bytes()
            assert a != b, (first, second)
            (artefact.folder / first).write_bytes(b)
            (artefact.folder / second).write_bytes(a)
            refuse(artefact.verify, artefact.folder, first, second)
            if kind == "store":
                with pytest.raises(DamageError) as caught:
                    verify_store(artefact.folder)
                assert {path for path, _ in caught.value.bad} == {artefact.folder / first, artefact.folder / second}
            (artefact.folder / first).write_bytes(a)
            (artefact.folder / second).write_bytes(b)
    artefact.verify(artefact.folder)


@pytest.mark.parametrize("kind", ["store", "tokens", "tars"])
def test_the_manifest_of_another(copy: Callable[[str], Artefact], kind: str) -> None:
    artefact = copy(kind)
    shutil.copy(artefact.other / "manifest.json", artefact.folder)
    with pytest.raises(InputError, match=str(artefact.folder)):
        artefact.verify(artefact.folder)


def test_the_manifest_of_another_store_is_named(copy: Callable[[str], Artefact], tmp_path: Path) -> None:
    """Even of one whose files have the same lengths."""
    artefact = copy("store")
    counts_CG = make_counts(0)
    other = write_small_store(tmp_path / "other", counts_CG[:, ::-1].copy(), GENES[::-1], shard_cells=12)
    for path in other.rglob("*.bin"):
        same = artefact.folder / path.relative_to(other)
        path.write_bytes(bytes(b ^ 1 for b in same.read_bytes()))
    for path in other.rglob("*.parquet"):
        same = artefact.folder / path.relative_to(other)
        path.write_bytes(same.read_bytes()[:-4] + b"\0\0\0\0")
    seal(other)
    shutil.copy(other / "manifest.json", artefact.folder)
    CellStore.open(artefact.folder)
    refuse(verify_store, artefact.folder, "manifest.json")


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to each number and text of a manifest."""
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in leaves(inner, (*path, key))]
    if isinstance(value, list):
        return [leaf for i, inner in enumerate(value) for leaf in leaves(inner, (*path, i))]
    return [path]


@pytest.mark.parametrize("kind", ["store", "tokens", "tars"])
def test_an_edited_manifest(copy: Callable[[str], Artefact], kind: str) -> None:
    artefact = copy(kind)
    path = artefact.folder / "manifest.json"
    good = json.loads(path.read_text())
    for way in leaves(good):
        manifest = json.loads(json.dumps(good))
        inner = manifest
        for key in way[:-1]:
            inner = inner[key]
        value = inner[way[-1]]
        inner[way[-1]] = (
            not value if isinstance(value, bool) else value + 1 if not isinstance(value, str) else f"{value}x"
        )
        path.write_text(json.dumps(manifest))
        with pytest.raises(InputError, match=str(artefact.folder)) as caught:
            artefact.verify(artefact.folder)
        assert "manifest.json" in str(caught.value) or way[0] == "files", (way, caught.value)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m["shards"][0].update(counts="uint16"),
        lambda m: m["shards"][0].update(counts="int8"),
        lambda m: m["shards"][1].update(counts="float16"),
        lambda m: m["shards"][1].update(indices="uint32"),
        lambda m: m["shards"].reverse(),
        lambda m: m["shards"][0].update(cells=13),
        lambda m: m.update(genes=15),
        lambda m: m.update(genes=17),
        lambda m: m["dtypes"].update(counts="uint8"),
        lambda m: m.update(version=1),
        lambda m: m.update(gene_file="shards/00000/obs.parquet"),
        lambda m: m.update(gene_file="manifest.json"),
        lambda m: m["files"].pop("shards/00001/totals.bin"),
        lambda m: m["files"].pop("genes.parquet"),
    ],
)
def test_a_manifest_edited_by_someone_who_seals_it(copy: Callable[[str], Artefact], edit: Any) -> None:
    artefact = copy("store")
    manifest = json.loads((artefact.folder / "manifest.json").read_text())
    edit(manifest)
    (artefact.folder / "manifest.json").write_text(json.dumps(manifest))
    seal(artefact.folder)
    with pytest.raises(InputError, match=str(artefact.folder)):
        verify_store(artefact.folder)


def read_all(store: CellStore) -> None:
    """Everything that reads counts."""
    cells = np.arange(len(store))
    store.rows(cells)
    store.rows(cells[::-3])
    store.totals(cells)
    make_tokenizer(store).tokenize(store, cells)
    compute_medians(store, workers=1)


@pytest.mark.parametrize("name", [name for name in STORE_FILES if name.endswith(".bin")])
def test_garbage_is_read_without_a_crash(copy: Callable[[str], Artefact], name: str) -> None:
    path = copy("store").folder / name
    size, draw = path.stat().st_size, np.random.default_rng(0)
    for garbage in (
        b"\xff" * size,
        b"\0" * size,
        draw.bytes(size),
        path.read_bytes()[::-1],
        b"\0" * 7 + b"\x80" * (size - 7),
    ):
        path.write_bytes(garbage)
        try:
            read_all(CellStore.open(path.parents[2]))
        except InputError as error:
            assert str(path.parents[2]) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    "edit",
    [
        lambda a: a.__setitem__(slice(3, 5), a[[4, 3]]),
        lambda a: a.__setitem__(5, a[-1] + 1),
        lambda a: a.__setitem__(5, 2**64 - 1),
        lambda a: a.__setitem__(5, 2**63),
        lambda a: a.__setitem__(slice(None), a[::-1].copy()),
    ],
)
@pytest.mark.parametrize("shard", [0, 1])
def test_rows_out_of_order_are_a_sentence(copy: Callable[[str], Artefact], shard: int, edit: Any) -> None:
    folder = copy("store").folder
    path = folder / f"shards/0000{shard}/indptr.bin"
    ends = np.fromfile(path, "<u8")
    edit(ends)
    ends.tofile(path)
    store = CellStore.open(folder)
    for action in (store.rows, store.totals, lambda cells: make_tokenizer(store).tokenize(store, cells)):
        with pytest.raises(
            InputError, match=f"0000{shard}/indptr.bin is damaged: a cell ends where the shard does not"
        ):
            action(np.arange(21))
    for whole in (lambda: compute_medians(store), lambda: store.total_counts, store.info):
        with pytest.raises(InputError, match=f"0000{shard}/indptr.bin is damaged"):
            whole()


def test_genes_beyond_the_list_are_a_sentence(copy: Callable[[str], Artefact]) -> None:
    folder = copy("store").folder
    indices = np.fromfile(folder / "shards/00001/indices.bin", "<u2")
    indices[3] = 16
    indices.tofile(folder / "shards/00001/indices.bin")
    store = CellStore.open(folder)
    with pytest.raises(InputError, match="store is damaged: cell 12 "):
        compute_medians(store)
    with pytest.raises(InputError, match="store is damaged: cell 12 "):
        make_tokenizer(store).tokenize(store, np.arange(21))


def test_a_collection_names_what_changed(good: dict[str, Artefact], tmp_path: Path) -> None:
    """Its file names its stores by what they hold, and says so when it was changed itself."""
    for i, path in enumerate((good["store"].folder, good["store"].other)):
        shutil.copytree(path, tmp_path / f"store{i}")
    stores = [tmp_path / f"store{i}" for i in range(2)]
    CellCollection.open(stores, weights=[1, 2]).write(tmp_path / "both.json")
    CellCollection.open(tmp_path / "both.json").verify()

    path = stores[1] / "shards/00000/counts.bin"
    data = bytearray(path.read_bytes())
    data[3] ^= 2
    path.write_bytes(data)
    with pytest.raises(InputError, match="store1/shards/00000/counts.bin"):
        CellCollection.open(tmp_path / "both.json").verify()
    shutil.rmtree(stores[1])
    shutil.copytree(stores[0], stores[1])
    with pytest.raises(InputError, match="both.json"):
        CellCollection.open(tmp_path / "both.json")


def test_a_flipped_bit_in_a_collections_file(good: dict[str, Artefact], tmp_path: Path) -> None:
    both = tmp_path / "both.json"
    CellCollection.open([good["store"].folder, good["store"].other], weights=[1, 2]).write(both)
    data = both.read_bytes()
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        if json_or_none(damaged) != json.loads(data):
            both.write_bytes(damaged)
            with pytest.raises(InputError, match="both.json"):
                CellCollection.open(both)
