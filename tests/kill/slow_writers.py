"""Conversions and the like slow enough to be killed in the middle: what the kill tests run through forks.py."""

import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from celltron.cells import CellStore, RankTokenizer, append, build_token_cache, convert, source_pool, token_cache
from celltron.cells.ingest import anndata_matrix
from celltron.cells.ingest.source import RowBlock
from celltron.core import artefact
from celltron.core.durable import HashedFile

BLOCK_VALUES = 150
BLOCK_SECONDS = 0.006
PIECE_CELLS = 4
WRITE_SECONDS = 0.002
STEP_SECONDS = 0.005
open_source = source_pool.open_source


class SlowSource:
    """A source that takes its time over every block."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def blocks(self, start: int, stop: int) -> Iterator[RowBlock]:
        for block in self._source.blocks(start, stop):
            time.sleep(BLOCK_SECONDS)
            yield block


class SlowFile(HashedFile):
    """A file that takes its time over every piece, and has it on disk then."""

    def write(self, data: Any) -> int:
        num_bytes = super().write(data)
        self.flush()
        time.sleep(WRITE_SECONDS)
        return num_bytes


class WatchedTokenizer:
    """A tokeniser that knows how many cells it was asked for."""

    def __init__(self, tokenizer: RankTokenizer) -> None:
        self._tokenizer = tokenizer
        self.asked: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def tokenize(self, store: CellStore, cells: Any) -> Any:
        self.asked.append(len(cells))
        return self._tokenizer.tokenize(store, cells)


def slow(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step with time before and after it."""

    @functools.wraps(step)
    def slowed(*arguments: Any, **keywords: Any) -> Any:
        time.sleep(STEP_SECONDS)
        result = step(*arguments, **keywords)
        time.sleep(STEP_SECONDS)
        return result

    return slowed


anndata_matrix.BLOCK_VALUES = BLOCK_VALUES
source_pool.open_source = lambda spec, options: SlowSource(open_source(spec, options))
token_cache.PIECE_CELLS = PIECE_CELLS
token_cache.HashedFile = SlowFile
# What a process handed to the system outlives the process; only a failing machine would lose it.
os.fsync = lambda descriptor: None


def run_convert(sources: list[str], out: str, **options: Any) -> dict[str, Any]:
    """Convert; how many shards were there already."""
    report = convert(sources, out, workers=2, **options)
    return {"shards_kept": report.shards_kept}


def run_append(store: str, sources: list[str], **options: Any) -> dict[str, Any]:
    """Append; how many shards were there already, and how many cells were added."""
    report = append(store, sources, workers=2, **options)
    return {"shards_kept": report.shards_kept, "cells": report.num_cells}


@functools.cache
def open_for_tokens(store: str, max_length: int) -> tuple[CellStore, RankTokenizer]:
    """A store and a tokeniser of its own genes."""
    opened = CellStore.open(store)
    return opened, RankTokenizer.from_store(opened, max_length=max_length)


def run_tokenize(store: str, out: str, max_length: int, **options: Any) -> dict[str, Any]:
    """Build a ranked cache; how many cells were tokenised for it."""
    cells, tokenizer = open_for_tokens(store, max_length)
    watched = WatchedTokenizer(tokenizer)
    last_steps = {name: slow(getattr(artefact, name)) for name in ("sync_tree", "_remove", "exchange_folders")}
    with mock.patch.multiple(artefact, **last_steps):
        build_token_cache(cells, watched, out, workers=2, **options)
    return {"cells_tokenized": sum(watched.asked)}
