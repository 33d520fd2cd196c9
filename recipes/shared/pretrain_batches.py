"""Batches of cells as a pretraining run takes them: made on the host ahead of need, then put where the model is."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from celltron.cells import NO_LABEL, Batch, Loader, LoaderState, cut_into_packs, pad_batch
from celltron.cells.corpus import Corpus
from celltron.cells.sampler import digest_next_cells
from celltron.models.geneformer.flops import flops_per_step
from celltron.models.layers.packing import PackedCells
from celltron.recipes.shared.pretrain_config import Config
from celltron.train.fully_sharded import most_micro_batches
from celltron.train.loop import StepBatch
from celltron.train.parallel import context_parallel_place, cut_row, data_parallel_place

T = TypeVar("T")
MicroBatch = dict[str, Any]
"""Tensors, and where packed cells lie, by the names that the model gives them."""


class MadeAhead(Generic[T]):
    """What a function makes, call after call, in a thread of its own and one call ahead of need."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="celltron-batches")
        self._next: Future[T] | None = None

    def take(self) -> T:
        """The next one; raises what the function raised."""
        made = (self._next or self._pool.submit(self._make)).result()
        self._next = self._pool.submit(self._make)
        return made


@dataclass(frozen=True, kw_only=True, slots=True)
class MadeBatch:
    """This data-parallel rank's part of a global batch, on the host."""

    batch: Batch
    step_batch: StepBatch
    """The same as `prepare_step_batch` gives it."""
    before: LoaderState
    """Where the global batch begins."""
    after: LoaderState
    """Where the next one does."""


class TrainStream:
    """Endless training batches as tensors: a `celltron.train.loop.BatchStream`."""

    def __init__(self, config: Config, corpus: Corpus, device: torch.device, state: LoaderState | None) -> None:
        self.config = config
        self.corpus = corpus
        self.device = device
        rank, world_size = data_parallel_place()
        self.loader = corpus.train_loader(
            config.data.masking,
            cells_per_batch=config.loop.global_batch_size,
            seed=config.loop.seed,
            rank=rank,
            world_size=world_size,
            state=state,
        )
        self.made: MadeBatch | None = None
        """The last one handed out."""
        self._ahead = MadeAhead(self._make)
        self._loading = threading.Lock()

    def __next__(self) -> StepBatch:
        self.made = self._ahead.take()
        return put_step_batch(self.config, self.corpus, self.made.step_batch, self.device)

    def _make(self) -> MadeBatch:
        with self._loading:
            before = self.loader.state
            batch = next(self.loader)
            after = self.loader.state
        lengths = batch.lengths.astype(np.float64)
        flops = flops_per_step(
            self.config.model,
            len(self.corpus.tokenizer.vocabulary),
            lengths_sum=lengths.sum(),
            lengths_square_sum=np.square(lengths).sum(),
            num_predicted=int(np.count_nonzero(batch.labels != NO_LABEL)),
        )
        step_batch = replace(prepare_step_batch(self.config, self.corpus, batch, self.device), flops=flops)
        return MadeBatch(batch=batch, step_batch=step_batch, before=before, after=after)

    def state(self) -> dict[str, int]:
        """The loader's three numbers, and a digest of the cells that follow."""
        with self._loading:
            state = self.loader.state if self.made is None else self.made.after
            next_cells = digest_next_cells(self.loader.order, state)
        return {"seed": state.seed, "epoch": state.epoch, "position": state.position, "next_cells": next_cells}

    def cells(self) -> list[int]:
        """Ids of the last global batch's cells, as the store numbers them; none before the first."""
        if self.made is None:
            return []
        with self._loading:
            cells, *_ = self.loader.order.take(self.made.before, self.config.loop.global_batch_size, epochs=None)
        ids: list[int] = cells.tolist()
        return ids


def validation_batches(config: Config, corpus: Corpus, device: torch.device) -> Iterator[StepBatch]:
    """One pass over this process's part of the validation cells, masked alike every time."""
    rank, world_size = data_parallel_place()
    loader: Loader = corpus.validation_loader(
        config.data.masking,
        cells_per_batch=config.loop.global_batch_size,
        seed=config.loop.seed,
        rank=rank,
        world_size=world_size,
    )
    with loader:
        for batch in loader:
            yield make_step_batch(config, corpus, batch, device)


