"""A network that is lost while sources behind an address are read: the same call goes on from complete shards."""

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from celltron.cells import CellStore, append, convert
from celltron.cells.ingest import remote
from celltron.cells.ingest.remote import UnreachableError

ADDRESS = "memory://lost/a.h5ad"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(tmp_path: Path, write_h5ad, counts, genes, obs) -> Iterator[Path]:  # type: ignore[no-untyped-def]
    """120 cells, here and behind `ADDRESS`."""
    path = write_h5ad(tmp_path / "a.h5ad", counts[:120], genes, obs=obs[:120])
    memory = fsspec.filesystem("memory")
    memory.pipe("/lost/a.h5ad", path.read_bytes())
    yield path
    memory.rm("/lost", recursive=True)


@pytest.fixture
def lose(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[int]]:
    """After so many requests none is answered; gives the list of those that were."""
    monkeypatch.setattr(remote, "BLOCK_BYTES", 2**12)
    monkeypatch.setattr(remote, "BLOCKS_AHEAD", 1)
    monkeypatch.setattr(remote, "KEPT_BLOCKS", 4)
    answer = MemoryFileSystem.cat_ranges

    def after(most: int | None) -> list[int]:
        answered: list[int] = []

        def cat_ranges(self: Any, paths: Any, *arguments: Any, **more: Any) -> Any:
            if most is not None and len(answered) >= most:
                raise ConnectionError("the line is dead")
            answered.append(len(paths))
            return answer(self, paths, *arguments, **more)

        monkeypatch.setattr(MemoryFileSystem, "cat_ranges", cat_ranges)
        return answered

    return after


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_call_goes_on(source: Path, tmp_path: Path, lose: Any, workers: int) -> None:
    """Whenever the network goes: at every eighth request of the whole conversion."""
    convert(source, tmp_path / "whole.store", shard_cells=20)
    whole = files_of(tmp_path / "whole.store")
    answered = lose(None)
    convert(ADDRESS, tmp_path / "b.store", shard_cells=20, workers=1)
    assert files_of(tmp_path / "b.store") == whole and len(answered) > 20
    kept = []
    for most in itertools.count(workers, 8):
        lose(most)
        out, partial = tmp_path / f"{most}.store", tmp_path / f".{most}.store.partial"
        try:
            convert(ADDRESS, out, shard_cells=20, workers=workers)
            break
        except UnreachableError as error:
            assert "the line is dead" in str(error) and not out.exists()
            assert ("the same command goes on" in str(error)) == partial.exists()
        lose(None)
        report = convert(ADDRESS, out, shard_cells=20, workers=workers)
        kept.append(report.shards_kept)
        assert files_of(out) == whole and not partial.exists()
    assert kept[0] == 0 and max(kept) >= 3


def test_an_append_goes_on_too(source: Path, tmp_path: Path, lose: Any, counts: np.ndarray) -> None:
    other = anndata.read_h5ad(source)[:50].copy()
    other.obs_names = [f"other{i}" for i in range(50)]
    other.write_h5ad(tmp_path / "old.h5ad")
    convert(tmp_path / "old.h5ad", tmp_path / "a.store", shard_cells=20)
    whole = Path(shutil.copytree(tmp_path / "a.store", tmp_path / "b.store"))
    answered = lose(None)
    append(whole, ADDRESS, shard_cells=20, workers=1)
    before = files_of(tmp_path / "a.store")
    lose(len(answered) - 3)
    with pytest.raises(UnreachableError, match=r"the line is dead.*; the same command goes on with .*a.store"):
        append(tmp_path / "a.store", ADDRESS, shard_cells=20, workers=1)
    after = files_of(tmp_path / "a.store")
    assert {name: data for name, data in after.items() if not name.startswith(".append/")} == before
    assert len(CellStore.open(tmp_path / "a.store")) == 50
    lose(None)
    assert append(tmp_path / "a.store", ADDRESS, shard_cells=20, workers=1).shards_kept >= 3
    assert files_of(tmp_path / "a.store") == files_of(whole)
