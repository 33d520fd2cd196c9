"""Conversions and appends slow enough to be killed in the middle: what the kill tests run through forks.py."""

import os
import time
from collections.abc import Iterator
from typing import Any

from celltron.cells import append, convert, source_pool
from celltron.cells.ingest import anndata_matrix
from celltron.cells.ingest.source import RowBlock

BLOCK_VALUES = 150
BLOCK_SECONDS = 0.006
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


anndata_matrix.BLOCK_VALUES = BLOCK_VALUES
source_pool.open_source = lambda spec, options: SlowSource(open_source(spec, options))
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
