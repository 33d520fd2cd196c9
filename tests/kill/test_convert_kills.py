"""A conversion killed at any moment leaves nothing that opens, and the same command ends with the same bytes."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from celltron.cells import CellStore
from celltron.core import InputError, verify_artefact

KILLED = -9
FilesOf = Callable[[Path], dict[str, bytes]]


@pytest.mark.parametrize("replace", [False, True])
def test_killed_and_called_again(  # type: ignore[no-untyped-def]
    slow_writers, sources: list[str], files_of: FilesOf, tmp_path: Path, replace: bool
) -> None:
    """Every fourth run is killed once more on its way; with ``replace``, an old store is there until the new one is."""
    old, whole, out = tmp_path / "old.store", tmp_path / "whole.store", tmp_path / "a.store"
    numbers = iter(range(10))

    def convert(path: Path, **more: Any) -> dict[str, Any]:
        answer: dict[str, Any] = slow_writers.run(
            "run_convert", sources=sources, out=str(path), shard_cells=9, replace=replace, **more
        )
        return answer

    slow_writers.run("run_convert", here=True, sources=sources[:1], out=str(old), shard_cells=20)
    slow_writers.run("run_convert", here=True, sources=sources, out=str(whole), shard_cells=9)
    moments = slow_writers.kill_times(lambda: convert(tmp_path / f"{next(numbers)}.store"), seed=replace)
    wanted = files_of(whole)
    num_killed = num_gone_on = 0
    moments = moments[::4] if replace else moments
    for number, moment in enumerate(moments):
        if replace:
            slow_writers.run("run_convert", here=True, sources=sources[:1], out=str(out), shard_cells=20, replace=True)
        for kill_after in [moment, moment][: 1 + (number % 4 == 0)]:
            answer = convert(out, kill_after=kill_after)
            num_killed += answer["code"] == KILLED
            check_what_is_there(out, files_of, wanted, files_of(old) if replace else None)
        if answer["code"] == KILLED and files_of(out) != wanted:
            answer = convert(out)
            assert answer["code"] == 0, answer["error"]
            num_gone_on += answer["result"]["shards_kept"] > 0
        assert files_of(out) == wanted
        assert not (tmp_path / ".a.store.partial").exists()
        verify_artefact(out)
        shutil.rmtree(out)
    assert num_killed >= len(moments) * 0.75 and num_gone_on >= len(moments) * 0.25


def check_what_is_there(out: Path, files_of: FilesOf, wanted: dict[str, bytes], old: dict[str, bytes] | None) -> None:
    """Nothing, or the old store, or the new one: whole."""
    if old is None and not out.exists():
        with pytest.raises(InputError, match="does not exist"):
            CellStore.open(out)
        return
    found = files_of(out)
    assert found == wanted or found == old
    assert len(CellStore.open(out)) == (120 if found == wanted else 40)
