"""How fast training steps are: celltron, packed and padded, and transformers' `BertForMaskedLM`, on the same cells.

    python recipes/benchmarks/train_step.py --data pbmc.h5ad
    python recipes/benchmarks/train_step.py --data pbmc.h5ad --shape 106m --precision bf16 --device cuda

Measured are `ours_packed`, `ours_padded` (micro-batches of cells of like length), `hf_padded` (every cell padded to the
full length; on a share of the cells, for each of them costs it the same) and `hf_grouped` (batches of cells of like
length). All have one shape, dropout, precision and cells, and one AdamW update a step; they take turns, each in a
process of its own (`bench_step.py`). Tokens a second are real ones: padding is not counted.

Written to the folder `--out`: `train_step.json`, `.txt`, `.md` (for RESULTS.md) and `.png`.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from celltron.cells import CellReader, Loader, RankTokenizer, convert, open_cells
from celltron.cells.open_cells import is_converted
from celltron.core import (
    InputError,
    __version__,
    config_to_dict,
    load_config,
    load_published_geneformer,
    parse_arguments,
    run_command,
    write_atomically,
)
from celltron.recipes.benchmarks.bench_machine import describe_commit, describe_machine
from celltron.recipes.geneformer_pretrain import Config as RunConfig

HERE = Path(__file__).resolve().parent
CELLS = HERE.parent / "data" / "pbmc_citeseq" / "pbmc_citeseq.h5ad"
FORMAT, VERSION = "celltron-train-step-benchmark", 1
SYSTEMS = ("ours_packed", "ours_padded", "hf_grouped", "hf_padded")
NAMES = ("data", "shape", "precision", "device", "out", "cells", "repeats", "steps", "threads", "attention-dropout")
FLAGS = {f"--{name}": name.replace("-", "_") for name in NAMES}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """What is measured, and for how long."""

    data: str = str(CELLS)
    """A store or a file of counts; the cells' lengths decide what padding costs."""
    shape: Literal["10m", "106m", "tiny"] = "10m"
    """The shape of the config of that name."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of celltron's parameters; transformers runs bf16 under autocast, as its Trainer does."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Where both run."""
    out: str = "runs/train_step"
    """Folder for results."""
    cells: int = 64
    """Cells of a step, drawn from the data."""
    max_length: int = 2048
    """Longest cell in tokens, and what `hf_padded` pads to."""
    padded_share: int = 4
    """`hf_padded` runs on one cell of so many."""
    batch_size: int = 8
    """Cells of a batch of transformers and of celltron's padded micro-batches."""
    pack_cells: int = 2
    """Cells of full length whose tokens celltron packs into a micro-batch."""
    hidden_dropout: float = 0.02
    """Of both; the published one."""
    attention_dropout: float = 0.0
    """Of both; the published one is 0.02, with which CPUs have no fused attention."""
    steps: int = 2
    """Steps measured in a process, after one that is not."""
    repeats: int = 2
    """Processes of each system; all steps' median is reported, with least and most."""
    threads: int = len(os.sched_getaffinity(0))
    """Threads of PyTorch."""
    seed: int = 0
    """Of cells and masks."""

    def __post_init__(self) -> None:
        for name in ("cells", "max_length", "padded_share", "batch_size", "pack_cells", "steps", "repeats", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: wanted 1 or more")
        if self.cells % (self.padded_share * self.batch_size):
            raise InputError(
                f"cells is {self.cells}: wanted a multiple of padded_share x batch_size "
                f"({self.padded_share} x {self.batch_size})"
            )


def main(arguments: Sequence[str]) -> None:
    """Draw cells, measure, write."""
    config = parse_arguments(Config, arguments, flags=FLAGS).config
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch:
        facts = draw_cells(config, Path(scratch))
        seconds: dict[str, list[float]] = {system: [] for system in SYSTEMS}
        for repeat in range(config.repeats):
            for system in SYSTEMS:
                seconds[system] += measure(make_job(config, system, facts, Path(scratch)))
                print(f"{repeat + 1} of {config.repeats}: {system}: {seconds[system][-1]:.2f} s a step", flush=True)
    results = {
        "format": FORMAT,
        "version": VERSION,
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "recipes/benchmarks/train_step.py", *arguments]),
        "celltron": __version__,
        "commit": describe_commit(),
        "machine": describe_machine(),
        "versions": facts["versions"],
        "settings": config_to_dict(config),
        "cells": {name: facts[name] for name in ("num_cells", "num_tokens", "median_length", "longest")},
        **{system: summarise(seconds[system], facts[f"of_{system}"]) for system in SYSTEMS},
    }
    results["ratios"] = {
        f"{ours} / {theirs}": results[ours]["real_tokens_per_second"] / results[theirs]["real_tokens_per_second"]
        for ours in SYSTEMS[:2]
        for theirs in SYSTEMS[2:]
    }
    write_atomically(out / "train_step.json", json.dumps(results, indent=1) + "\n")
    text = describe(results)
    print(text)
    write_atomically(out / "train_step.txt", text + "\n")
    write_atomically(out / "train_step.md", format_markdown(results))
    draw(results, out / "train_step.png")


