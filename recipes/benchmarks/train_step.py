"""How fast training steps are: celltron, packed and padded, and transformers' `BertForMaskedLM`, on the same cells.

    python recipes/benchmarks/train_step.py --data pbmc.h5ad
    python recipes/benchmarks/train_step.py --shape 106m --precision bf16 --device cuda --cells-of-length 2048

Measured are `ours_packed`, `ours_padded` (micro-batches of cells of like length), `hf_padded` (every cell padded to the
full length; on a share of the cells, for each of them costs it the same) and `hf_grouped` (batches of cells of like
length). All have one shape, dropout, precision and cells, and one AdamW update a step; they take turns, each in a
process of its own (`bench_step.py`). Tokens a second are real ones: padding is not counted. FLOP/s are those of the
operations that the model asks for (`celltron.models.geneformer.flops`), in all systems alike; their share of what
matrix products of the same precision reach in the process of `ours_packed` is `model_flops_utilization`.
`--cells-of-length` takes made-up cells of one length instead of data; `--layers` and `--compile` are celltron's. A GPU
wants more work at a time, such as `--cells 1024 --steps 10 pack_cells=16 batch_size=16`.

Written to the folder `--out`: `train_step.json`, `.txt`, `.md` (for RESULTS.md) and `.png`.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from celltron.cells import NO_LABEL, Batch, Masking, apply_masking
from celltron.core import InputError, config_to_dict, load_published_geneformer, parse_arguments, run_command
from celltron.models.geneformer import GeneformerConfig
from celltron.models.geneformer.flops import flops_per_step
from celltron.recipes.benchmarks import bench_step
from celltron.recipes.benchmarks.bench_compare import (
    CELLS,
    Comparison,
    ComparisonConfig,
    Job,
    deal_cells,
    describe_cells,
    describe_run,
    draw_cells,
    load_run,
    summarise_all,
    take_turns,
    write_results,
)
from celltron.recipes.benchmarks.bench_embed import require_transformers
from celltron.recipes.shared.pretrain_config import Config as RunConfig
from celltron.recipes.shared.pretrain_model import pick_layers
from celltron.train.launch import Launch, choose_device

VERSION = 4
COMPARISON = Comparison(
    name="train_step",
    title="training step",
    systems=("ours_packed", "ours_padded", "hf_grouped", "hf_padded"),
    rate="real_tokens_per_second",
)
MODEL_NAMES = ("shape", "precision", "layers", "compile", "attention_dropout")
NAMES = ("data", "cells", "cells_of_length", *MODEL_NAMES, "device", "out", "repeats", "steps", "threads")
FLAGS = {f"--{name.replace('_', '-')}": name for name in NAMES}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(ComparisonConfig):
    """What is measured, and for how long."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Of celltron's parameters; transformers runs bf16 under autocast, as its Trainer does."""
    out: str = "runs/train_step"
    """Folder for results."""
    cells_of_length: int | None = None
    """Tokens of every cell, which is then made up; None draws cells from the data."""
    compile: bool = False
    """Whether celltron compiles what stands between matrix products; see `engine.compile` of a run."""
    hidden_dropout: float = 0.02
    """Of both; the published one."""
    attention_dropout: float = 0.0
    """Of both; the published one is 0.02, with which CPUs have no fused attention."""
    steps: int = 2
    """Steps measured in a process, after those that are not: one on a CPU, three on a GPU."""

    def __post_init__(self) -> None:
        ComparisonConfig.__post_init__(self)
        if self.cells_of_length is None:
            return
        if self.cells_of_length > self.max_length:
            raise InputError(
                f"cells_of_length is {self.cells_of_length}: wanted at most max_length ({self.max_length})"
            )
        if self.data != str(CELLS):
            raise InputError("--cells-of-length is given with --data, whose cells have their own; leave one out")


def main(arguments: Sequence[str]) -> None:
    """Draw cells or make them up, measure, write."""
    config = parse_arguments(Config, arguments, flags=FLAGS).config
    # What cannot be is refused before anything is done.
    device = choose_device(config.device, Launch())
    run = make_run(config, is_packed=True)
    layers = pick_layers(run, device)
    require_transformers()
    out = Path(config.out)
    with TemporaryDirectory() as folder:
        scratch = Path(folder)
        batch, facts = get_cells(config, scratch)
        parts = deal_cells(COMPARISON, batch, config.padded_share, scratch)
        jobs = {system: make_job(config, system, facts, scratch) for system in COMPARISON.systems}
        out.mkdir(parents=True, exist_ok=True)
        answers = take_turns(bench_step.answer, jobs, config.repeats)
    results = describe_run(COMPARISON.name, VERSION, arguments) | {
        "settings": config_to_dict(config),
        "cells": facts,
        "layers": asdict(layers) | {"compile": config.compile},
    }
    results |= summarise_all(COMPARISON, answers, parts)
    flops = {system: count_flops(run.model, facts["vocabulary"], part) for system, part in parts.items()}
    add_arithmetic(results, flops, [one["peak_flops"] for one in answers["ours_packed"]])
    print(write_results(COMPARISON, results, out, describe_notes(results)))


