"""Sources opened when they are used and closed when others are: a thousand of them never are open at once."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from celltron.cells.ingest.open import open_source
from celltron.cells.ingest.source import Source, SourceOptions
from celltron.core import InputError


@dataclass(slots=True)
class _Slot:
    """One source: open or not yet, ready for its rows or not, and how many threads use it now."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    source: Source | None = None
    is_prepared: bool = False
    num_users: int = 0


class SourcePool:
    """Opens sources for several threads; each thread uses one at a time.

    Args:
        specs: what `open_source` opens.
        options: what to take from each.
        scratch: a folder in which each source gets one of its own.
        most_idle: how many sources stay open though no thread uses them, in case one does again.
    """

    def __init__(self, specs: Sequence[str], options: SourceOptions, scratch: Path, *, most_idle: int) -> None:
        self.specs = list(specs)
        self._options = options
        self._scratch = scratch
        self._most_idle = most_idle
        self._lock = threading.Lock()
        self._slots: OrderedDict[int, _Slot] = OrderedDict()
        self._identities: dict[int, dict[str, Any]] = {}

    @contextmanager
    def use(self, i: int, *, prepared: bool = False) -> Iterator[Source]:
        """Source ``i``, open within the block; with ``prepared``, its rows can be read."""
        with self._lock:
            slot = self._slots.setdefault(i, _Slot())
            slot.num_users += 1
            self._slots.move_to_end(i)
        try:
            with slot.lock:
                if slot.source is None:
                    slot.source = open_source(self.specs[i], self._options)
                    self._check_identity(i, slot.source)
                if prepared and not slot.is_prepared:
                    slot.source.prepare(self._scratch / f"{i:05d}")
                    slot.is_prepared = True
            yield slot.source
        finally:
            with self._lock:
                slot.num_users -= 1
                self._close_idle(self._most_idle)

    def _check_identity(self, i: int, source: Source) -> None:
        identity = source.identity()
        if self._identities.setdefault(i, identity) != identity:
            raise InputError(f"{source.name} changed while it was converted: convert it again")

    def close(self) -> None:
        """Close every source that no thread uses."""
        with self._lock:
            self._close_idle(0)

    def _close_idle(self, most: int) -> None:
        """Close sources that nobody uses, the one used longest ago first; the lock is held."""
        idle = [i for i, slot in self._slots.items() if slot.num_users == 0]
        for i in idle[: max(0, len(idle) - most)]:
            slot = self._slots.pop(i)
            if slot.source is not None:
                slot.source.close()