def draw_cells(config: Config, scratch: Path) -> dict[str, Any]:
    """Tokenise and mask the cells of a step, for all systems alike; write them beside each other and describe them."""
    store = open_store(config, scratch)
    if len(store) < config.cells:
        raise InputError(f"{config.data} has {len(store):,} cells: wanted {config.cells:,}, or a lower --cells")
    vocabulary, medians = load_published_geneformer("gc30M")
    tokenizer = RankTokenizer(vocabulary, medians, store.gene_ids, max_length=config.max_length)
    with Loader(store, tokenizer, cells_per_batch=config.cells, seed=config.seed) as loader:
        batch = next(loader)
    facts: dict[str, Any] = {
        "num_cells": len(batch),
        "num_tokens": len(batch.tokens),
        "median_length": float(np.median(batch.lengths)),
        "longest": int(batch.lengths.max()),
        "vocabulary": len(vocabulary),
        "pad_id": vocabulary.pad_id,
        "versions": {},
    }
    share = batch.take(np.arange(0, len(batch), config.padded_share))
    for system in SYSTEMS:
        part = share if system == "hf_padded" else batch
        np.savez(scratch / f"{system}.npz", **{name: getattr(part, name) for name in batch.__slots__})
        facts[f"of_{system}"] = {"cells": len(part), "tokens": len(part.tokens)}
    return facts


def open_store(config: Config, scratch: Path) -> CellReader:
    """The data as a store, converted first where it is none."""
    if is_converted(config.data):
        return open_cells(config.data)
    convert(config.data, scratch / "cells.store")
    return open_cells(scratch / "cells.store")


def make_job(config: Config, system: str, facts: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """What `bench_step.py` is asked; the run's settings are those of the shipped config of the shape."""
    is_packed = system == "ours_packed"
    run = load_config(
        RunConfig,
        HERE.parent / "configs" / f"geneformer_{config.shape}.yaml",
        [
            "data.paths=none",
            "out=none",
            f"precision={config.precision}",
            f"data.max_length={config.max_length}",
            f"model.max_positions={config.max_length}",
            f"model.hidden_dropout={config.hidden_dropout}",
            f"model.attention_dropout={config.attention_dropout}",
            f"loop.packing={str(is_packed).lower()}",
            f"loop.micro_batch_size={config.pack_cells if is_packed else config.batch_size}",
            f"loop.global_batch_size={config.cells}",
            f"loop.max_steps={config.steps + 1}",
            "loop.validate_every=0",
            "loop.save_every=0",
            "loop.log_every=1000000",
            "schedule.warmup_steps=0",
        ],
    )
    return {
        "system": "celltron" if system.startswith("ours") else "transformers",
        "config": config_to_dict(run),
        "cells": str(scratch / f"{system}.npz"),
        "num_tokens": facts["vocabulary"],
        "pad_id": facts["pad_id"],
        "padded_to": config.max_length if system == "hf_padded" else None,
        "batch_size": config.batch_size,
        "device": "cuda" if config.device == "cuda" else "cpu",
        "threads": config.threads,
    }


def measure(job: Mapping[str, Any]) -> list[float]:
    """Seconds of each step, in a process of its own."""
    environment = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(HERE / "bench_step.py")]
    done = subprocess.run(
        command, input=json.dumps(job), stdout=subprocess.PIPE, text=True, env=environment, check=False
    )
    if done.returncode:
        raise InputError(f"bench_step.py ended with code {done.returncode} on {job['system']}: its message is above")
    answer: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return answer["seconds"]


