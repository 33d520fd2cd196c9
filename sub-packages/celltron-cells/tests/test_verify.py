"""What the content alone can tell: stores whose checksums are right and whose numbers are not."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from celltron.cells import CellStore, verify
from celltron.cells.verify import DamageError, verify_store
from celltron.core import InputError

from .small_store import seal, write_small_store

GENES = [f"ENSG{i:011d}" for i in range(12)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of 8, 8 and 4 cells, the last with counts beyond 255; cell 5 is empty."""
    counts_CG = np.random.default_rng(0).poisson(0.8, (20, 12))
    counts_CG[5] = 0
    counts_CG[9, :3] = 4
    counts_CG[17, 3] = 1000
    return write_small_store(tmp_path / "a.store", counts_CG, GENES)


def change(path: Path, dtype: str, edit: Callable[[np.ndarray], Any]) -> None:
    array = np.fromfile(path, dtype)
    edit(array)
    array.tofile(path)


def change_table(path: Path, edit: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(edit(pq.read_table(path)), path)


def bad_files(folder: Path, **more: Any) -> dict[str, str]:
    """What `verify_store` finds, by name."""
    with pytest.raises(DamageError) as caught:
        verify_store(folder, **more)
    first, _ = caught.value.bad[0]
    assert str(first) in str(caught.value) and f"; {len(caught.value.bad)} of " in str(caught.value)
    return {path.relative_to(folder).as_posix(): problem for path, problem in caught.value.bad}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_good_store(tmp_path: Path, version: int, workers: int) -> None:
    counts_CG = np.random.default_rng(1).poisson(0.5, (30, 12)) * np.float32(0.37)
    totals = counts_CG.astype(np.float64).sum(1) + np.arange(30)
    folder = write_small_store(
        tmp_path / "b.store", counts_CG.astype(np.float32), GENES, totals=totals, version=version
    )
    seen: list[tuple[int, int]] = []
    verify_store(folder, workers=workers, progress=lambda done, total: seen.append((done, total)))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix != ".json")
    assert seen == sorted(seen) and seen[-1] == (size, size)
    CellStore.open(folder).verify()


@pytest.mark.parametrize("num_cells", [0, 1])
def test_an_empty_store_is_good(tmp_path: Path, num_cells: int) -> None:
    verify_store(write_small_store(tmp_path / "b.store", np.zeros((num_cells, 12), np.int64), GENES))


def test_it_writes_nothing(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    verify_store(folder)
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before


@pytest.mark.parametrize(
    ("name", "dtype", "edit", "problem"),
    [
        (
            "shards/00001/indptr.bin",
            "<u8",
            lambda a: a.__setitem__(slice(1, 3), a[[2, 1]] + [1, 0]),
            "rows do not follow",
        ),
        ("shards/00001/indptr.bin", "<u8", lambda a: a.__setitem__(0, 1), "rows do not follow"),
        ("shards/00001/indptr.bin", "<u8", lambda a: a.__setitem__(-1, a[-1] + 1), "rows do not follow"),
        ("shards/00001/indptr.bin", "<u8", lambda a: a.__setitem__(4, 2**63), "rows do not follow"),
        ("shards/00001/indices.bin", "<u2", lambda a: a.__setitem__(0, 12), "cell 8 do not rise, or go beyond 12"),
        ("shards/00002/indices.bin", "<u2", lambda a: a.__setitem__(1, a[0]), "genes of cell 16 do not rise"),
        ("shards/00000/counts.bin", "u1", lambda a: a.__setitem__(0, 0), "cell 0 has a count that is not above zero"),
        ("shards/00000/counts.bin", "u1", lambda a: a.__setitem__(0, 99), "totals.bin"),
        ("shards/00001/totals.bin", "<f8", lambda a: a.__setitem__(1, np.nan), "total of cell 9 is less .* not finite"),
        ("shards/00001/totals.bin", "<f8", lambda a: a.__setitem__(1, np.inf), "total of cell 9 is less .* not finite"),
        (
            "shards/00001/totals.bin",
            "<f8",
            lambda a: a.__setitem__(1, a[1] - 1),
            "total of cell 9 is less than the sum",
        ),
        ("shards/00001/totals.bin", "<f8", lambda a: a.__setitem__(1, a[1] + 1), "obs.parquet"),
    ],
)
def test_numbers_that_cannot_be(folder: Path, name: str, dtype: str, edit: Any, problem: str) -> None:
    change(folder / name, dtype, edit)
    seal(folder)
    ((found, what),) = bad_files(folder).items()
    blames_another = problem.endswith((".bin", ".parquet"))
    assert found == (str(Path(name).parent / problem) if blames_another else name)
    if not blames_another:
        with pytest.raises(InputError, match=problem):
            raise InputError(what)


def test_a_count_in_another_gene_shows_in_the_gene_file(folder: Path) -> None:
    genes, _ = CellStore.open(folder)[0]
    place = next(k for k, gene in enumerate(genes) if gene + 1 not in genes and gene + 1 < 12)
    change(folder / "shards/00000/indices.bin", "<u2", lambda a: a.__setitem__(place, genes[place] + 1))
    seal(folder)
    found = bad_files(folder)
    assert list(found) == ["genes.parquet"] and found["genes.parquet"].startswith(
        f"num_cells of {GENES[genes[place]]} is"
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5])
def test_fractions_must_be_finite(tmp_path: Path, value: float) -> None:
    folder = write_small_store(tmp_path / "b.store", np.full((9, 12), np.float32(0.5)), GENES)
    change(folder / "shards/00001/counts.bin", "<f4", lambda a: a.__setitem__(3, value))
    seal(folder)
    assert bad_files(folder) == {"shards/00001/counts.bin": "cell 8 has a count that is not above zero and finite"}