def get_cells(config: Config, scratch: Path) -> tuple[Batch, dict[str, Any]]:
    """Masked cells, from the data or made up, and what they are."""
    if config.cells_of_length is None:
        return draw_cells(
            config.data, scratch, num_cells=config.cells, max_length=config.max_length, seed=config.seed, mask=True
        )
    return make_cells(config.cells, config.cells_of_length, seed=config.seed)


def make_cells(num_cells: int, length: int, *, seed: int) -> tuple[Batch, dict[str, Any]]:
    """Make up cells of exactly `length` tokens, each a gene of Geneformer's vocabulary that the cell has once."""
    vocabulary, _ = load_published_geneformer("gc30M")
    num_genes = len(vocabulary.genes)
    if length > num_genes:
        raise InputError(f"cells_of_length is {length}: wanted at most the {num_genes:,} genes of the vocabulary")
    generator = np.random.default_rng(seed)
    drawn = [generator.choice(num_genes, length, replace=False) for _ in range(num_cells)]
    tokens = (vocabulary.first_gene_id + np.concatenate(drawn)).astype(np.int32)
    lengths, cells = np.full(num_cells, length, dtype=np.int32), np.arange(num_cells, dtype=np.int64)
    seen, labels = apply_masking(tokens, lengths, cells, vocabulary, Masking(), seed=seed, epoch=0)
    batch = Batch(tokens=seen, labels=labels, lengths=lengths, cells=cells, epochs=np.zeros_like(cells))
    return batch, describe_cells(batch, vocabulary)


def count_flops(model: GeneformerConfig, num_tokens: int, batch: Batch) -> float:
    """Operations that a training step on a batch asks for, with a vocabulary of `num_tokens`."""
    lengths = batch.lengths.astype(np.float64)
    return flops_per_step(
        model,
        num_tokens,
        lengths_sum=lengths.sum(),
        lengths_square_sum=np.square(lengths).sum(),
        num_predicted=int(np.count_nonzero(batch.labels != NO_LABEL)),
    )


def add_arithmetic(results: dict[str, Any], flops: Mapping[str, float], peaks: Sequence[float]) -> None:
    """Add to results the best of the peaks measured, and each system's FLOP/s at its median step and share of that.

    `flops` are those of a step.
    """
    results["peak_flops"] = max(peaks)
    for system, count in flops.items():
        row = results[system]
        row["flops_per_second"] = count / row["seconds"]["median"]
        row["model_flops_utilization"] = row["flops_per_second"] / results["peak_flops"]


def make_run(config: Config, *, is_packed: bool) -> RunConfig:
    """The shipped config of the shape with what the benchmark sets."""
    return load_run(
        config.shape,
        precision=config.precision,
        max_length=config.max_length,
        settings=[
            f"model.hidden_dropout={config.hidden_dropout}",
            f"model.attention_dropout={config.attention_dropout}",
            f"engine.layers={config.layers}",
            f"engine.compile={str(config.compile).lower()}",
            f"loop.packing={str(is_packed).lower()}",
            f"loop.micro_batch_size={config.pack_cells if is_packed else config.batch_size}",
            f"loop.global_batch_size={config.cells}",
            f"loop.max_steps={config.steps + (1 if config.device == 'cpu' else 3)}",
        ],
    )


def make_job(config: Config, system: str, facts: Mapping[str, Any], scratch: Path) -> Job:
    """What `bench_step.py` is asked."""
    return {
        "system": system,
        "library": "celltron" if system.startswith("ours") else "transformers",
        "config": config_to_dict(make_run(config, is_packed=system == "ours_packed")),
        "steps": config.steps,
        "wants_peak": system == "ours_packed",
        "cells": str(scratch / f"{system}.npz"),
        "num_tokens": facts["vocabulary"],
        "pad_id": facts["pad_id"],
        "padded_to": config.max_length if system == "hf_padded" else None,
        "batch_size": config.batch_size,
        "device": config.device,
        "threads": config.threads,
    }


def describe_notes(results: Mapping[str, Any]) -> list[str]:
    """How it was measured."""
    settings, layers = results["settings"], results["layers"]
    notes = [
        f"dropout {settings['hidden_dropout']:g} hidden, {settings['attention_dropout']:g} attention; padded to "
        f"{settings['max_length']:,}, batches of {settings['batch_size']} cells, packs of "
        f"{settings['pack_cells'] * settings['max_length']:,} tokens; torch {results['versions']['torch']}, "
        f"transformers {results['versions']['transformers']}",
        f"celltron's layers: {layers['layers']} ({layers['reason']}), {'' if layers['compile'] else 'not '}compiled; "
        "TFLOP/s count what the model asks for, in all systems alike: nothing on padding, the head on predicted places "
        f"only; peak {results['peak_flops'] / 1e12:,.4g} TFLOP/s, of {settings['precision']} matrix products in the "
        "process of ours_packed",
    ]
    if settings["cells_of_length"] is not None:
        notes.append(
            f"no data: cells are made up, each of {settings['cells_of_length']:,} different genes drawn at random "
            f"(seed {settings['seed']}), masked as in training"
        )
    return notes


if __name__ == "__main__":
    sys.exit(run_command(main))