def summarise(seconds: Sequence[float], part: Mapping[str, int]) -> dict[str, Any]:
    """Rates of one system at its median step."""
    median = statistics.median(seconds)
    return {
        "real_tokens_per_second": part["tokens"] / median,
        "cells_per_second": part["cells"] / median,
        "seconds": {"median": median, "min": min(seconds), "max": max(seconds), "steps": len(seconds)},
        **part,
    }


def describe(results: Mapping[str, Any]) -> str:
    """Everything as text."""
    lines = [headline(results), "", f"{'':12}{'real tokens/s':>15}{'cells/s':>10}{'s a step':>10}  least to most"]
    for system in SYSTEMS:
        row, seconds = results[system], results[system]["seconds"]
        lines.append(
            f"{system:12}{row['real_tokens_per_second']:>15,.0f}{row['cells_per_second']:>10.2f}"
            f"{seconds['median']:>10.2f}  {seconds['min']:.2f} to {seconds['max']:.2f}"
        )
    lines += ["", *(f"{name}: {ratio:.2f} x" for name, ratio in results["ratios"].items())]
    return "\n".join(lines)


def headline(results: Mapping[str, Any]) -> str:
    """Where, how and on what it was measured."""
    machine, cells, settings = results["machine"], results["cells"], results["settings"]
    return (
        f"celltron {results['celltron']}, commit {results['commit']}, {results['date']}: {results['command']}\n"
        f"{machine['processor']}, {settings['threads']} threads on {machine['cores']} cores, {machine['system']}, "
        f"Python {machine['python']}; {settings['shape']}, {settings['precision']}, "
        f"dropout {settings['hidden_dropout']:g} hidden, {settings['attention_dropout']:g} attention; "
        f"{cells['num_cells']} cells, median {cells['median_length']:,.0f} tokens, longest {cells['longest']:,}; "
        f"padded to {settings['max_length']:,}"
    )


def format_markdown(results: Mapping[str, Any]) -> str:
    """The entry for RESULTS.md."""
    lines = [f"## {results['date']}: training step", "", headline(results).replace("\n", "  \n"), ""]
    lines += ["| | real tokens/s | cells/s | s a step (least to most) |", "|---|---|---|---|"]
    for system in SYSTEMS:
        row, seconds = results[system], results[system]["seconds"]
        lines.append(
            f"| {system} | {row['real_tokens_per_second']:,.0f} | {row['cells_per_second']:.2f} | "
            f"{seconds['median']:.2f} ({seconds['min']:.2f} to {seconds['max']:.2f}) |"
        )
    lines += ["", *(f"- {name}: {ratio:.2f} x" for name, ratio in results["ratios"].items())]
    return "\n".join(lines) + "\n"


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Real tokens a second of each system as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 2.8), layout="constrained")
    rates = [results[system]["real_tokens_per_second"] for system in reversed(SYSTEMS)]
    colours = ["#e4572e" if system.startswith("ours") else "#1b6ca8" for system in reversed(SYSTEMS)]
    axis.barh(list(reversed(SYSTEMS)), rates, color=colours)
    for place, rate in enumerate(rates):
        axis.text(rate, place, f" {rate:,.0f}", va="center", fontsize=8)
    axis.set_xlabel("real tokens a second")
    axis.set_xlim(0, 1.15 * max(rates))
    axis.spines[["top", "right"]].set_visible(False)
    settings = results["settings"]
    axis.set_title(f"training step, {settings['shape']}, {settings['precision']}", loc="left")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(run_command(main))
