"""How fast training steps are: celltron, packed and padded, and transformers' `BertForMaskedLM`, on the same cells.

    python recipes/benchmarks/train_step.py --data pbmc.h5ad
    python recipes/benchmarks/train_step.py --data pbmc.h5ad --shape 106m --precision bf16 --device cuda

Measured are `ours_packed`, `ours_padded` (micro-batches of cells of like length), `hf_padded` (every cell padded to the
full length; on a share of the cells, for each of them costs it the same) and `hf_grouped` (batches of cells of like
length). All have one shape, dropout, precision and cells, and one AdamW update a step; they take turns, each in a
process of its own (`bench_step.py`). Tokens a second are real ones: padding is not counted.

Written to the folder `--out`: `train_step.json`, `.txt`, `.md` (for RESULTS.md) and `.png`.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from celltron.core import config_to_dict, parse_arguments, run_command
from celltron.recipes.benchmarks import bench_step
from celltron.recipes.benchmarks.bench_compare import (
    Comparison,
    ComparisonConfig,
    Job,
    deal_cells,
    describe_run,
    draw_cells,
    load_run,
    summarise_all,
    take_turns,
    write_results,
)
from celltron.recipes.benchmarks.bench_embed import require_transformers

VERSION = 2
COMPARISON = Comparison(
    name="train_step",
    title="training step",
    systems=("ours_packed", "ours_padded", "hf_grouped", "hf_padded"),
    rate="real_tokens_per_second",
)
NAMES = ("data", "shape", "precision", "device", "out", "cells", "repeats", "steps", "threads", "attention-dropout")
FLAGS = {f"--{name}": name.replace("-", "_") for name in NAMES}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(ComparisonConfig):
    """What is measured, and for how long."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Of celltron's parameters; transformers runs bf16 under autocast, as its Trainer does."""
    out: str = "runs/train_step"
    """Folder for results."""
    hidden_dropout: float = 0.02
    """Of both; the published one."""
    attention_dropout: float = 0.0
    """Of both; the published one is 0.02, with which CPUs have no fused attention."""
    steps: int = 2
    """Steps measured in a process, after one that is not."""


def main(arguments: Sequence[str]) -> None:
    """Draw cells, measure, write."""
    config = parse_arguments(Config, arguments, flags=FLAGS).config
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    require_transformers()
    with TemporaryDirectory() as folder:
        scratch = Path(folder)
        batch, facts = draw_cells(
            config.data, scratch, num_cells=config.cells, max_length=config.max_length, seed=config.seed, mask=True
        )
        parts = deal_cells(COMPARISON, batch, config.padded_share, scratch)
        jobs = {system: make_job(config, system, facts, scratch) for system in COMPARISON.systems}
        answers = take_turns(bench_step.answer, jobs, config.repeats)
    results = describe_run(COMPARISON.name, VERSION, arguments) | {"settings": config_to_dict(config), "cells": facts}
    results |= summarise_all(COMPARISON, answers, parts)
    print(write_results(COMPARISON, results, out, describe_notes(results)))


def make_job(config: Config, system: str, facts: Mapping[str, Any], scratch: Path) -> Job:
    """What `bench_step.py` is asked; the run's settings are those of the shipped config of the shape."""
    is_packed = system == "ours_packed"
    run = load_run(
        config.shape,
        precision=config.precision,
        max_length=config.max_length,
        settings=[
            f"model.hidden_dropout={config.hidden_dropout}",
            f"model.attention_dropout={config.attention_dropout}",
            f"loop.packing={str(is_packed).lower()}",
            f"loop.micro_batch_size={config.pack_cells if is_packed else config.batch_size}",
            f"loop.global_batch_size={config.cells}",
            f"loop.max_steps={config.steps + 1}",
        ],
    )
    return {
        "system": system,
        "library": "celltron" if system.startswith("ours") else "transformers",
        "config": config_to_dict(run),
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
    settings = results["settings"]
    return [
        f"dropout {settings['hidden_dropout']:g} hidden, {settings['attention_dropout']:g} attention; padded to "
        f"{settings['max_length']:,}, batches of {settings['batch_size']} cells, packs of "
        f"{settings['pack_cells'] * settings['max_length']:,} tokens; torch {results['versions']['torch']}, "
        f"transformers {results['versions']['transformers']}"
    ]


if __name__ == "__main__":
    sys.exit(run_command(main))
