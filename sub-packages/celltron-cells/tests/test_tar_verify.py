"""Every way in which tar shards may be damaged: named by verify, and never read as if nothing were."""

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from celltron.cells import CellStore
from celltron.cells.tar_format import TYPES, decode_block, encode_block, sample_key
from celltron.cells.tar_store import TarStore
from celltron.cells.tar_writer import shard_store
from celltron.core import InputError
from celltron.core.manifest import digest_of_manifest


@pytest.fixture(scope="module")
def whole(store: CellStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "a.tars"
    shard_store(store, out, block_cells=50, shard_bytes=150_000)
    assert len(list(out.glob("*.tar"))) >= 3
    return out


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """Tar shards that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "a.tars"))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def refuse(folder: Path, words: str) -> None:
    """Both opening and what follows must not go on without a sentence."""
    with pytest.raises(InputError, match=words) as caught, TarStore.open(folder) as shards:
        shards.verify()
    assert "\n" not in str(caught.value)


def test_whole_shards(whole: Path) -> None:
    seen: list[tuple[int, int]] = []
    with TarStore.open(whole) as shards:
        shards.verify(lambda *amounts: seen.append(amounts))
        total = sum(entry["bytes"] for entry in shards.manifest["files"].values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("place", [0, 130, 600, 20_000, -1000, -1])
def test_a_flipped_byte_in_a_tar(folder: Path, place: int) -> None:
    """In a header, an array, the padding, the end: whatever is read of the tar is refused if it has the byte in it."""
    path = folder / "shard-000001.tar"
    flip(path, place)
    with TarStore.open(folder) as shards:
        with pytest.raises(InputError, match=r"shard-000001.tar.* does not fit its checksum.*\(1 of \d+ files are bad"):
            shards.verify()
        offset = place % path.stat().st_size
        bad = np.flatnonzero((shards.blocks.tar == 1) & (shards.blocks.offset <= offset))[-1:]
        is_end = offset >= shards.blocks.offset[bad[0]] + shards.blocks.length[bad[0]]
        for block in range(shards.num_blocks):
            cell = [int(shards.disk_runs[block])]
            if block in bad and not is_end:
                with pytest.raises(InputError, match=r"shard-000001.tar, block \d \(cells \d+ to \d+, at byte \d+\)"):
                    shards.rows(cell)
            else:
                shards.rows(cell)


def test_every_file_is_looked_at(folder: Path) -> None:
    """One flipped bit in the middle of any file, the manifest among them."""
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        flip(path, len(data) // 2)
        refuse(folder, path.name)
        path.write_bytes(data)
    with TarStore.open(folder) as shards:
        shards.verify()


def test_a_missing_or_short_or_long_file(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for wrong in (data[:-2], data + b"\0", b""):
            path.write_bytes(wrong)
            with pytest.raises(InputError, match=path.name):
                TarStore.open(folder)
        path.unlink()
        with pytest.raises(InputError, match=f"{path.name} is missing"):
            TarStore.open(folder)
        path.write_bytes(data)


def test_a_tar_that_is_cut_after_opening(folder: Path) -> None:
    with TarStore.open(folder) as shards:
        path = folder / "shard-000000.tar"
        path.write_bytes(path.read_bytes()[:70_000])
        with pytest.raises(InputError, match="shard-000000.tar ends before byte"):
            shards.rows(np.arange(400))
        path.unlink()
        with pytest.raises(InputError, match="shard-000000.tar is missing"):
            shards.rows(np.arange(400))
        with pytest.raises(InputError, match="shard-000000.tar is missing"):
            shards.verify()


def test_obs_with_a_flipped_byte(folder: Path) -> None:
    with TarStore.open(folder) as shards:
        flip(folder / "obs-000001.parquet", 500)
        with pytest.raises(InputError, match="obs-000001.parquet does not fit its checksum between bytes 0 and"):
            shards.obs_column("donor")


def test_swapped_files(folder: Path, store: CellStore, tmp_path: Path) -> None:
    shard_store(store, tmp_path / "b.tars", block_cells=40, shard_bytes=150_000)
    manifest = (folder / "manifest.json").read_bytes()
    shutil.copy(tmp_path / "b.tars" / "manifest.json", folder)
    with pytest.raises(InputError, match="blocks.parquet does not fit manifest.json"):
        TarStore.open(folder)
    (folder / "manifest.json").write_bytes(manifest)
    first, second = folder / "shard-000000.tar", folder / "shard-000001.tar"
    length = second.stat().st_size
    second.write_bytes(first.read_bytes()[:length].ljust(length, b"\0"))
    refuse(folder, "shard-000001.tar, block 0 .* does not fit its checksum")


def rewrite(
    folder: Path,
    *,
    manifest: Callable[[dict[str, Any]], object] | None = None,
    blocks: Callable[[list[dict[str, Any]]], object] | None = None,
) -> None:
    """Change the lists of the shards with all checksums made anew, as one who means harm would."""
    told = json.loads((folder / "manifest.json").read_text())
    if blocks is not None:
        table = pq.read_table(folder / "blocks.parquet")
        rows = table.to_pylist()
        blocks(rows)
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), folder / "blocks.parquet")
    for name in told["files"]:
        data = (folder / name).read_bytes()
        told["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if manifest is not None:
        manifest(told)
    told["manifest_sha256"] = digest_of_manifest(told)
    (folder / "manifest.json").write_text(json.dumps(told))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(version=2),
        lambda m: m.update(version=True),
        lambda m: m.update(format="celltron-cellstore"),
        lambda m: m.update(cells=401),
        lambda m: m.update(cells=True),
        lambda m: m.update(genes="600"),
        lambda m: m.update(nnz=-1),
        lambda m: m.pop("block_cells"),
        lambda m: m.update(store_fingerprint="x" * 64),
        lambda m: m.update(obs_columns="donor"),
        lambda m: m.update(shards={}),
        lambda m: m["shards"].pop(),
        lambda m: m["shards"].append(m["shards"][0]),
        lambda m: m["shards"][0].update(cells=1.5),
        lambda m: m["shards"][0].update(obs_crc32=[]),
        lambda m: m.update(files=[]),
        lambda m: m["files"].pop("genes.parquet"),
        lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": "0" * 64}}),
        lambda m: m["files"]["shard-000000.tar"].update(bytes=5),
        lambda m: m["files"]["shard-000000.tar"].update(sha256=None),
    ],
)
def test_a_manifest_that_does_not_fit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    rewrite(folder, manifest=change)
    with pytest.raises(InputError, match=r"manifest.json|blocks.parquet is damaged"):
        TarStore.open(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", '{"format": 1}', "[" * 100_000])
def test_a_manifest_that_is_no_manifest(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(InputError, match="manifest.json"):
        TarStore.open(folder)


def test_no_shards_at_all(tmp_path: Path, store: CellStore, folder: Path) -> None:
    for path, words in [
        (tmp_path / "none", "none does not exist"),
        (folder / "genes.parquet", "is a file, wanted the folder of tar shards"),
        (store.path, "this is a 'celltron-cellstore', wanted a 'celltron-tar-shards'"),
    ]:
        with pytest.raises(InputError, match=words):
            TarStore.open(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.pop(),
        lambda rows: rows.append(rows[-1]),
        lambda rows: rows[0].update(offset=512),
        lambda rows: rows[0].update(offset=-512),
        lambda rows: rows[1].update(length=rows[1]["length"] + 512),
        lambda rows: rows[0].update(nnz=rows[0]["nnz"] + 1000),
        lambda rows: rows[0].update(nnz=2**40),
        lambda rows: rows[0].update(cells=0),
        lambda rows: rows[0].update(cells=51),
        lambda rows: rows[3].update(first_cell=0),
        lambda rows: rows[-1].update(tar=0),
        lambda rows: rows[0].update(counts="object"),
        lambda rows: rows[0].update(counts="uint64"),
        lambda rows: rows[0].update(indptr="uint64"),
        lambda rows: rows[0].update(crc32=None),
        lambda rows: rows.reverse(),
        lambda rows: rows.clear(),
    ],
)
def test_a_list_of_blocks_that_does_not_fit(folder: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    rewrite(folder, blocks=change)
    with pytest.raises(InputError, match="blocks.parquet is damaged"):
        TarStore.open(folder)


def replace_block(folder: Path, change: Callable[[Any], Any]) -> None:
    """Write the first block of the first tar anew, of the same length and with checksums that fit."""
    with TarStore.open(folder) as shards:
        data = shards.blocks.fetch(shards.files, 0)
        block = decode_block(data, 50, int(shards.blocks.nnz[0]), TYPES[shards.blocks.types[0]])
    changed = change(block._replace(**{name: array.copy() for name, array in block._asdict().items()}))
    new = changed if isinstance(changed, bytes) else encode_block(sample_key(0, 0), changed)
    path = folder / "shard-000000.tar"
    path.write_bytes(new + path.read_bytes()[len(new) :])
    rewrite(folder, blocks=lambda rows: rows[0].update(crc32=zlib.crc32(new)))


@pytest.mark.parametrize("ends", [2**32 - 1, 10**6, 0])
def test_a_block_that_leads_out_of_itself(folder: Path, ends: int) -> None:
    def change(block: Any) -> Any:
        block.indptr[3] = ends
        return block

    replace_block(folder, change)
    with TarStore.open(folder) as shards:
        with pytest.raises(InputError, match=r"shard-000000.tar, block 0 .* a cell ends where the block does not"):
            shards.rows([2, 3])
        with pytest.raises(InputError, match=r"block 0 .* its rows do not follow each other"):
            shards.verify()


def test_blocks_that_only_verify_finds(folder: Path) -> None:
    def zero(block: Any) -> Any:
        block.counts[0] = 0
        return block

    def unsorted(block: Any) -> Any:
        block.indices[:2] = block.indices[1::-1]
        return block

    for change, words in [
        (zero, "a count is not above zero"),
        (unsorted, "do not rise below 600"),
        (lambda block: block._replace(cells=block.cells + 1), "its cells have other numbers"),
        (lambda block: block._replace(totals=-block.totals), "a total is negative"),
        (lambda block: encode_block(sample_key(0, 0), block).replace(b"000000-0000", b"000000-0001"), "its headers"),
    ]:
        spare = {path.name: path.read_bytes() for path in folder.iterdir()}
        replace_block(folder, change)
        refuse(folder, f"shard-000000.tar, block 0 .*{words}")
        for name, data in spare.items():
            (folder / name).write_bytes(data)


def test_tables_that_do_not_fit(folder: Path) -> None:
    obs = folder / "obs-000000.parquet"
    table = pq.read_table(obs)

    def new_checksum(manifest: dict[str, Any]) -> None:
        manifest["shards"][0]["obs_crc32"] = [zlib.crc32(obs.read_bytes())]

    for wrong in (table.slice(0, 3), table.drop_columns(["donor"])):
        pq.write_table(wrong, obs)
        rewrite(folder, manifest=new_checksum)
        refuse(folder, "obs-000000.parquet is damaged: wanted all columns of obs")
        with TarStore.open(folder) as shards, pytest.raises(InputError, match="obs-000000.parquet is damaged"):
            shards.obs_column("donor")
    obs.write_bytes(b"x" * 1000)
    rewrite(folder, manifest=new_checksum)
    refuse(folder, "obs-000000.parquet is no parquet file")
    with TarStore.open(folder) as shards, pytest.raises(InputError, match="obs-000000.parquet is no parquet file"):
        shards.obs_column("donor")


def test_genes_that_do_not_fit(folder: Path) -> None:
    genes = pq.read_table(folder / "genes.parquet")
    for wrong in (
        genes.slice(1),
        pa.concat_tables([genes.slice(1), genes.slice(1, 1)]),
        genes.drop_columns(["gene_id"]),
    ):
        pq.write_table(wrong, folder / "genes.parquet")
        rewrite(folder)
        refuse(folder, "genes.parquet is damaged: wanted 600 different gene ids")
