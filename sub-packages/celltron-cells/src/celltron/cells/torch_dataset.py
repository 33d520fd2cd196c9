"""The loader's batches as a torch dataset, for training programs built around `torch.utils.data.DataLoader`.

T tokens of all cells, C cells, W worker processes of a `DataLoader`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from celltron.cells.batch import Batch
from celltron.cells.loader import Loader
from celltron.cells.sampler import LoaderState, advance, rank_part
from celltron.core import InputError

try:
    import torch
    from torch.utils.data import IterableDataset, get_worker_info
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise InputError("CellDataset needs torch, which is missing: pip install 'celltron-cells[torch]'") from error


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the next batch begins: that of one worker, or with ``num_workers`` 0 that of all together."""

    state: LoaderState
    worker: int = 0
    num_workers: int = 0


class CellDataset(IterableDataset[dict[str, Any]]):
    """A loader's batches as dicts of tensors, the same ones in the same order for any number of workers.

    Used as ``DataLoader(CellDataset(loader), batch_size=None, num_workers=W)``. Worker w makes global batches w, w + W,
    …, which the `DataLoader` hands out in turn; without workers the loader's own threads make batches ahead. Each batch
    holds ``tokens`` and ``labels`` int32 [T], ``lengths`` int32 [C], ``cells`` and ``epochs`` int64 [C], and ``state``,
    from which `load_state_dict` goes on with the batch after it, whatever the number of workers and ranks.

    Every ``for`` over the `DataLoader` goes from the same state (the loader's, or the one that was loaded) to the end
    of the loader's last epoch: to train for three epochs, make the loader with ``epochs=3`` and loop once.

    Args:
        loader: the dataset's from then on; its rank and world size are those of the data-parallel training.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self._start = self._next = _Place(loader.state)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        return self._all_batches() if info is None else self._batches_of_worker(info.id, info.num_workers)

    def state_dict(self) -> dict[str, int]:
        """Where to go on after the last batch handed out; in a worker process, after the last that it made."""
        place = self._next
        return asdict(place.state) | {"worker": place.worker, "num_workers": place.num_workers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the ``state`` of a batch, or from what `state_dict` gave in the same one of as many workers."""
        wrong = [name for name in ("seed", "epoch", "position") if type(state.get(name)) is not int]
        if wrong:
            raise InputError(f"the dataset's state has no whole number {wrong[0]!r}: load what state_dict returned")
        place = _Place(
            LoaderState(state["seed"], state["epoch"], state["position"]),
            state.get("worker", 0),
            state.get("num_workers", 0),
        )
        info = get_worker_info()
        here = (0, 0) if info is None else (info.id, info.num_workers)
        if place.num_workers and (place.worker, place.num_workers) != here:
            raise InputError(
                f"the dataset's state is that of worker {place.worker} of {place.num_workers}: load it with as many "
                "workers, or load the state of a batch"
            )
        self.loader.seek(place.state)
        self._start = self._next = place

    def _all_batches(self) -> Iterator[dict[str, Any]]:
        """In one process: the loader as it is."""
        loader = self.loader
        loader.seek(self._start.state)
        self._next = self._start
        try:
            while (batch := next(loader, None)) is not None:
                after = loader.state
                self._next = _Place(after)
                yield _tensors(batch, after)
                if loader.state != after:
                    raise InputError(
                        "the loader was moved during a loop over its dataset: end the loop first, and make a loader "
                        "and a dataset for each of two loops at once"
                    )
        finally:
            loader.close()

    def _batches_of_worker(self, worker: int, num_workers: int) -> Iterator[dict[str, Any]]:
        """Every W-th batch, made when it is asked for: threads of the loader would not have survived the fork."""
        loader, state = self.loader, self._start.state
        if not self._start.num_workers:
            state = self._skip(state, worker)
        while True:
            cells, epochs, after = loader.order.take(state, loader.cells_per_batch, epochs=loader.epochs)
            if len(cells) == 0:
                return
            part = rank_part(len(cells), loader.rank, loader.world_size)
            batch = loader.make_batch(cells[part], epochs[part])
            state = self._skip(after, num_workers - 1)
            self._next = _Place(state, worker, num_workers)
            yield _tensors(batch, after)

    def _skip(self, state: LoaderState, num_batches: int) -> LoaderState:
        loader = self.loader
        return advance(state, num_batches * loader.cells_per_batch, len(loader.order), epochs=loader.epochs)


def _tensors(batch: Batch, after: LoaderState) -> dict[str, Any]:
    """The batch's arrays as tensors of the same memory, and the state after it."""
    arrays = {name: getattr(batch, name) for name in ("tokens", "labels", "lengths", "cells", "epochs")}
    return {name: torch.from_numpy(array) for name, array in arrays.items()} | {"state": asdict(after)}