def make_step_batch(config: Config, corpus: Corpus, batch: Batch, device: torch.device) -> StepBatch:
    """A batch as micro-batches on `device`; every process calls this."""
    return put_step_batch(config, corpus, prepare_step_batch(config, corpus, batch, device), device)


def prepare_step_batch(config: Config, corpus: Corpus, batch: Batch, device: torch.device) -> StepBatch:
    """Cut a batch into micro-batches on the host, for a GPU in memory that it reads without the processor's help."""
    micro_batches = cut_into_micro_batches(config, corpus, batch)
    if device.type == "cuda":
        micro_batches = [map_tensors(one, torch.Tensor.pin_memory) for one in micro_batches]
    return StepBatch(
        micro_batches=micro_batches,
        num_cells=len(batch),
        num_tokens=int(batch.lengths.sum()),
        num_places=config.parallel.context * sum(one["tokens_BS"].numel() for one in micro_batches),
    )


def put_step_batch(config: Config, corpus: Corpus, prepared: StepBatch, device: torch.device) -> StepBatch:
    """What was prepared, on `device`; under FSDP with as many micro-batches as others, with blank ones at the end.

    Every process calls this.
    """
    micro_batches = list(prepared.micro_batches)
    num_places = prepared.num_places
    if config.parallel.fsdp:
        (blank,) = cut_into_micro_batches(config, corpus, blank_batch(corpus.tokenizer.vocabulary.pad_id))
        num_blank = most_micro_batches(len(micro_batches)) - len(micro_batches)
        micro_batches += [blank] * num_blank
        num_places += config.parallel.context * blank["tokens_BS"].numel() * num_blank
    put = [map_tensors(one, lambda tensor: tensor.to(device, non_blocking=True)) for one in micro_batches]
    return replace(prepared, micro_batches=put, num_places=num_places)


def map_tensors(micro_batch: MicroBatch, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
    """A micro-batch with every tensor changed."""
    return {
        name: value.map_tensors(change) if isinstance(value, PackedCells) else change(value)
        for name, value in micro_batch.items()
    }


def blank_batch(pad_id: int) -> Batch:
    """One cell of one token of padding, which is not predicted."""
    one, number = np.ones(1, dtype=np.int32), np.zeros(1, dtype=np.int64)
    return Batch(tokens=pad_id * one, labels=NO_LABEL * one, lengths=one, cells=number, epochs=number)


def cut_into_micro_batches(config: Config, corpus: Corpus, batch: Batch) -> list[MicroBatch]:
    """Micro-batches of cells packed without gaps, or of padded ones of like length as the reference.

    Of their rows, those that it shares with context-parallel processes, this process takes its part.
    """
    place = context_parallel_place()
    how = {"pad_id": corpus.tokenizer.vocabulary.pad_id, "multiple_of": config.padding_multiple}
    micro_batches: list[MicroBatch] = []
    if config.loop.packing:
        for pack in cut_into_packs(batch, config.loop.micro_batch_size * config.data.max_length, **how):
            part = cut_row(len(pack.tokens_T), *place)
            tensors = to_tensors({"tokens_BS": pack.tokens_T[None, part]}, pack.labels_T[part])
            packed = PackedCells.of(pack.lengths.tolist(), torch.device("cpu"), part=part)
            micro_batches.append(tensors | {"packed": packed})
    else:
        for cells in batch.sorted_by_length().split(config.loop.micro_batch_size):
            padded = pad_batch(cells, **how)
            part = cut_row(padded.tokens_BS.shape[1], *place)
            inputs = {"tokens_BS": padded.tokens_BS[:, part], "is_padding_BS": padded.is_padding_BS}
            micro_batches.append(to_tensors(inputs, padded.labels_BS[:, part].ravel()))
    return micro_batches


def to_tensors(inputs: dict[str, np.ndarray], labels: np.ndarray) -> dict[str, torch.Tensor]:
    """The inputs, and of the labels those that there are and where: all that the head works on."""
    places_M = np.flatnonzero(labels != NO_LABEL)
    arrays = inputs | {"places_M": places_M, "labels_M": labels[places_M]}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
