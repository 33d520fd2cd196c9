"""`celltron plan`: what layouts of a run cost on so many GPUs, before any is paid for."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from celltron.cells import CellReader, RankTokenizer, open_cells
from celltron.cells.corpus import PUBLISHED, DataConfig
from celltron.cells.open_cells import is_converted, parse_storage
from celltron.cli.plan_geneformer import USABLE_SHARE, Estimate, Task, estimate, plan
from celltron.core import (
    InputError,
    MedianTable,
    Vocabulary,
    load_published_geneformer,
    load_vocabulary_table,
    parse_arguments,
)
from celltron.models.geneformer.size import Share, count_parameters
from celltron.recipes.geneformer_pretrain import FLAGS as RUN_FLAGS
from celltron.recipes.geneformer_pretrain import Config as RunConfig
from celltron.train.plan.gpus import GPUS, GpuName
from celltron.train.plan.layouts import Layout, list_contexts, list_layouts

GIB = 2**30
FLAGS = {f"--{name.replace('_', '-')}": name for name in ("gpus", "gpu", "mean_length", "rows", "json")} | RUN_FLAGS


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(RunConfig):
    """A run and the GPUs that it might have."""

    gpus: int = 0
    """GPUs, eight a machine; must be given."""
    gpu: GpuName = "h100"
    """Their kind."""
    mean_length: int = 0
    """Tokens of every cell, where no data are given; 0 takes data.max_length, the most that cells can cost."""
    rows: int = 20
    """Layouts printed, the fastest first; 0 prints all."""
    json: bool = False
    """Whether all is printed as JSON, in bytes and seconds."""

    def __post_init__(self) -> None:
        # What a plan can do without, the run's own checks want.
        planned = {one.name: getattr(self, one.name) for one in fields(RunConfig)}
        planned["out"] = self.out or "planned"
        planned["data"] = replace(self.data, paths=self.data.sources or ("planned",))
        RunConfig(**planned)
        if self.gpus < 1:
            raise ValueError(f"gpus is {self.gpus}, but must be at least 1; give the number, such as --gpus 8")
        if not 0 <= self.mean_length <= self.data.max_length:
            raise ValueError(
                f"mean_length is {self.mean_length}, but must lie between 0 and data.max_length "
                f"({self.data.max_length}), to which cells are cut"
            )
        if self.rows < 0:
            raise ValueError(f"rows is {self.rows}, but must not be negative")


def main(arguments: Sequence[str]) -> None:
    """Plan what the command line describes, and print it."""
    parsed = parse_arguments(Config, arguments, flags=FLAGS)
    config = parsed.config
    data = config.parallel.data(config.gpus)
    config.loop.check_batches(data)
    task, whence = make_task(config)
    configured = estimate(task, Layout(parallel=config.parallel, data=data), config.loop.micro_batch_size)
    found = plan(task, list_allowed(config, is_context_given="parallel.context" in parsed.values))
    if config.json:
        print(json.dumps(to_dict(config, task, configured, found), indent=1))
    else:
        print(describe(config, task, whence, configured, found))


def list_allowed(config: Config, *, is_context_given: bool) -> Iterator[Layout]:
    """Every layout under which the run's own checks would let it start.

    Context parallelism has the run's degree, and higher ones for long cells unless the command line gives it.
    """
    least = config.parallel.context
    contexts = [least] if is_context_given else list_contexts(config.gpus, config.data.max_length, least=least)
    for context in contexts:
        for layout in list_layouts(config.gpus, context=context):
            try:
                replace(config, parallel=layout.parallel)
            except ValueError:
                continue  # heads, layers, vocabulary or rows cannot be cut so, or what is computed not split so
            yield layout


def make_task(config: Config) -> tuple[Task, str]:
    """The task, and in words where its cells' lengths are from."""
    store = _open_store(config.data)
    vocabulary, medians = load_vocabulary(config.data, store)
    if store is None:
        length = config.mean_length or config.data.max_length
        lengths = np.full(config.loop.global_batch_size, length, dtype=np.int64)
        whence = "taken to be alike; give --data STORE or --mean-length"
    else:
        if config.mean_length:
            raise InputError("--mean-length is given with --data, whose cells have lengths of their own; leave one out")
        tokenizer = RankTokenizer(vocabulary, medians, store.gene_ids, max_length=config.data.max_length)
        lengths = draw_lengths(store, tokenizer, config.loop.global_batch_size, seed=config.loop.seed)
        whence = f"drawn from {store.name}"
    task = Task(
        model=config.model,
        num_tokens=len(vocabulary),
        precision=config.precision,
        lengths=lengths,
        predicted_share=config.data.masking.probability,
        max_length=config.data.max_length,
        packing=config.loop.packing,
        gpu=GPUS[config.gpu],
        recompute=config.engine.recompute,
        overlap=config.engine.overlap,
    )
    return task, whence


def _open_store(config: DataConfig) -> CellReader | None:
    if not config.sources:
        return None
    for source in config.sources:
        if not is_converted(source):
            raise InputError(
                f"{source} is no store; make one with celltron convert, or leave out --data and give --mean-length"
            )
    return open_cells(config.sources, storage=parse_storage(config.storage))


def load_vocabulary(config: DataConfig, store: CellReader | None) -> tuple[Vocabulary, MedianTable]:
    """The run's vocabulary; for one of the store's own genes all of them, with medians that are as good as any here."""
    for published in PUBLISHED:
        if config.vocabulary == published:
            return load_published_geneformer(published)
    if config.vocabulary != "store":
        if not Path(config.vocabulary).is_file():
            raise InputError(
                f"data.vocabulary is {config.vocabulary!r}, neither store, {', '.join(PUBLISHED)} nor a table's path; "
                "choose one"
            )
        return load_vocabulary_table(Path(config.vocabulary))
    if store is None:
        raise InputError(
            "data.vocabulary is store, whose genes decide the model's size, but there is no store; give --data STORE, "
            "or data.vocabulary=gc30M"
        )
    vocabulary = config.vocabulary_of(store.gene_ids)
    return vocabulary, MedianTable(vocabulary.genes, [1.0] * len(vocabulary.genes))


