"""A plan carried out: shards written by several threads, in a folder where the next run goes on if this one breaks off.

The folder holds ``shards/00000/…`` as the store will, and in ``work/`` the plan, a record of each complete shard, and
the sources' scratch folders.
"""

import json
import queue
import shutil
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from celltron.cells.convert_plan import Plan
from celltron.cells.ingest.checks import check_cell_ids, describe_bad_value
from celltron.cells.map_rows import BadValue, MappedRows, Types, make_room, map_rows, widest
from celltron.cells.shard import shard_folder
from celltron.cells.source_pool import SourcePool
from celltron.cells.store_writer import ShardRecord, ShardWriter, read_record, write_record
from celltron.cells.threads import map_in_order
from celltron.core import InputError, write_atomically
from celltron.core.durable import FileEntry

WORK = "work"
OBS_ROWS = 2**16
"""Cells in one row group of a shard's obs: what is in memory at once of it."""
Progress = Callable[[int, int], None]
Tell = Callable[[int], None]
Result = TypeVar("Result")


class _StoppedError(Exception):
    """Ends a thread's work when another one failed or a person stopped all."""


@dataclass(slots=True)
class Written:
    """All shards of a plan: their records in order, and how many a broken-off run had left complete."""

    records: list[ShardRecord]
    num_cells: npt.NDArray[np.int64]
    """int64 [G]: the cells in which each gene is not zero."""
    num_kept: int = 0
    cells_kept: int = 0

    @property
    def types(self) -> Types:
        """The smallest types that hold every shard."""
        types = Types()
        for record in self.records:
            types = widest(types, record.types)
        return types

    @property
    def unmapped_counts(self) -> float:
        """Counts of genes that the store lacks."""
        return sum(record.unmapped_counts for record in self.records)

    def files(self, first: int) -> dict[str, FileEntry]:
        """The entries of the manifest, by relative name; ``first`` is the number of the first shard."""
        return {
            f"shards/{first + i:05d}/{name}": entry
            for i, record in enumerate(self.records)
            for name, entry in record.files.items()
        }