@pytest.mark.parametrize(
    ("name", "edit", "problem"),
    [
        ("shards/00001/obs.parquet", lambda t: t.slice(1), "it has 7 rows, wanted one for each of 8 cells"),
        ("shards/00001/obs.parquet", lambda t: t.drop_columns(["source"]), "it lacks cell_id, source or total_counts"),
        (
            "shards/00001/obs.parquet",
            lambda t: t.set_column(2, "total_counts", t["total_counts"].cast(pa.string())),
            "its total_counts must be float64 numbers",
        ),
        (
            "shards/00001/obs.parquet",
            lambda t: t.append_column("age", pa.array(range(8))),
            "",
        ),
        ("genes.parquet", lambda t: t.slice(1), "wanted 12 different gene ids"),
        ("genes.parquet", lambda t: pa.concat_tables([t.slice(0, 11), t.slice(0, 1)]), "wanted 12 different gene ids"),
        ("genes.parquet", lambda t: t.drop_columns(["gene_id"]), "wanted 12 different gene ids"),
        ("genes.parquet", lambda t: t.drop_columns(["num_cells"]), "it lacks num_cells"),
    ],
)
def test_tables_that_do_not_fit(folder: Path, name: str, edit: Any, problem: str) -> None:
    change_table(folder / name, edit)
    seal(folder)
    if problem:
        assert bad_files(folder)[name].startswith(problem)
    else:
        verify_store(folder)  # a column that other shards lack is missing there


def test_columns_of_different_types(folder: Path) -> None:
    for i, values in enumerate((["a"] * 8, range(8), range(4))):
        change_table(folder / f"shards/0000{i}/obs.parquet", lambda t, v=values: t.append_column("age", pa.array(v)))
    seal(folder)
    assert bad_files(folder) == {"shards/00001/obs.parquet": "its columns have other types than in the shards before"}


@pytest.mark.parametrize("name", ["genes.parquet", "shards/00002/obs.parquet"])
def test_a_table_that_is_no_parquet(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"\x5a" * 100)
    seal(folder)
    assert "parquet" in bad_files(folder)[name]


def test_all_bad_files_are_named(folder: Path) -> None:
    names = ["genes.parquet", "shards/00000/counts.bin", "shards/00002/indptr.bin", "shards/00002/obs.parquet"]
    for name in names:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 4
        (folder / name).write_bytes(data)
    (folder / "shards/00001/totals.bin").unlink()
    (folder / "shards/00001/indices.bin").write_bytes(b"")
    found = bad_files(folder)
    assert set(found) == {*names, "shards/00001/totals.bin", "shards/00001/indices.bin"}
    assert {found[name] for name in names} == {"its content does not fit its checksum"}
    assert found["shards/00001/totals.bin"] == "the file is missing"


@pytest.mark.parametrize("workers", [1, 4])
def test_the_first_one_is_the_same_for_any_workers(folder: Path, workers: int) -> None:
    for name in ("shards/00002/counts.bin", "shards/00000/totals.bin"):
        change(folder / name, "u1", lambda a: a.__setitem__(0, a[0] ^ 1))
    assert list(bad_files(folder, workers=workers)) == ["shards/00000/totals.bin", "shards/00002/counts.bin"]


def test_a_file_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = verify.hash_with_progress

    def fail(path: Path, progress: Any) -> str:
        if path.name == "genes.parquet":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, progress)

    monkeypatch.setattr(verify, "hash_with_progress", fail)
    assert bad_files(folder) == {"genes.parquet": "it cannot be read (Input/output error)"}


def test_links_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "genes.parquet").rename(tmp_path / "elsewhere")
    (folder / "genes.parquet").symlink_to(tmp_path / "elsewhere")
    assert "a symbolic link" in bad_files(folder)["genes.parquet"]


def test_a_sealed_manifest_that_does_not_fit(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["nnz"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    seal(folder)
    assert bad_files(folder) == {
        "manifest.json": "nnz must be the sum over the shards; convert the files again",
    }


def test_no_manifest(folder: Path, tmp_path: Path) -> None:
    (folder / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="manifest.json: not readable as JSON"):
        verify_store(folder)
    with pytest.raises(InputError, match="nowhere does not exist"):
        verify_store(tmp_path / "nowhere")
