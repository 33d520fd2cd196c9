"""An append killed at any moment leaves the old store or the new one, and the same command ends as if undisturbed."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celltron.cells import CellStore
from celltron.core import verify_artefact

KILLED = -9
OLD_CELLS, ALL_CELLS = 40, 120


def test_killed_and_called_again(  # type: ignore[no-untyped-def]
    slow_writers, sources: list[str], files_of: Callable[[Path], dict[str, bytes]], tmp_path: Path
) -> None:
    """Every fourth run is killed once more on its way."""
    old, whole, path = tmp_path / "old.store", tmp_path / "whole.store", tmp_path / "a.store"
    numbers = iter(range(10))

    def append(store: Path, **more: Any) -> dict[str, Any]:
        answer: dict[str, Any] = slow_writers.run(
            "run_append", store=str(store), sources=sources[1:], shard_cells=7, **more
        )
        return answer

    slow_writers.run("run_convert", here=True, sources=sources[:1], out=str(old), shard_cells=9)
    append(Path(shutil.copytree(old, whole)), here=True)
    moments = slow_writers.kill_times(
        lambda: append(Path(shutil.copytree(old, tmp_path / f"{next(numbers)}.store"))), seed=3
    )
    before, after = files_of(old), files_of(whole)
    num_killed = num_gone_on = 0
    for number, moment in enumerate(moments):
        shutil.copytree(old, path)
        for kill_after in [moment, moment][: 1 + (number % 4 == 0)]:
            if is_complete(path):
                break
            answer = append(path, kill_after=kill_after)
            num_killed += answer["code"] == KILLED
            verify_artefact(path)
            found = files_of(path)
            is_old = found["manifest.json"] == before["manifest.json"]
            assert is_old or found["manifest.json"] == after["manifest.json"]
            listed = before if is_old else after
            assert {name: found[name] for name in listed} == listed
            assert len(CellStore.open(path)) == (OLD_CELLS if is_old else ALL_CELLS)
        if not is_complete(path):
            answer = append(path)
            assert answer["code"] == 0, answer["error"]
            assert answer["result"]["cells"] == ALL_CELLS - OLD_CELLS
            num_gone_on += answer["result"]["shards_kept"] > 0
        assert files_of(path) == after and is_complete(path)
        shutil.rmtree(path)
    assert num_killed >= len(moments) * 0.75 and num_gone_on >= len(moments) * 0.25


def is_complete(path: Path) -> bool:
    """Whether the append has come to its end: then the same command would be refused."""
    return len(CellStore.open(path)) == ALL_CELLS and not (path / ".append").exists()