class Workplace:
    """The folder in which a plan is carried out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scratch = folder / WORK / "scratch"

    @property
    def is_begun(self) -> bool:
        """Whether a broken-off run left something here."""
        return any(self.folder.iterdir())

    def plan_of_before(self) -> Any:
        """The description of the plan that a broken-off run followed; None where there is none that can be read."""
        try:
            return json.loads((self.folder / WORK / "plan.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def adopt(self, plan: Plan) -> bool:
        """Take over what a run with the same plan left and remove everything else; True if another plan was dropped."""
        description = plan.description()
        is_same = self.plan_of_before() == description
        is_dropped = (self.folder / WORK).exists() and not is_same
        keep = {WORK, "shards"} if is_same else set()
        for path in self.folder.iterdir():
            if path.name not in keep:
                _remove(path)
        (self.folder / WORK).mkdir(exist_ok=True)
        if not is_same:
            write_atomically(self.folder / WORK / "plan.json", json.dumps(description))
        return is_dropped

    def begun_shards(self, plan: Plan) -> list[int]:
        """The shards of the plan of which there is a record."""
        return [shard for shard in plan.shards if self.record_path(shard).exists()]

    def record_path(self, shard: int) -> Path:
        """Where the record of a shard is."""
        return self.folder / WORK / f"{shard:05d}.json"

    def num_cells_path(self, shard: int) -> Path:
        """Where the numbers of cells of each gene are, int64 [G], of a shard."""
        return self.folder / WORK / f"{shard:05d}.num_cells"

    def read_record(self, shard: int) -> ShardRecord | None:
        """The record of a complete shard, its files checked; None where it is to be made."""
        return read_record(self.record_path(shard), self.num_cells_path(shard), shard_folder(self.folder, shard))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_shards(plan: Plan, pool: SourcePool, place: Workplace, *, workers: int, progress: Progress | None) -> Written:
    """Write every shard of the plan that is not there already.

    Args:
        plan: what to write; its description is that of ``place``.
        pool: the plan's sources.
        place: the folder to write in.
        workers: how many shards are written at once, each by one thread while another reads ahead; the result does not
            depend on it.
        progress: called in this thread with (cells done, cells in all).
    """
    done = 0

    def tell(amount: int) -> None:
        nonlocal done
        done += amount
        if progress is not None and amount:
            progress(done, plan.num_cells)

    checks = _in_threads(partial(_keep_shard, place), place.begun_shards(plan), workers, tell)
    records = {shard: record for shard, record in checks if record is not None}
    cells_kept, num_kept = done, len(records)
    missing = [shard for shard in plan.shards if shard not in records]
    _prepare(plan, pool, missing, workers)
    num_sources = len(pool.specs)

    def work(job: int, tell: Tell) -> ShardRecord | None:
        if job >= num_sources:
            return _write_shard(plan, pool, place, job - num_sources, tell)
        # Reading all names takes long; shards are written beside it.
        with pool.use(job) as source:
            check_cell_ids(source)
        return None

    jobs = [*range(num_sources), *(num_sources + shard for shard in missing)]
    for job, record in _in_threads(work, jobs, workers, tell):
        if record is not None:
            records[job - num_sources] = record
    num_cells = np.zeros(len(plan.genes), dtype=np.int64)
    for shard in plan.shards:
        num_cells += np.fromfile(place.num_cells_path(shard), dtype="<i8")
    return Written([records[shard] for shard in plan.shards], num_cells, num_kept, cells_kept)


def _prepare(plan: Plan, pool: SourcePool, shards: Sequence[int], workers: int) -> None:
    """Bring into order what is not ordered by cells, some sources at once."""

    def prepare(i: int) -> None:
        with pool.use(i, prepared=True):
            pass

    numbers = plan.sources_of(shards)
    for _ in map_in_order(prepare, numbers, max(1, min(workers, len(numbers)))):
        pass


def _keep_shard(place: Workplace, shard: int, tell: Tell) -> ShardRecord | None:
    record = place.read_record(shard)
    tell(record.cells if record is not None else 0)
    return record


def _write_shard(plan: Plan, pool: SourcePool, place: Workplace, shard: int, tell: Tell) -> ShardRecord:
    folder = shard_folder(place.folder, shard)
    place.record_path(shard).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    writer = ShardWriter(folder, num_genes=len(plan.genes))
    with closing(_ahead(_read_shard(plan, pool, shard))) as blocks:
        for rows in blocks:
            writer.add(rows)
            tell(len(rows.totals))
    writer.end_rows()
    writer.write_obs(_obs_tables(plan, pool, shard, writer, tell))
    record = writer.finish(place.num_cells_path(shard))
    write_record(record, place.record_path(shard))
    return record


def _read_shard(plan: Plan, pool: SourcePool, shard: int) -> Generator[MappedRows, None, None]:
    room = make_room(len(plan.genes))
    for i, first, end in plan.parts(*plan.span(shard)):
        with pool.use(i, prepared=True) as source:
            for block in source.blocks(first, end):
                assert block.start == first, f"{source.name}: a block from {block.start}, wanted {first}"
                rows = map_rows(block, plan.gene_of_column[i], room, allow_floats=plan.options.allow_floats)
                if isinstance(rows, BadValue):
                    raise InputError(describe_bad_value(source, block, rows))
                yield rows
                first += len(rows.totals)
            assert first == end, f"{source.name}: the blocks end at cell {first}, wanted {end}"


def _ahead(items: Generator[Result, None, None]) -> Generator[Result, None, None]:
    """The same items, each made by another thread while the one before is used."""
    with closing(items), ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _obs_tables(plan: Plan, pool: SourcePool, shard: int, writer: ShardWriter, tell: Tell) -> Iterator[pa.Table]:
    start, stop = plan.span(shard)
    for begin in range(start, stop, OBS_ROWS):
        tables = []
        done = begin - start
        for i, first, end in plan.parts(begin, min(begin + OBS_ROWS, stop)):
            with pool.use(i) as source:
                totals = writer.totals(done, done + end - first)
                tables.append(plan.obs.table(source, plan.sources[i]["name"], first, totals))
            done += end - first
            tell(0)
        yield pa.concat_tables(tables)


def _in_threads(
    work: Callable[[int, Tell], Result], jobs: Sequence[int], workers: int, tell: Tell
) -> Iterator[tuple[int, Result]]:
    """Each job with its result, as they come; jobs begin in order.

    What ``work`` tells with its second argument reaches ``tell`` in this thread; there also is where a job ends when
    another one failed or a person stopped all.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for job in jobs:
        todo.put(job)
    news: queue.SimpleQueue[tuple[str, int, Any]] = queue.SimpleQueue()
    stop = threading.Event()

    def report(amount: int) -> None:
        if stop.is_set():
            raise _StoppedError
        news.put(("told", 0, amount))

    def run() -> None:
        job = -1
        try:
            while not stop.is_set():
                job = todo.get_nowait()
                news.put(("done", job, work(job, report)))
        except (queue.Empty, _StoppedError):
            pass
        except BaseException as error:
            stop.set()
            news.put(("failed", job, error))
        finally:
            news.put(("ended", 0, None))

    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(workers, len(jobs)))]
    failures: list[tuple[int, BaseException]] = []
    try:
        for thread in threads:
            thread.start()
        num_ended = 0
        while num_ended < len(threads):
            kind, job, what = news.get()
            num_ended += kind == "ended"
            if kind == "told":
                tell(what)
            elif kind == "done":
                yield job, what
            elif kind == "failed":
                failures.append((job, what))
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if failures:
        raise min(failures, key=lambda failure: failure[0])[1]
