"""A ranked cache killed while it is built leaves nothing that opens, and the same call ends with the same bytes."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from celltron.cells import CellStore, RankTokenizer, TokenCache
from celltron.core import InputError, verify_artefact

KILLED = -9
NUM_CELLS, RUN_CELLS = 120, 9
MAX_LENGTH, OLD_MAX_LENGTH = 40, 20
FEWEST_KILLS, FEWEST_KILLS_REPLACING = 15, 8
FilesOf = Callable[[Path], dict[str, bytes]]


@pytest.fixture(scope="module")
def store(slow_writers, sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> CellStore:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("store") / "a.store"
    slow_writers.run("run_convert", here=True, sources=sources, out=str(path), shard_cells=50)
    return CellStore.open(path)


@pytest.fixture(scope="module")
def opens(store: CellStore) -> Callable[[Path], bool]:
    """Whether a folder opens as the new cache; if it does, it is whole."""
    tokenizer = RankTokenizer.from_store(store, max_length=MAX_LENGTH)

    def opens(path: Path) -> bool:
        try:
            cache = TokenCache.open(path, store, tokenizer)
        except InputError:
            return False
        cache.verify()
        return True

    return opens


@pytest.mark.parametrize("replace", [False, True])
def test_killed_and_called_again(  # type: ignore[no-untyped-def]
    slow_writers, store: CellStore, opens: Callable[[Path], bool], files_of: FilesOf, tmp_path: Path, replace: bool
) -> None:
    """Every other build is killed once more; with ``replace``, an old cache is there until the new one is."""
    old, whole, out, partial = (tmp_path / name for name in ("old", "whole", "cache", ".cache.partial"))
    numbers = iter(range(10))

    def tokenize(path: Path, max_length: int = MAX_LENGTH, **more: Any) -> dict[str, Any]:
        answer: dict[str, Any] = slow_writers.run(
            "run_tokenize", store=str(store.path), out=str(path), max_length=max_length, run_cells=RUN_CELLS, **more
        )
        return answer

    def begin(path: Path) -> Path:
        return Path(shutil.copytree(old, path)) if replace else path

    tokenize(old, OLD_MAX_LENGTH, here=True)
    tokenize(whole, here=True)
    moments = slow_writers.kill_times(
        lambda: tokenize(begin(tmp_path / f"{next(numbers)}"), replace=replace), seed=10 + replace
    )
    moments = moments[::3] if replace else moments
    caches = [files_of(old), files_of(whole)] if replace else [files_of(whole)]
    num_killed = num_partial = num_gone_on = 0
    for number, moment in enumerate(moments):
        begin(out)
        for kill_after in [moment, moment][: 1 + number % 2]:
            if out.exists() and not replace:
                break
            answer = tokenize(out, replace=replace, kill_after=kill_after)
            num_killed += answer["code"] == KILLED
            num_partial += partial.exists()
            if replace or out.exists():
                assert files_of(out) in caches
                verify_artefact(out)
            assert opens(out) == (files_of(out) == caches[-1])
            opens(partial)
        if replace or not out.exists():
            answer = tokenize(out, replace=replace)
            assert answer["code"] == 0, answer["error"]
            num_gone_on += answer["result"]["cells_tokenized"] < NUM_CELLS
        assert files_of(out) == caches[-1] and opens(out)
        assert not partial.exists()
        shutil.rmtree(out)
    assert num_killed >= (FEWEST_KILLS_REPLACING if replace else FEWEST_KILLS)
    assert num_partial >= len(moments) * 0.75 and num_gone_on >= len(moments) * 0.25