def draw_lengths(
    store: CellReader, tokenizer: RankTokenizer, num_cells: int, *, seed: int
) -> npt.NDArray[np.int64]:
    """Tokens of `num_cells` cells drawn over all, each at most once where there are as many."""
    if len(store) == 0:
        raise InputError(f"{store.name} has no cells, whose lengths a plan needs; give another store")
    cells = np.random.default_rng(seed).choice(len(store), min(num_cells, len(store)), replace=False)
    _, lengths = tokenizer.tokenize(store, cells)
    drawn = np.resize(lengths, num_cells).astype(np.int64)
    if not drawn.any():
        raise InputError(f"the cells of {store.name} have no genes of the vocabulary; choose another data.vocabulary")
    return drawn


def to_dict(config: Config, task: Task, configured: Estimate, found: list[Estimate]) -> dict[str, object]:
    """Everything, as plain values."""
    return {
        "gpus": config.gpus,
        "gpu": task.gpu.name,
        "precision": config.precision,
        "parameters": count_parameters(task.model, task.num_tokens, Share()),
        "cells_per_step": len(task.lengths),
        "mean_length": float(task.lengths.mean()),
        "mean_square_length": float(np.square(task.lengths).mean()),
        "flops_per_step": task.flops,
        "configured": configured.to_dict(),
        "layouts": [one.to_dict() for one in found],
    }


def describe(config: Config, task: Task, whence: str, configured: Estimate, found: list[Estimate]) -> str:
    """A table for people."""
    gpu, num_parameters = task.gpu, count_parameters(task.model, task.num_tokens, Share())
    fitting = [one for one in found if one.fits]
    shown = fitting[: config.rows or None]
    lines = [
        f"{num_parameters:,} parameters, {config.precision}; {config.gpus} x {gpu.name} "
        f"({gpu.memory_bytes / 1e9:.0f} GB, {gpu.peak_flops(config.precision) / 1e12:,.0f} TFLOP/s)",
        f"{len(task.lengths):,} cells a step, {'packed' if task.packing else 'padded'}, of {task.lengths.mean():,.0f} "
        f"tokens on average ({whence})",
        f"{task.predicted_share:.0%} of them predicted; engine.recompute {task.recompute}, communication of gradients "
        f"{'overlapped' if task.overlap else 'not overlapped'}",
        "",
        *_HEADER,
        _row(configured) + "  as configured",
        *(_row(one) for one in shown),
    ]
    if len(shown) < len(fitting):
        lines.append(f"and {len(fitting) - len(shown)} slower ones; --rows 0 prints all")
    lines += [
        f"{_name(one.layout)} does not fit: {one.memory.total / GIB:.1f} GiB with a micro-batch of "
        f"{one.micro_batch_size}"
        for one in found
        if not one.fits
    ]
    return "\n".join([*lines, "", *_LEGEND])


_HEADER = (
    "                           micro-                              GiB a GPU"
    "                                     MB sent a step",
    " TP  PP  CP   DP SP DO FS  batch   ms/step    cells/s   MFU    total param  grad optim activ logit other"
    "    tensor context  pipe    data",
)
_LEGEND = (
    "TP x PP x CP x DP: tensor, pipeline, context and data parallel; SP: sequence parallel; DO: distributed optimizer; "
    "FS: FSDP, which overlaps always.",
    "Micro-batches are in cells of full length. Memory is that of the largest stage; "
    f"{USABLE_SHARE:.0%} of a GPU's may be taken (! is beyond).",
    "Estimates from formulas and data sheets, of PyTorch's own layers; data loading is not counted, nor what "
    "engine.fp8,",
    "engine.fp32_residual and engine.compile change. Sources: celltron.train.plan.",
)


def _name(layout: Layout) -> str:
    """In words."""
    parallel = layout.parallel
    split = ", FSDP" if parallel.fsdp else ", distributed optimizer" if parallel.distributed_optimizer else ""
    return (
        f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} x data {layout.data}"
        f"{', sequence parallel' if parallel.sequence_parallel else ''}{split}"
    )


def _row(one: Estimate) -> str:
    parallel, memory = one.layout.parallel, one.memory
    other = memory.working + memory.communication + memory.gathered
    parts = (memory.parameters, memory.gradients, memory.optimizer, memory.activations, memory.logits, other)
    sent = {group: sum(kinds.values()) / 1e6 for group, kinds in one.sent_bytes.items()}
    return (
        f"{parallel.tensor:3d} {parallel.pipeline:3d} {parallel.context:3d} {one.layout.data:4d} "
        f"{'x' if parallel.sequence_parallel else '-':>2} {'x' if parallel.distributed_optimizer else '-':>2} "
        f"{'x' if parallel.fsdp else '-':>2} "
        f"{one.micro_batch_size:6d} {1e3 * sum(one.seconds.values()):9,.1f} {one.cells_per_second:10,.0f} "
        f"{one.flops_share:5.0%}  {' ' if one.fits else '!'}{memory.total / GIB:6.1f} "
        + " ".join(f"{part / GIB:5.2f}" for part in parts)
        + f" {sent.get('tensor', 0.0):9,.0f} {sent.get('context', 0.0):7,.0f} {sent.get('pipeline', 0.0):5,.0f} "
        f"{sent.get('data', 0.0) + sent.get('embedding', 0.0):7,.0f}"
    )
