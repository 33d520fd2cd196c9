"""What a step of a Geneformer run costs under a layout: joins the model's size with the engine's formulas."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from celltron.cells.pack import plan_packs
from celltron.models.geneformer import GeneformerConfig
from celltron.models.geneformer.flops import flops_per_step
from celltron.models.geneformer.size import (
    Places,
    Recompute,
    Share,
    activation_bytes,
    count_layer_parameters,
    count_parameters,
    count_split_parameters,
    list_operations,
    logit_bytes,
    working_bytes,
)
from celltron.train.plan.communication import Exchange, Stage, list_exchanges
from celltron.train.plan.gpus import Gpu
from celltron.train.plan.layouts import Group, Layout
from celltron.train.plan.roofline import micro_batch_seconds, optimizer_seconds, pipeline_seconds
from celltron.train.plan.state import FLOAT32_BYTES, gathered_bytes, gradient_bytes, state_bytes, value_bytes
from celltron.train.precision import Precision

USABLE_SHARE = 0.9
"""Of a GPU's memory: CUDA and NCCL take some for themselves, and PyTorch's allocator leaves gaps."""
MICRO_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Tried for every layout."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What is trained, and on which GPU."""

    model: GeneformerConfig
    num_tokens: int
    """The true vocabulary."""
    precision: Precision
    lengths: npt.NDArray[np.int64]
    """Tokens of each cell of a global batch."""
    predicted_share: float
    """Of the tokens."""
    max_length: int
    packing: bool
    """As in `celltron.train.loop_config.LoopConfig`."""
    gpu: Gpu
    recompute: Recompute = "none"
    overlap: bool = False
    """As in `celltron.train.engine.EngineConfig`."""
    mask_bytes: int = 1
    """Of a place of a dropout mask: PyTorch keeps bools on CUDA, values on a CPU."""
    _cuts: dict[tuple[int, int, int], "Cut"] = field(default_factory=dict, init=False)

    @cached_property
    def flops(self) -> float:
        """What a step asks for, on real tokens and the true vocabulary."""
        total = float(self.lengths.sum())
        squares = float(np.square(self.lengths).sum())
        return flops_per_step(self.model, self.num_tokens, total, squares, self.predicted_share * total)

    def micro_batch_sizes(self, data: int) -> list[int]:
        """Those worth trying on so many replicas; padded ones must divide the global batch."""
        num_cells = -(-len(self.lengths) // data)
        sizes = [size for size in MICRO_BATCH_SIZES if size < 2 * num_cells]
        return [size for size in sizes if self.packing or len(self.lengths) % (size * data) == 0]

    def cut(self, data: int, micro_batch_size: int, *, context: int = 1) -> "Cut":
        """Micro-batches of the replica that has the most cells, or one of `context` equal parts of their rows."""
        key = (data, micro_batch_size, context)
        if key not in self._cuts:
            self._cuts[key] = self._cut(-(-len(self.lengths) // data), micro_batch_size, context)
        return self._cuts[key]

    def _cut(self, num_cells: int, micro_batch_size: int, context: int) -> "Cut":
        lengths = self.lengths[:num_cells]
        if self.packing:
            parts = [lengths[pack] for pack in plan_packs(lengths, micro_batch_size * self.max_length)]
        else:
            rising = np.sort(lengths)
            parts = [rising[start : start + micro_batch_size] for start in range(0, num_cells, micro_batch_size)]
            parts = [np.full(len(part), part[-1]) for part in parts]
        computed = [float(part.sum()) / context for part in parts]
        squares = [float(np.square(part).sum()) / context for part in parts]
        predicted = self.predicted_share * float(lengths.sum()) / context
        m, most = max(1, len(parts)), max(computed, default=0.0)
        return Cut(
            num_micro_batches=m,
            mean=Places(computed=sum(computed) / m, squares=sum(squares) / m, predicted=predicted / m),
            largest=Places(computed=most, squares=max(squares, default=0.0), predicted=self.predicted_share * most),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """Micro-batches of one process in a step."""

    num_micro_batches: int
    mean: Places
    largest: Places


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on one GPU."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    """Kept for the backward passes of all micro-batches that are under way on the stage."""
    logits: float
    """Of the LM head, on predicted places."""
    working: float
    """Gradients within the backward pass."""
    communication: float
    """What is gathered for sequence parallelism, and what stages hand each other."""
    gathered: float
    """Parameters and gradients that FSDP has whole for a moment: in a step, or at the start where that takes more."""

    @property
    def total(self) -> float:
        """At the peak, at most."""
        return float(sum(asdict(self).values()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A layout's step."""

    layout: Layout
    micro_batch_size: int
    num_micro_batches: int
    """That a process computes on in a step."""
    memory: Memory
    """Of the stage that needs most."""
    fits: bool
    sent_bytes: dict[Group, dict[str, float]]
    """In a step by the process that sends most, by group and kind of call."""
    seconds: dict[str, float]
    """The step's parts, one after the other."""
    cells_per_second: float
    flops_share: float
    """Model FLOPs utilisation: the step's arithmetic as a share of the GPUs' peak."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **asdict(self.layout.parallel),
            "data": self.layout.data,
            "micro_batch_size": self.micro_batch_size,
            "num_micro_batches": self.num_micro_batches,
            "fits": self.fits,
            "memory_bytes": asdict(self.memory) | {"total": self.memory.total},
            "sent_bytes": self.sent_bytes,
            "seconds": self.seconds | {"step": sum(self.seconds.values())},
            "cells_per_second": self.cells_per_second,
            "model_flops_utilization": self.flops_share,
        }


def estimate(task: Task, layout: Layout, micro_batch_size: int) -> Estimate:
    """Memory, communication and time of a step."""
    cut = task.cut(layout.data, micro_batch_size, context=layout.parallel.context)
    shares = list(_stages(layout))
    exchanges = [list_exchanges(make_stage(task, layout, cut, share), layout) for share in shares]
    memory = max((estimate_memory(task, layout, cut, share) for share in shares), key=lambda part: part.total)
    seconds = _seconds(task, layout, cut, exchanges)
    step = sum(seconds.values())
    return Estimate(
        layout=layout,
        micro_batch_size=micro_batch_size,
        num_micro_batches=cut.num_micro_batches,
        memory=memory,
        fits=memory.total <= USABLE_SHARE * task.gpu.memory_bytes,
        sent_bytes=max((sum_sent(part, layout) for part in exchanges), key=_total),
        seconds=seconds,
        cells_per_second=len(task.lengths) / step,
        flops_share=task.flops / (step * layout.num_gpus * task.gpu.peak_flops(task.precision)),
    )


def best_of_layout(task: Task, layout: Layout) -> Estimate:
    """With the micro-batch that is fastest of those that fit; with the smallest where none does."""
    tried = [estimate(task, layout, size) for size in task.micro_batch_sizes(layout.data)]
    fitting = [one for one in tried if one.fits]
    return max(fitting, key=lambda one: one.cells_per_second) if fitting else tried[0]


def plan(task: Task, layouts: Iterable[Layout]) -> list[Estimate]:
    """Those that have cells for every replica, the fastest first; those that do not fit come last, the smallest first.

    The model must allow them all.
    """
    found = [
        best_of_layout(task, layout)
        for layout in layouts
        if layout.data <= len(task.lengths) and task.micro_batch_sizes(layout.data)
    ]
    return sorted(found, key=lambda one: (-one.cells_per_second, 0.0) if one.fits else (0.0, one.memory.total))


def _stages(layout: Layout) -> Iterator[Share]:
    """The first stage, the second for all between, and the last."""
    parallel = layout.parallel
    for stage in sorted({0, min(1, parallel.pipeline - 1), parallel.pipeline - 1}):
        yield Share(
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            stage=stage,
            context=parallel.context,
            sequence_parallel=parallel.sequence_parallel,
        )


def make_stage(task: Task, layout: Layout, cut: Cut, share: Share) -> Stage:
    """What the formulas of communication are told of a process."""
    hidden = task.model.hidden_size * value_bytes(task.precision)
    predicted = cut.num_micro_batches * cut.mean.predicted
    num_layers = task.model.num_layers // share.pipeline
    return Stage(
        is_first=share.is_first,
        is_last=share.is_last,
        num_layers=num_layers,
        num_recomputed_layers=num_layers if task.recompute == "full" else 0,
        num_reattended_layers=num_layers if task.recompute != "none" else 0,
        num_parameters=count_parameters(task.model, task.num_tokens, share),
        num_split_parameters=count_split_parameters(task.model, share),
        num_embedding_parameters=task.model.padded_vocabulary(task.num_tokens)
        // share.tensor
        * task.model.hidden_size,
        num_layer_parameters=count_layer_parameters(task.model, share),
        value_bytes=value_bytes(task.precision),
        gradient_bytes=gradient_bytes(task.precision),
        num_micro_batches=cut.num_micro_batches,
        hidden_bytes=cut.num_micro_batches * cut.mean.computed * hidden,
        predicted_bytes=predicted * hidden,
        num_predicted=predicted,
    )


def estimate_memory(task: Task, layout: Layout, cut: Cut, share: Share) -> Memory:
    """Of one process; a stage has as many micro-batches under way as stages follow it, itself among them."""
    b, largest = value_bytes(task.precision), cut.largest
    state = state_bytes(
        count_parameters(task.model, task.num_tokens, share),
        task.precision,
        shards=layout.num_shards,
        fsdp=layout.parallel.fsdp,
    )
    under_way = min(cut.num_micro_batches, share.pipeline - share.stage)
    kept = activation_bytes(
        task.model, share, largest, value_bytes=b, mask_bytes=task.mask_bytes, recompute=task.recompute
    )
    hidden = largest.computed * task.model.hidden_size * b
    ends = int(share.is_first) + int(share.is_last)
    memory = Memory(
        parameters=state.parameters,
        gradients=state.gradients,
        optimizer=state.optimizer,
        activations=under_way * kept,
        logits=logit_bytes(task.model, task.num_tokens, share, largest, value_bytes=b),
        working=working_bytes(
            task.model, task.num_tokens, share, largest, value_bytes=b, recompute=task.recompute
        ),
        communication=hidden * ((1 if share.sequence_parallel else 0) + 2 * (2 - ends) / share.sequence),
        gathered=0.0,
    )
    return replace(memory, gathered=_gathered(task, layout, share, memory)) if layout.parallel.fsdp else memory


def _gathered(task: Task, layout: Layout, share: Share, others: Memory) -> float:
    """In a step; or at the start, when the whole model is there, in float32 at least, and nothing of all the others."""
    num_parameters = count_parameters(task.model, task.num_tokens, share)
    of_layer = count_layer_parameters(task.model, share)
    of_root = num_parameters - task.model.num_layers * of_layer
    in_step = gathered_bytes(of_root, of_layer, task.precision, shards=layout.num_shards)
    return max(in_step, num_parameters * max(FLOAT32_BYTES, value_bytes(task.precision)) - others.total)


def _seconds(task: Task, layout: Layout, cut: Cut, exchanges: list[list[Exchange]]) -> dict[str, float]:
    """Of the slowest stage, which sets the pace; only overlapped gradients and FSDP's layers hide behind computing."""
    pairs = zip(_stages(layout), exchanges, strict=True)
    parts = [_seconds_of_stage(task, layout, cut, share, of_stage) for share, of_stage in pairs]
    return max(parts, key=lambda part: sum(part.values()))


def _seconds_of_stage(
    task: Task, layout: Layout, cut: Cut, share: Share, exchanges: list[Exchange]
) -> dict[str, float]:
    works = list_operations(
        task.model,
        task.num_tokens,
        share,
        cut.mean,
        value_bytes=value_bytes(task.precision),
        recompute=task.recompute,
    )
    times: dict[Group, float] = {"tensor": 0.0, "context": 0.0, "pipeline": 0.0, "data": 0.0, "embedding": 0.0}
    for exchange in exchanges:
        if not exchange.is_beside_computing:
            times[exchange.group] += exchange.seconds(layout, task.gpu)
    of_micro_batch = micro_batch_seconds(works, task.gpu, task.precision)
    m = cut.num_micro_batches
    if layout.parallel.fsdp:
        beside = sum(exchange.seconds(layout, task.gpu) for exchange in exchanges if exchange.is_beside_computing)
        times["data"] += max(0.0, beside - m * of_micro_batch)
    elif task.overlap:
        # Beside the last micro-batch's backward pass, two thirds of its time.
        times["data"] = max(0.0, times["data"] - 2 / 3 * of_micro_batch)
    whole = m * of_micro_batch + times["tensor"] + times["context"] + times["pipeline"]
    num_updated = count_parameters(task.model, task.num_tokens, share) / layout.num_shards
    return {
        "compute": m * of_micro_batch,
        "tensor": times["tensor"],
        "context": times["context"],
        "pipeline": times["pipeline"],
        "bubble": pipeline_seconds(whole / m, num_micro_batches=m, num_stages=share.pipeline) - whole,
        "data": times["data"] + times["embedding"],
        "optimizer": optimizer_seconds(num_updated, task.gpu),
    }


def sum_sent(exchanges: list[Exchange], layout: Layout) -> dict[Group, dict[str, float]]:
    """Bytes sent by group and kind."""
    sent: dict[Group, dict[str, float]] = {}
    for exchange in exchanges:
        kinds = sent.setdefault(exchange.group, {})
        kinds[exchange.kind] = kinds.get(exchange.kind, 0.0) + exchange.sent_bytes(layout)
    return sent


def _total(sent: dict[Group, dict[str, float]]) -> float:
    return sum(sum(kinds.values()) for kinds in sent.values())
