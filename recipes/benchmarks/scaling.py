"""How training scales over processes: strong (a fixed batch) and weak (fixed cells a process), and what is sent.

    python recipes/benchmarks/scaling.py --processes 1,2
    python recipes/benchmarks/scaling.py --processes 1,2,4,8 --layouts data,sequence --device cuda --precision bf16

`torchrun` starts each number of processes on this machine (gloo on a CPU, nccl on CUDA), which then train under one
layout after another on the same cells: `data` parallel, `data_distributed` (with the distributed optimizer), `tensor`,
`sequence` (tensor with sequence parallelism), `context` and `pipeline`. Each process has the same number of threads.
Tokens a second are real ones; efficiency is the rate a process, over that of the fewest processes. Bytes are those that
a process sends in a step, on average over the processes, where every collective is a ring: counted from the tensors
that are handed to `torch.distributed`, and by the formulas of `celltron plan`.

Written to the folder `--out`: `scaling.json`, `.txt`, `.md` (for RESULTS.md) and `.png`.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from celltron.cells import Batch
from celltron.core import InputError, config_to_dict, parse_arguments, run_command, write_atomically
from celltron.recipes.benchmarks.bench_compare import (
    CELLS,
    Job,
    check_numbers,
    describe_run,
    draw_cells,
    headline,
    load_run,
)
from celltron.recipes.benchmarks.bench_compare import write_cells as write_batch
from celltron.recipes.benchmarks.bench_scaling_report import compare_rates, draw, format_markdown, format_text
from celltron.recipes.shared.pretrain_config import Config as RunConfig
from celltron.train.launch import Launch, choose_device

HERE = Path(__file__).resolve().parent
VERSION = 1
NAMES = ("data", "shape", "precision", "device", "out", "processes", "layouts", "modes", "cells", "steps", "threads")
FLAGS = {f"--{name}": name for name in NAMES}
MODES = ("strong", "weak")
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "data_distributed": {"distributed_optimizer": True},
    "tensor": {"tensor": 0},
    "sequence": {"tensor": 0, "sequence_parallel": True},
    "context": {"context": 0},
    "pipeline": {"pipeline": 0},
}
"""Of `ParallelConfig`; 0 stands for the number of processes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """What is measured, and for how long."""

    data: str = str(CELLS)
    """A store or a file of counts."""
    shape: Literal["10m", "106m", "tiny"] = "10m"
    """The shape of the config of that name."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the parameters."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where all processes run."""
    out: str = "runs/scaling"
    """Folder for results."""
    processes: str = "1,2"
    """Numbers of processes, with commas between; the lowest is what others are compared with."""
    layouts: str = ",".join(LAYOUTS)
    """Layouts, with commas between."""
    modes: str = ",".join(MODES)
    """Strong, weak or both, with a comma between."""
    cells: int = 16
    """Cells of a step in strong scaling, and cells a process in weak scaling."""
    max_length: int = 2048
    """Longest cell in tokens."""
    pack_cells: int = 2
    """Cells of full length whose tokens are packed into a micro-batch."""
    steps: int = 3
    """Steps measured; one before, and one whose bytes are counted, are not timed."""
    threads: int = 0
    """Threads of PyTorch in each process; 0 shares the cores among the most processes."""
    seed: int = 0
    """Of cells, masks and weights."""

    def __post_init__(self) -> None:
        check_numbers(self, {"cells": 1, "max_length": 1, "pack_cells": 1, "steps": 1, "threads": 0})
        for field, chosen, known in (
            ("layouts", self.chosen_layouts, LAYOUTS),
            ("modes", self.chosen_modes, MODES),
        ):
            if not chosen or set(chosen) - set(known):
                raise InputError(f"{field} is {getattr(self, field)!r}: choose from {', '.join(known)}")
        if not self.chosen_processes or self.chosen_processes[0] < 1:
            raise InputError(f"processes is {self.processes!r}: wanted numbers above 0, such as 1,2")

    @property
    def chosen_layouts(self) -> list[str]:
        """What `layouts` names."""
        return split_names(self.layouts)

    @property
    def chosen_modes(self) -> list[str]:
        """What `modes` names."""
        return split_names(self.modes)

    @property
    def chosen_processes(self) -> list[int]:
        """What `processes` names, rising; empty where one is no number."""
        names = split_names(self.processes)
        return sorted({int(name) for name in names}) if all(name.isdecimal() for name in names) else []

    @property
    def chosen_threads(self) -> int:
        """Of each process."""
        return self.threads or max(1, len(os.sched_getaffinity(0)) // self.chosen_processes[-1])


def split_names(text: str) -> list[str]:
    """Names with commas between them."""
    return [name.strip() for name in text.split(",") if name.strip()]


def main(arguments: Sequence[str]) -> None:
    """Draw cells, measure, write."""
    config = parse_arguments(Config, arguments, flags=FLAGS).config
    # Each process wants a GPU of its own: the last one of the most processes, too.
    choose_device(config.device, Launch(local_rank=config.chosen_processes[-1] - 1))
    out = Path(config.out)
    runs: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        scratch = Path(folder)
        num_cells = config.cells * config.chosen_processes[-1]
        batch, facts = draw_cells(
            config.data, scratch, num_cells=num_cells, max_length=config.max_length, seed=config.seed, mask=True
        )
        listed = {number: list(list_runs(config, number, batch, scratch)) for number in config.chosen_processes}
        if not any(listed.values()):
            raise InputError(f"no layout of {config.layouts} takes {config.processes} processes; choose others")
        out.mkdir(parents=True, exist_ok=True)
        for num_processes, wanted in listed.items():
            answers = launch(config, num_processes, wanted, facts, scratch)
            runs += [summarise(run, [answer["runs"][place] for answer in answers]) for place, run in enumerate(wanted)]
    compare_rates(runs)
    settings = config_to_dict(config) | {"threads": config.chosen_threads}
    results = describe_run("scaling", VERSION, arguments) | {
        "gpu": answers[0]["gpu"],
        "versions": {"torch": answers[0]["torch"]},
        "settings": settings,
        "cells": facts,
        "runs": runs,
    }
    head = headline(results, describe_notes(settings))
    write_atomically(out / "scaling.json", json.dumps(results, indent=1) + "\n")
    text = "\n".join([*head, "", format_text(runs)])
    print(text)
    write_atomically(out / "scaling.txt", text + "\n")
    entry = [f"## {results['date']}: scaling", "  \n".join(head), format_markdown(runs)]
    write_atomically(out / "scaling.md", "\n\n".join(entry))
    draw(runs, f"{config.shape}, {config.precision}", out / "scaling.png")


def list_runs(config: Config, num_processes: int, batch: Batch, scratch: Path) -> Iterator[dict[str, Any]]:
    """The runs on so many processes; on one, all layouts and modes are the same."""
    for mode in config.chosen_modes:
        cells = batch.split(config.cells * (num_processes if mode == "weak" else 1))[0]
        path = scratch / f"{mode}.{num_processes}.npz"
        write_batch(cells, path)
        for layout in config.chosen_layouts if num_processes > 1 else ["one"]:
            run = load_layout(config, layout, num_processes, len(cells))
            if run is None:
                continue
            yield {
                "name": f"{mode}, {num_processes} processes, {layout}",
                "mode": mode,
                "layout": layout,
                "processes": num_processes,
                "num_cells": len(cells),
                "num_tokens": len(cells.tokens),
                "cells": str(path),
                "config": config_to_dict(run),
            }
        if num_processes == 1:
            return


def load_layout(config: Config, layout: str, num_processes: int, num_cells: int) -> RunConfig | None:
    """The shipped config of the shape under a layout; None where the shape cannot be cut like that, which is said."""
    degrees = {name: degree or num_processes for name, degree in LAYOUTS.get(layout, {}).items()}
    try:
        return load_run(
            config.shape,
            precision=config.precision,
            max_length=config.max_length,
            settings=[
                "model.attention_dropout=0.0",
                *(f"parallel.{name}={str(degree).lower()}" for name, degree in degrees.items()),
                f"loop.micro_batch_size={config.pack_cells}",
                f"loop.global_batch_size={num_cells}",
                f"loop.max_steps={config.steps + 2}",
                f"loop.seed={config.seed}",
            ],
        )
    except InputError as error:
        print(f"left out: {layout} on {num_processes} processes: {error}", file=sys.stderr, flush=True)
        return None


def launch(
    config: Config, num_processes: int, runs: Sequence[Job], facts: Mapping[str, Any], scratch: Path
) -> list[dict[str, Any]]:
    """What each process answers, by rank.

    Raises:
        InputError: a process raised it, or torchrun ended without answers.
    """
    job = scratch / f"job.{num_processes}"
    common = {"device": config.device, "threads": config.chosen_threads}
    common |= {"num_tokens": facts["vocabulary"], "pad_id": facts["pad_id"]}
    job.write_text(json.dumps(common | {"runs": list(runs)}), encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    environment = dict(os.environ) | {"OMP_NUM_THREADS": str(config.chosen_threads), "PYTHONWARNINGS": "ignore"}
    program = [*torchrun, str(HERE / "bench_scaling.py"), str(job)]
    # torchrun has much to say of a process that ended with a code, as one does that refuses.
    done = subprocess.run(program, env=environment, check=False, stderr=subprocess.PIPE, text=True)
    written = [path for rank in range(num_processes) if (path := job.with_name(f"{job.name}.{rank}")).exists()]
    answers = [json.loads(path.read_text("utf-8")) for path in written]
    for answer in answers:
        if "refused" in answer:
            raise InputError(answer["refused"])
    sys.stderr.write(done.stderr)
    if done.returncode:
        raise InputError(f"torchrun ended with code {done.returncode} on {num_processes} processes: see above")
    return answers


def summarise(run: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rates at the median step, and bytes by group and kind, on average over the processes."""
    seconds = answers[0]["seconds"]
    median = statistics.median(seconds)
    sent: dict[tuple[str, str], dict[str, float]] = {}
    for part in (part for answer in answers for part in answer["sent"]):
        sums = sent.setdefault((part["group"], part["kind"]), {"calls": 0.0, "counted": 0.0, "formula": 0.0})
        for name in sums:
            sums[name] += part[name] / len(answers)
    return {
        **{name: run[name] for name in ("mode", "layout", "processes", "num_cells", "num_tokens")},
        "seconds": {"median": median, "min": min(seconds), "max": max(seconds), "steps": len(seconds)},
        "real_tokens_per_second": run["num_tokens"] / median,
        "cells_per_second": run["num_cells"] / median,
        "sent": [{"group": group, "kind": kind, **sums} for (group, kind), sums in sorted(sent.items())],
        "sent_bytes": sum(sums["counted"] for sums in sent.values()),
        "formula_bytes": sum(sums["formula"] for sums in sent.values()),
    }


def describe_notes(settings: Mapping[str, Any]) -> list[str]:
    """How it was measured."""
    return [
        f"threads are those of each process; packs of {settings['pack_cells'] * settings['max_length']:,} tokens; "
        f"strong: {settings['cells']} cells a step, weak: {settings['cells']} cells a process; medians of "
        f"{settings['steps']} steps",
        "bytes: what a process sends in a step where collectives are rings, the mean over processes; counted from the "
        "calls, and by the formulas of celltron plan, which leave out scalars",
    ]


if __name__ == "__main__":
    sys.exit(run_command(main))
