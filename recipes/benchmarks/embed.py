"""How fast cells are embedded: celltron, packed and padded, and transformers' `BertModel`, same weights, same cells.

    python recipes/benchmarks/embed.py --data pbmc.h5ad
    python recipes/benchmarks/embed.py --data pbmc.h5ad --shape 106m --precision bf16 --device cuda --cells 2048

A cell's vector is the mean of the last layer's hidden states over its tokens. Measured are `ours_packed`, `ours_padded`
(batches of cells of like length), `hf_grouped` (the same batches) and `hf_padded` (every cell padded to the full
length; on a share of the cells, for each of them costs it the same). The weights are exported once by celltron and read
by all; they take turns, each in a process of its own (`bench_embed.py`), and the vectors of all must agree.

Written to the folder `--out`: `embed.json`, `.txt`, `.md` (for RESULTS.md) and `.png`.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from celltron.core import config_to_dict, parse_arguments, run_command
from celltron.models.layers.choice import LayerChoice, choose_layers
from celltron.recipes.benchmarks import bench_embed
from celltron.recipes.benchmarks.bench_compare import (
    Comparison,
    ComparisonConfig,
    Job,
    check_agreement,
    deal_cells,
    describe_run,
    draw_cells,
    load_run,
    measure,
    summarise_all,
    take_turns,
    write_results,
)
from celltron.train.launch import Launch, choose_device
from celltron.train.precision import DTYPES

VERSION = 2
COMPARISON = Comparison(
    name="embed",
    title="embedding",
    systems=("ours_packed", "ours_padded", "hf_grouped", "hf_padded"),
    rate="cells_per_second",
)
NAMES = ("data", "shape", "precision", "device", "layers", "out", "cells", "repeats", "passes", "threads")
FLAGS = {f"--{name}": name for name in NAMES}
# Largest distance of two vectors of one cell, in their length: float32 sums in another order, bfloat16 rounds every
# hidden state to 8 bits.
TOLERANCES = {"fp32": 1e-5, "bf16": 3e-2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(ComparisonConfig):
    """What is measured, and for how long."""

    out: str = "runs/embed"
    """Folder for results."""
    passes: int = 2
    """Passes over the cells measured in a process, after one that is not."""
    standard_deviation: float = 0.1
    """Of the weights; larger than at the beginning of a training, so that attention differs from place to place."""


def main(arguments: Sequence[str]) -> None:
    """Draw cells, export a model, measure, compare the vectors, write."""
    config = parse_arguments(Config, arguments, flags=FLAGS).config
    # What cannot be is refused before anything is done.
    device = choose_device(config.device, Launch())
    layers = choose_layers(config.layers, device=device, dtype=DTYPES[config.precision])
    bench_embed.require_transformers()
    out = Path(config.out)
    with TemporaryDirectory() as folder:
        scratch = Path(folder)
        batch, facts = draw_cells(
            config.data, scratch, num_cells=config.cells, max_length=config.max_length, seed=config.seed, mask=False
        )
        parts = deal_cells(COMPARISON, batch, config.padded_share, scratch)
        jobs = {system: make_job(config, layers, system, facts, scratch) for system in COMPARISON.systems}
        out.mkdir(parents=True, exist_ok=True)
        exported = measure(bench_embed.export, jobs["ours_packed"])
        answers = take_turns(bench_embed.answer, jobs, config.repeats)
        vectors = {system: np.load(scratch / f"{system}.npy") for system in COMPARISON.systems}
    results = describe_run(COMPARISON.name, VERSION, arguments) | {
        "settings": config_to_dict(config),
        "cells": facts | {"parameters": exported["parameters"]},
        "layers": {"layers": layers.layers, "reason": layers.reason},
        "agreement": check_agreement(
            vectors, every={"hf_padded": config.padded_share}, tolerance=TOLERANCES[config.precision]
        ),
    }
    results |= summarise_all(COMPARISON, answers, parts)
    print(write_results(COMPARISON, results, out, describe_notes(results)))


def make_job(config: Config, layers: LayerChoice, system: str, facts: Mapping[str, Any], scratch: Path) -> Job:
    """What `bench_embed.py` is asked; the model is that of the shipped config of the shape."""
    run = load_run(
        config.shape,
        precision=config.precision,
        max_length=config.max_length,
        settings=[f"model.initial_standard_deviation={config.standard_deviation}"],
    )
    return {
        "system": system,
        "library": "celltron" if system.startswith("ours") else "transformers",
        "is_packed": system == "ours_packed",
        "config": config_to_dict(run.model),
        "precision": config.precision,
        "layers": layers.layers,
        "model": str(scratch / "model"),
        "cells": str(scratch / f"{system}.npz"),
        "vectors": str(scratch / f"{system}.npy"),
        "num_tokens": facts["vocabulary"],
        "pad_id": facts["pad_id"],
        "padded_to": config.max_length if system == "hf_padded" else None,
        "batch_size": config.batch_size,
        "pack_tokens": config.pack_cells * config.max_length,
        "device": config.device,
        "threads": config.threads,
        "warm_up": 1 if config.device == "cpu" else 3,
        "passes": config.passes,
        "seed": config.seed,
    }


def describe_notes(results: Mapping[str, Any]) -> list[str]:
    """How it was measured, and how far the vectors agree."""
    settings, agreement, layers = results["settings"], results["agreement"], results["layers"]
    return [
        f"{results['cells']['parameters']:,} parameters; padded to {settings['max_length']:,}, batches of "
        f"{settings['batch_size']} cells, packs of {settings['pack_cells'] * settings['max_length']:,} tokens; "
        f"celltron's layers: {layers['layers']} ({layers['reason']}); "
        f"torch {results['versions']['torch']}, transformers {results['versions']['transformers']}",
        f"vectors of one cell differ by at most {max(agreement['largest_difference'].values()):.1e} of their length "
        f"between systems (tolerance {agreement['tolerance']:g}), those of different cells by at least "
        f"{agreement['nearest_cells']:.1e}",
    ]


if __name__ == "__main__":
    sys.exit(run_command(main))
