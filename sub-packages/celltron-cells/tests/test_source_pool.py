import threading
from pathlib import Path
from typing import Any

import pytest

from celltron.cells import source_pool
from celltron.cells.ingest.source import SourceOptions
from celltron.cells.source_pool import SourcePool
from celltron.core import InputError


class Source:
    """Counts how many are open and what was done to it."""

    num_open = most_open = 0

    def __init__(self, spec: str) -> None:
        self.name = spec
        self.prepared: list[Path] = []
        self.version = 1
        Source.num_open += 1
        Source.most_open = max(Source.most_open, Source.num_open)

    def identity(self) -> dict[str, Any]:
        return {"version": versions[self.name]}

    def prepare(self, scratch: Path) -> None:
        self.prepared.append(scratch)

    def close(self) -> None:
        Source.num_open -= 1


versions: dict[str, int] = {}


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> SourcePool:
    Source.num_open = Source.most_open = 0
    versions.update(dict.fromkeys("abcdef", 1))
    monkeypatch.setattr(source_pool, "open_source", lambda spec, options: Source(spec))
    return SourcePool(list("abcdef"), SourceOptions(), Path("scratch"), most_idle=2)


def test_few_stay_open(pool: SourcePool) -> None:
    first: dict[int, Any] = {}
    for i in [0, 1, 2, 3, 4, 5, 4, 5]:
        with pool.use(i) as source:
            assert source.name == "abcdef"[i] and Source.num_open <= 3
            assert first.setdefault(i, source) is source
    with pool.use(0) as source:
        assert source is not first[0]
    assert Source.most_open == 3
    pool.close()
    assert Source.num_open == 0


def test_one_that_is_used_stays_open_and_is_shared(pool: SourcePool) -> None:
    with pool.use(0) as source:
        for i in range(1, 6):
            with pool.use(i):
                pass
        with pool.use(0) as again:
            assert again is source
        pool.close()
        assert Source.num_open == 1
    pool.close()
    assert Source.num_open == 0


def test_each_is_prepared_once_in_a_folder_of_its_own(pool: SourcePool) -> None:
    with pool.use(1) as source:
        assert source.prepared == []  # type: ignore[attr-defined]
    found = []

    def work() -> None:
        with pool.use(1, prepared=True) as source:
            found.append(source)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(source is found[0] for source in found) and found[0].prepared == [Path("scratch/00001")]


def test_a_source_that_changes_between_two_looks_is_refused(pool: SourcePool) -> None:
    with pool.use(0):
        pass
    pool.close()
    versions["a"] = 2
    with pytest.raises(InputError, match="a changed while it was converted"), pool.use(0):
        pass
    pool.close()
    assert Source.num_open == 0
