"""What checkpoints cost a training run: steps with one save in so many, beside steps without, in turns.

    python recipes/benchmarks/saving.py --data pbmc.h5ad
    python recipes/benchmarks/saving.py --data pbmc.h5ad --shape 106m --precision bf16 --device cuda --cells 64

Both run the training loop itself on the same cells; the one saves parameters and optimizer as a run does, while it goes
on. Timed are all steps of some intervals between two saves, with a save in the middle of each, so that all of it lies
within: copying, writing, checksums, the manifest.

Written to the folder `--out`: `saving.json` and `saving.md` (for RESULTS.md).
"""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from celltron.cells import Batch
from celltron.core import config_to_dict, parse_arguments, run_command, write_atomically
from celltron.recipes.benchmarks.bench_compare import CELLS, check_numbers, describe_run, draw_cells, load_run
from celltron.recipes.benchmarks.bench_fit import fit_steps
from celltron.recipes.shared.pretrain_config import Config as RunConfig
from celltron.train.checkpoint import Checkpoints
from celltron.train.launch import Launch, choose_device, start_process_group
from celltron.train.parallel import ParallelConfig, start_model_parallel

VERSION = 1
NAMES = ("data", "shape", "precision", "device", "out", "cells", "save-every", "saves", "repeats", "threads")
FLAGS = {f"--{name}": name.replace("-", "_") for name in NAMES}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """What is measured, and for how long."""

    data: str = str(CELLS)
    """A store or a file of counts."""
    shape: Literal["10m", "106m", "tiny"] = "10m"
    """The shape of the config of that name."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the parameters."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Where the run is."""
    out: str = "runs/saving"
    """Folder for results."""
    cells: int = 4
    """Cells of a step; the fewer, the more a save weighs."""
    max_length: int = 2048
    """Longest cell in tokens."""
    save_every: int = 50
    """Steps between two saves."""
    saves: int = 1
    """Saves of a run."""
    repeats: int = 3
    """Runs of each kind; the medians are compared."""
    threads: int = 0
    """Threads of PyTorch; 0 leaves them as they are."""
    seed: int = 0
    """Of cells, masks and weights."""

    def __post_init__(self) -> None:
        check_numbers(self, {"cells": 1, "max_length": 1, "save_every": 2, "saves": 1, "repeats": 1, "threads": 0})


def main(arguments: Sequence[str]) -> None:
    """Draw cells, measure, write."""
    config = parse_arguments(Config, arguments, flags=FLAGS).config
    # What cannot be is refused before anything is done.
    device = choose_device(config.device, Launch())
    runs = {kind: make_run(config, is_saving=kind == "saving") for kind in ("without", "saving")}
    out = Path(config.out)
    with TemporaryDirectory() as folder:
        drawn = {"num_cells": config.cells, "max_length": config.max_length, "seed": config.seed}
        batch, facts = draw_cells(config.data, Path(folder), mask=True, **drawn)
    seconds: dict[str, list[float]] = {kind: [] for kind in runs}
    bytes_written = 0
    start(config, device)
    out.mkdir(parents=True, exist_ok=True)
    for repeat in range(config.repeats):
        # Every other time the other way round, so that a machine that grows slower is slower for both.
        for kind in sorted(seconds, reverse=repeat % 2 == 0):
            with TemporaryDirectory(dir=out) as folder:
                checkpoints = Path(folder) if kind == "saving" else None
                seconds[kind].append(time_run(config, runs[kind], batch, facts, checkpoints))
                if kind == "saving":
                    bytes_written = count_bytes(Path(folder)) // (config.saves + 1)
            print(f"{repeat + 1} of {config.repeats}: {kind}: {seconds[kind][-1]:.3g} s", flush=True)
    results = describe_run("saving", VERSION, arguments) | {
        "settings": config_to_dict(config),
        "cells": facts,
        "bytes": bytes_written,
        "seconds": seconds,
        "cost": statistics.median(seconds["saving"]) / statistics.median(seconds["without"]) - 1.0,
        "cost_at_best": min(seconds["saving"]) / min(seconds["without"]) - 1.0,
    }
    write_atomically(out / "saving.json", json.dumps(results, indent=1) + "\n")
    write_atomically(out / "saving.md", describe(results))
    print(describe(results))


def start(config: Config, device: torch.device) -> None:
    """Make this process the only one of a run."""
    if config.threads:
        torch.set_num_threads(config.threads)
    start_process_group(Launch(), device)
    start_model_parallel(ParallelConfig(), seed=config.seed)


def make_run(config: Config, *, is_saving: bool) -> RunConfig:
    """The shipped config of the shape with what the benchmark sets."""
    return load_run(
        config.shape,
        precision=config.precision,
        max_length=config.max_length,
        settings=[
            "model.attention_dropout=0.0",
            f"loop.micro_batch_size={min(2, config.cells)}",
            f"loop.global_batch_size={config.cells}",
            # Half an interval goes before what is timed; half an interval is left to end the last save.
            f"loop.max_steps={config.saves * config.save_every + config.save_every // 2 + 1}",
            f"loop.save_every={config.save_every if is_saving else 0}",
        ],
    )


def time_run(config: Config, run: RunConfig, batch: Batch, facts: dict[str, Any], checkpoints: Path | None) -> float:
    """Seconds of the steps of as many intervals as there are saves; with a folder, these are in it."""
    waits = [0.0]

    class Timed(Checkpoints):
        def begin(self, *save: Any) -> Path | None:
            start = time.perf_counter()
            path = self.wait()
            waits.append(time.perf_counter() - start)
            return super().begin(*save) or path

    steps = fit_steps(
        run,
        batch,
        num_tokens=facts["vocabulary"],
        pad_id=facts["pad_id"],
        checkpoints=Timed(checkpoints, launch=Launch()) if checkpoints else None,
    )
    # The save at the end is no part of this, but it waits for the one before, where that is still being written.
    return sum(steps.seconds[-config.saves * config.save_every :]) + waits[-1]


def count_bytes(folder: Path) -> int:
    """Of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def describe(results: dict[str, Any]) -> str:
    """The entry for RESULTS.md."""
    settings, cells, machine = results["settings"], results["cells"], results["machine"]
    num_steps = settings["saves"] * settings["save_every"]
    lines = [
        f"## {results['date']}: what saving costs",
        "",
        f"celltron {results['celltron']}, commit {results['commit']}: {results['command']}  ",
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}; {settings['shape']}, "
        f"{settings['precision']}, {settings['device']}; {cells['num_cells']} cells, {cells['num_tokens']:,} tokens "
        f"a step; {results['bytes'] / 1e6:,.0f} MB a checkpoint",
        "",
        f"| {num_steps} steps | seconds (least to most of {settings['repeats']}) | a step |",
        "|---|---|---|",
    ]
    for kind, name in (("without", "without"), ("saving", f"with a save in {settings['save_every']}")):
        seconds = results["seconds"][kind]
        median = statistics.median(seconds)
        lines.append(
            f"| {name} | {median:.3g} ({min(seconds):.3g} to {max(seconds):.3g}) | {1e3 * median / num_steps:,.0f} ms |"
        )
    lines += ["", f"- {results['cost']:+.1%} of a step at the medians, {results['cost_at_best']:+.1%} at the best runs"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(run_command(main))
