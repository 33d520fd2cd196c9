"""The ranked cache: the tokens of every cell of a store, ragged on disk, so that a training read is a copy.

A folder of format ``celltron-tokens``, version 1. Runs of ``run_cells`` cells, each ``runs/00000.tokens.bin`` (uint16
or uint32, the cells' tokens one after the other) and ``runs/00000.ends.bin`` (uint64 [C+1], where each cell begins and
ends). The manifest names the store and every setting of the tokeniser by fingerprint; a cache of anything else is
refused. While it is built, ``work/`` holds what decides its content and the checksums of each complete run, by which a
later build goes on.

C cells of a run, T their tokens, R runs.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from celltron.cells.compiled import compiled
from celltron.cells.memory import address_of, array_at
from celltron.cells.reader import CellReader
from celltron.cells.shard import map_file
from celltron.cells.threads import map_in_order, num_workers
from celltron.cells.token_rows import TokenRows
from celltron.cells.tokenize import RankTokenizer
from celltron.core import (
    BeingWrittenError,
    InputError,
    __version__,
    read_manifest,
    verify_artefact,
    write_artefact,
    write_atomically,
)
from celltron.core.durable import FileEntry, HashedFile, hash_file

FORMAT = "celltron-tokens"
VERSION = 1
RUNS, WORK = "runs", "work"
RUN_CELLS = 2**19
PIECE_CELLS = 2048
POLL_SECONDS = 1.0
_building = threading.Lock()  # other processes are kept away by the artefact's own lock
_UINT64 = np.empty(0, dtype=np.uint64)
Progress = Callable[[int, int], None]


class _Runs(NamedTuple):
    """For each run its number of tokens, and the addresses of its two arrays."""

    num_tokens: npt.NDArray[np.int64]
    ends: npt.NDArray[np.uint64]
    tokens: npt.NDArray[np.uint64]


@compiled
def _locate(
    cells: npt.NDArray[np.int64],
    run_cells: int,
    runs: _Runs,
    item_bytes: int,
    max_length: int,
    ends_like: npt.NDArray[np.uint64],
    out: tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32]],
) -> int:
    """Fill ``out`` with addresses and lengths; returns the first run with a cell that ends where it cannot, or -1."""
    addresses, lengths = out
    for k in range(cells.shape[0]):
        run = cells[k] // run_cells
        local = cells[k] - run * run_cells
        ends = array_at(runs.ends[run] + np.uint64(8 * local), 2, ends_like)
        begin, end = np.int64(ends[0]), np.int64(ends[1])
        if begin < 0 or end < begin or end > runs.num_tokens[run] or end - begin > max_length:
            return int(run)
        addresses[k] = runs.tokens[run] + np.uint64(begin * item_bytes)
        lengths[k] = end - begin
    return -1


class TokenCache:
    """The tokens of the cells of one store under one tokeniser; see `open_or_build_cache`."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.dtype = str(manifest["dtype"])
        self.num_tokens = int(manifest["tokens"])
        self._run_cells = int(manifest["run_cells"])
        self._max_length = int(manifest["tokenizer"]["max_length"])
        runs, self._memory = manifest["runs"], []
        self._runs = _Runs(
            np.zeros(len(runs), np.int64), np.zeros(len(runs), np.uint64), np.zeros(len(runs), np.uint64)
        )
        for i, run in enumerate(runs):
            ends = map_file(path / _name(i, "ends"), "uint64", run["cells"] + 1)
            tokens = map_file(path / _name(i, "tokens"), self.dtype, run["tokens"])
            self._memory += [ends, tokens]
            self._runs.num_tokens[i] = run["tokens"]
            self._runs.ends[i], self._runs.tokens[i] = address_of(ends), address_of(tokens)

    @classmethod
    def open(cls, path: str | Path, store: CellReader, tokenizer: RankTokenizer) -> "TokenCache":
        """Open a cache; one that was made from another store, vocabulary or setting is refused, and so is a cut one."""
        path = Path(path)
        manifest = read_manifest(path, format=FORMAT, versions={VERSION})
        _check_manifest(path, manifest)
        if manifest["store"] != store.fingerprint or manifest["cells"] != len(store):
            raise InputError(
                f"{path} holds tokens of another store than {store.name}: remove it, or name another cache"
            )
        theirs, ours = manifest["tokenizer"], json.loads(json.dumps(tokenizer.to_dict()))
        different = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
        if different:
            raise InputError(
                f"{path} is stale: its tokens were made with another {', '.join(different)}; remove it, or name "
                "another cache"
            )
        return cls(path, manifest)

    def encode(self, store: CellReader, cells: npt.NDArray[np.int64]) -> TokenRows:
        """As `RankTokenizer.encode`: where the tokens of cells (checked numbers) lie."""
        addresses, lengths = np.empty(len(cells), dtype=np.uint64), np.empty(len(cells), dtype=np.int32)
        item_bytes = np.dtype(self.dtype).itemsize
        bad = _locate(cells, self._run_cells, self._runs, item_bytes, self._max_length, _UINT64, (addresses, lengths))
        if bad >= 0:
            raise InputError(
                f"{self.path / _name(bad, 'ends')} is damaged: a cell ends where it cannot; remove the cache and build "
                "it again"
            )
        return TokenRows(addresses, lengths, self.dtype, (self,))

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Compare every file with its checksum."""
        verify_artefact(self.path, progress=progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Build:
    """Writes runs into the partial folder, each with the checksums of its files, by which a later build goes on."""

    store: CellReader
    tokenizer: RankTokenizer
    folder: Path
    dtype: str
    workers: int
    progress: Progress | None

    def begin(self, content: dict[str, Any]) -> None:
        """Keep what is in the folder if it is of a build of the same content; else remove it."""
        path, wanted = self.folder / WORK / "content.json", json.dumps(content).encode()
        if not (path.is_file() and path.read_bytes() == wanted):
            for entry in self.folder.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
            path.parent.mkdir()
            write_atomically(path, wanted)
        (self.folder / RUNS).mkdir(exist_ok=True)

    def run(self, run: int, start: int, stop: int) -> dict[str, FileEntry]:
        """Write the run of the cells ``start .. stop`` unless it is there; the entries of its two files."""
        path = self.folder / WORK / f"{run:05d}.json"
        entries = self._kept(run, path)
        if entries is None:
            entries = self._write(run, start, stop)
            # Not pushed to the disk: what a machine that failed lost does not fit the checksums.
            write_atomically(path, json.dumps(entries), sync=False)
        else:
            self._tell(stop)
        return entries

    def _kept(self, run: int, path: Path) -> dict[str, FileEntry] | None:
        """The entries of a run that is complete, its files compared with them; None where it is to be made."""
        try:
            recorded = json.loads(path.read_bytes())
            found = {name: hash_file(self.folder / name) for name in (_name(run, "tokens"), _name(run, "ends"))}
        except (OSError, ValueError):
            return None
        return found if found == recorded else None

    def _write(self, run: int, start: int, stop: int) -> dict[str, FileEntry]:
        pieces = [np.arange(at, min(at + PIECE_CELLS, stop)) for at in range(start, stop, PIECE_CELLS)]
        tokenised = map_in_order(lambda cells: self.tokenizer.tokenize(self.store, cells), pieces, self.workers)
        token_type = np.dtype(self.dtype).newbyteorder("<")
        names = _name(run, "tokens"), _name(run, "ends")
        with HashedFile(self.folder / names[0]) as tokens_file, HashedFile(self.folder / names[1]) as ends_file:
            ends = np.zeros(1, dtype=np.int64)
            ends_file.write(ends.astype("<u8"))
            for cells, (tokens, lengths) in zip(pieces, tokenised, strict=True):
                ends = ends[-1] + np.cumsum(lengths, dtype=np.int64)
                tokens_file.write(tokens.astype(token_type))
                ends_file.write(ends.astype("<u8"))
                self._tell(int(cells[-1]) + 1)
        return dict(zip(names, (tokens_file.entry(), ends_file.entry()), strict=True))

    def _tell(self, done: int) -> None:
        if self.progress is not None:
            self.progress(done, len(self.store))


def build_token_cache(
    store: CellReader,
    tokenizer: RankTokenizer,
    out: str | Path,
    *,
    run_cells: int = RUN_CELLS,
    workers: int | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> TokenCache:
    """Tokenise every cell of a store; nothing that opens is at ``out`` until all is there.

    A build that is stopped or killed leaves ``.NAME.partial`` beside it, and the same call goes on with the runs that
    are complete there; the cache is the same, byte for byte.

    Args:
        store: where the counts are.
        tokenizer: made for the store's genes.
        out: folder to make.
        run_cells: cells in a run; the last one may be smaller.
        workers: threads; None takes one a processor. The files do not depend on it.
        replace: replace a cache at ``out`` once the new one is complete.
        progress: called with (cells done, cells in all).
    """
    if run_cells < 1:
        raise InputError(f"run_cells is {run_cells}: wanted 1 or more cells in a run")
    workers = num_workers(workers)
    num_cells = len(store)
    dtype = "uint16" if len(tokenizer.vocabulary) <= 1 << 16 else "uint32"
    content = {"cells": num_cells, "run_cells": run_cells, "dtype": dtype}
    content |= {"store": store.fingerprint, "tokenizer": tokenizer.to_dict()}
    runs = []
    with write_artefact(Path(out), format=FORMAT, version=VERSION, replace=replace, resume=True) as artefact:
        build = _Build(
            store=store, tokenizer=tokenizer, folder=artefact.folder, dtype=dtype, workers=workers, progress=progress
        )
        build.begin(content | {"made_by": [FORMAT, VERSION, __version__]})
        for i, start in enumerate(range(0, num_cells, run_cells)):
            stop = min(start + run_cells, num_cells)
            entries = build.run(i, start, stop)
            num_tokens = entries[_name(i, "tokens")]["bytes"] // np.dtype(dtype).itemsize
            runs.append({"cells": stop - start, "tokens": num_tokens})
            artefact.files |= entries
        artefact.meta |= content | {"tokens": sum(run["tokens"] for run in runs), "runs": runs}
        artefact.remove.append(WORK)
    return TokenCache.open(out, store, tokenizer)


def default_cache_path(store: CellReader, tokenizer: RankTokenizer) -> Path:
    """``<store>.tokens/<fingerprint>``: beside the store, a folder for each tokeniser."""
    if "://" in store.name:
        raise InputError(
            f"{store.name} is an address, beside which no cache can stand: give the cache a path of its own"
        )
    return Path(f"{store.name}.tokens") / tokenizer.fingerprint[:16]


def open_or_build_cache(
    store: CellReader, tokenizer: RankTokenizer, where: bool | str | Path, *, progress: Progress | None = None
) -> TokenCache:
    """Open the cache of a store, or build it if it is not there; one process builds, the others wait for it.

    Args:
        store: where the counts are.
        tokenizer: made for the store's genes.
        where: its folder; True takes ``<store>.tokens/<fingerprint>``, so that tokenisers do not meet.
        progress: called with (cells done, cells in all) while it is built.
    """
    path = default_cache_path(store, tokenizer) if where is True else Path(str(where))
    while not path.exists():
        try:
            with _building:
                if not path.exists():
                    return build_token_cache(store, tokenizer, path, progress=progress)
        except BeingWrittenError:
            time.sleep(POLL_SECONDS)
    return TokenCache.open(path, store, tokenizer)


def _name(run: int, kind: str) -> str:
    return f"{RUNS}/{run:05d}.{kind}.bin"


def _check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """A manifest is untrusted: sizes, types and lengths must agree before an array is mapped."""

    def demand(true: bool, what: str) -> None:
        if not true:
            raise InputError(f"{path / 'manifest.json'} is damaged: {what}; remove the cache and build it again")

    def is_count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62

    dtype, runs, tokenizer = manifest.get("dtype"), manifest.get("runs"), manifest.get("tokenizer")
    run_cells = manifest.get("run_cells")
    demand(dtype in ("uint16", "uint32"), "the type of its tokens must be uint16 or uint32")
    demand(isinstance(tokenizer, dict) and is_count(tokenizer.get("max_length")), "it must say max_length")
    good = isinstance(runs, list) and all(is_count(manifest.get(key)) for key in ("cells", "tokens"))
    demand(good, "it must list its runs and say how many cells and tokens it has")
    demand(is_count(run_cells) and run_cells != 0, "run_cells must be how many cells a run has")
    assert isinstance(runs, list) and isinstance(dtype, str) and isinstance(run_cells, int), manifest
    for i, run in enumerate(runs):
        good = isinstance(run, dict) and is_count(run.get("cells")) and is_count(run.get("tokens"))
        demand(good, f"run {i} must say how many cells and tokens it has")
        last = i == len(runs) - 1
        demand(0 < run["cells"] <= run_cells if last else run["cells"] == run_cells, f"run {i} has a wrong size")
        lengths = {"ends": 8 * (run["cells"] + 1), "tokens": np.dtype(dtype).itemsize * run["tokens"]}
        for kind, wanted in lengths.items():
            entry = manifest["files"].get(_name(i, kind))
            demand(entry is not None and entry["bytes"] == wanted, f"{_name(i, kind)} must have {wanted} bytes")
    demand(sum(run["cells"] for run in runs) == manifest["cells"], "cells must be the sum over the runs")
