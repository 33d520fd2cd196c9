"""What benchmarks share that have several systems work on the same cells: cells, turns, table, plot."""

import json
import multiprocessing
import os
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np

from celltron.cells import Batch, CellReader, Loader, RankTokenizer, convert, open_cells
from celltron.cells.open_cells import is_converted
from celltron.core import (
    InputError,
    Vocabulary,
    __version__,
    load_config,
    load_published_geneformer,
    write_atomically,
)
from celltron.recipes.benchmarks.bench_machine import describe_commit, describe_machine
from celltron.recipes.shared.pretrain_config import Config as RunConfig
from celltron.train.engine import Layers

CELLS = Path(__file__).resolve().parents[1] / "data" / "pbmc_citeseq" / "pbmc_citeseq.h5ad"
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
Job = dict[str, Any]


def check_numbers(settings: object, least: Mapping[str, int]) -> None:
    """Refuse numbers among the fields of ``settings`` that are lower than the lowest allowed, field name -> number."""
    for name, lowest in least.items():
        value = getattr(settings, name)
        if value < lowest:
            raise InputError(f"{name} is {value}: wanted {lowest} or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonConfig:
    """What is measured of models of one shape in celltron and in transformers, and for how long."""

    data: str = str(CELLS)
    """A store or a file of counts; the cells' lengths decide what padding costs."""
    shape: Literal["10m", "106m", "tiny"] = "10m"
    """The shape of the config of that name."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the weights in all systems."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where all run."""
    layers: Layers = "auto"
    """What celltron's layers are built of; see `engine.layers` of a run."""
    out: str
    """Folder for results."""
    cells: int = 64
    """Cells that are worked on at a time, drawn from the data."""
    max_length: int = 2048
    """Longest cell in tokens, and what `hf_padded` pads to."""
    padded_share: int = 4
    """`hf_padded` runs on one cell of so many."""
    batch_size: int = 8
    """Cells of a padded batch."""
    pack_cells: int = 2
    """Cells of full length whose tokens celltron packs together."""
    repeats: int = 2
    """Processes of each system; the median of all that they measured is reported, with least and most."""
    threads: int = len(os.sched_getaffinity(0))
    """Threads of PyTorch."""
    seed: int = 0
    """Of cells and of all else that is drawn."""

    def __post_init__(self) -> None:
        whole = {field.name for field in fields(self) if type(getattr(self, field.name)) is int}
        check_numbers(self, dict.fromkeys(sorted(whole - {"seed"}), 1))
        if self.cells % (self.padded_share * self.batch_size):
            raise InputError(
                f"cells is {self.cells}: wanted a multiple of padded_share x batch_size "
                f"({self.padded_share} x {self.batch_size})"
            )


def draw_cells(
    data: str, scratch: Path, *, num_cells: int, max_length: int, seed: int, mask: bool
) -> tuple[Batch, dict[str, Any]]:
    """Tokenise some cells of a store or a file with Geneformer's vocabulary, and describe them."""
    store = _open_store(data, scratch)
    if len(store) < num_cells:
        raise InputError(f"{data} has {len(store):,} cells: wanted {num_cells:,}, or a lower --cells")
    vocabulary, medians = load_published_geneformer("gc30M")
    tokenizer = RankTokenizer(vocabulary, medians, store.gene_ids, max_length=max_length)
    with Loader(store, tokenizer, cells_per_batch=num_cells, seed=seed, mask=mask) as loader:
        batch = next(loader)
    if not batch.lengths.all():
        raise InputError(f"{data} has cells without any gene of the vocabulary: leave those out")
    return batch, describe_cells(batch, vocabulary)


def describe_cells(batch: Batch, vocabulary: Vocabulary) -> dict[str, Any]:
    """What results say of cells and vocabulary."""
    return {
        "num_cells": len(batch),
        "num_tokens": len(batch.tokens),
        "median_length": float(np.median(batch.lengths)),
        "longest": int(batch.lengths.max()),
        "vocabulary": len(vocabulary),
        "pad_id": vocabulary.pad_id,
    }


def _open_store(data: str, scratch: Path) -> CellReader:
    if is_converted(data):
        return open_cells(data)
    convert(data, scratch / "cells.store")
    return open_cells(scratch / "cells.store")


def write_cells(batch: Batch, path: Path) -> None:
    """Write a batch for another process; see `read_cells`."""
    np.savez(path, **{name: getattr(batch, name) for name in batch.__slots__})


def read_cells(path: str) -> Batch:
    """What `write_cells` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        return Batch(**{name: arrays[name] for name in Batch.__slots__})


def load_run(shape: str, *, precision: str, max_length: int, settings: Sequence[str]) -> RunConfig:
    """The shipped config of a shape for cells of such a length, without warm-up, or anything between steps.

    Raises:
        InputError: `settings`, as on a command line, do not fit to it.
    """
    return load_config(
        RunConfig,
        CONFIGS / f"geneformer_{shape}.yaml",
        [
            "data.paths=none",
            "out=none",
            f"precision={precision}",
            f"data.max_length={max_length}",
            f"model.max_positions={max_length}",
            "loop.validate_every=0",
            "loop.save_every=0",
            "loop.log_every=1000000",
            "schedule.warmup_steps=0",
            *settings,
        ],
    )


def deal_cells(comparison: "Comparison", batch: Batch, padded_share: int, scratch: Path) -> dict[str, Batch]:
    """Each system's cells: all, but one of `padded_share` for `hf_padded`; written to `<scratch>/<system>.npz`, too."""
    share = batch.take(np.arange(0, len(batch), padded_share))
    parts = {system: share if system == "hf_padded" else batch for system in comparison.systems}
    for system, part in parts.items():
        write_cells(part, scratch / f"{system}.npz")
    return parts


def measure(function: Callable[[Job], Job], job: Job) -> Job:
    """What `function` answers to a job (both as JSON), in a process of its own.

    For a CPU it is forked, so that imports are paid once; CUDA does not survive that. Nothing of PyTorch has run before
    in this process.

    Raises:
        InputError: `function` raised it, or the process ended without an answer.
    """
    context: Any = multiprocessing.get_context("fork" if job["device"] == "cpu" else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, job))
    process.start()
    sender.close()
    try:
        sent: Job = json.loads(receiver.recv_bytes())
    except EOFError:
        sent = {}
    process.join()
    if "refused" in sent:
        raise InputError(sent["refused"])
    if process.exitcode:
        raise InputError(f"{job['system']} ended with code {process.exitcode}: its message is above")
    return dict(sent["answer"])


def _answer(sender: Connection, function: Callable[[Job], Job], job: Job) -> None:
    try:
        sent: Job = {"answer": function(job)}
    except InputError as error:
        sent = {"refused": str(error)}
    sender.send_bytes(json.dumps(sent).encode())


def take_turns(function: Callable[[Job], Job], jobs: Mapping[str, Job], repeats: int) -> dict[str, list[Job]]:
    """The answers for each system, measured one after the other, `repeats` times."""
    answers: dict[str, list[Job]] = {system: [] for system in jobs}
    for repeat in range(repeats):
        for system, job in jobs.items():
            answers[system].append(measure(function, job))
            seconds = answers[system][-1]["seconds"][-1]
            print(f"{repeat + 1} of {repeats}: {system}: {seconds:.3g} s", flush=True)
    return answers


def check_agreement(
    vectors: Mapping[str, np.ndarray], *, every: Mapping[str, int], tolerance: float
) -> dict[str, Any]:
    """Compare the vectors [C, D] of each system with those of the first one.

    Args:
        vectors: By system, of the same cells.
        every: Systems that have one cell of so many only.
        tolerance: Largest distance of two vectors of a cell, in their length.

    Raises:
        RuntimeError: one cell's vectors differ by more.
    """
    (first, ours_CD), *others = vectors.items()
    largest = {}
    for system, found_CD in others:
        largest[system] = float(_distances(found_CD, ours_CD[:: every.get(system, 1)]).max())
        if not largest[system] <= tolerance:
            raise RuntimeError(
                f"vectors of {system} and {first} are up to {largest[system]:.2e} of their length apart, more than "
                f"{tolerance:g}: they do not compute the same"
            )
    nearest = min(
        float(_distances(np.delete(ours_CD, cell, axis=0), ours_CD[cell]).min()) for cell in range(len(ours_CD))
    )
    return {"tolerance": tolerance, "largest_difference": largest, "nearest_cells": nearest}


def _distances(found_CD: np.ndarray, expected_CD: np.ndarray) -> np.ndarray:
    """|found - expected| / |expected| of each cell."""
    lengths_C = np.linalg.norm(expected_CD, axis=-1)
    distances_C: np.ndarray = np.linalg.norm(found_CD - expected_CD, axis=-1) / lengths_C
    return distances_C


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """How results are named and shown."""

    name: str
    """Of the program and of the files of results."""
    title: str
    """What is measured."""
    systems: tuple[str, ...]
    """In the order of the table; celltron's begin with `ours`, transformers' with `hf`."""
    rate: str
    """What ratios and plot show: `cells_per_second` or `real_tokens_per_second`."""


RATES = {"cells_per_second": "cells a second", "real_tokens_per_second": "real tokens a second"}


def describe_run(name: str, version: int, arguments: Sequence[str]) -> dict[str, Any]:
    """What results say first: format, date, command, commit, machine."""
    return {
        "format": f"celltron-{name.replace('_', '-')}-benchmark",
        "version": version,
        "date": date.today().isoformat(),
        "command": shlex.join(["python", f"recipes/benchmarks/{name}.py", *arguments]),
        "celltron": __version__,
        "commit": describe_commit(),
        "machine": describe_machine(),
    }


def summarise_all(
    comparison: Comparison, answers: Mapping[str, Sequence[Job]], parts: Mapping[str, Batch]
) -> dict[str, Any]:
    """Rates of each system on its cells, what they ran on, and ours over theirs."""
    last = answers[comparison.systems[0]][-1]
    results: dict[str, Any] = {
        "gpu": last["gpu"],
        "versions": {name: last[name] for name in ("torch", "transformers")},
        **{system: _summarise(answers[system], parts[system]) for system in comparison.systems},
    }
    return results | {"ratios": _compare(comparison, results)}


def _summarise(answers: Sequence[Job], part: Batch) -> dict[str, Any]:
    """Rates of one system at its median."""
    seconds = [second for answer in answers for second in answer["seconds"]]
    median = statistics.median(seconds)
    return {
        "real_tokens_per_second": len(part.tokens) / median,
        "cells_per_second": len(part) / median,
        "seconds": {"median": median, "min": min(seconds), "max": max(seconds), "steps": len(seconds)},
        "cells": len(part),
        "tokens": len(part.tokens),
        "gpu_bytes": answers[-1]["gpu_bytes"],
    }


def _compare(comparison: Comparison, results: Mapping[str, Any]) -> dict[str, float]:
    """Ours over theirs, each with each."""
    ours, theirs = ([s for s in comparison.systems if s.startswith(who)] for who in ("ours", "hf"))
    return {
        f"{one} / {other}": results[one][comparison.rate] / results[other][comparison.rate]
        for one in ours
        for other in theirs
    }


def write_results(comparison: Comparison, results: Mapping[str, Any], out: Path, notes: Sequence[str]) -> str:
    """Write `.json`, `.txt`, `.md` and `.png` into a folder; returns the text.

    `results` are those of `describe_run`, one summary a system, `cells`, `settings`, `ratios`; `notes` are sentences on
    how it was measured.
    """
    write_atomically(out / f"{comparison.name}.json", json.dumps(results, indent=1) + "\n")
    text = _format_text(comparison, results, notes)
    write_atomically(out / f"{comparison.name}.txt", text + "\n")
    write_atomically(out / f"{comparison.name}.md", _format_markdown(comparison, results, notes))
    _draw(comparison, results, out / f"{comparison.name}.png")
    return text


def headline(results: Mapping[str, Any], notes: Sequence[str]) -> list[str]:
    """Where, how and on what it was measured."""
    machine, cells, settings = results["machine"], results["cells"], results["settings"]
    where = results["gpu"] or f"{machine['cores']} cores, torch threads: {settings['threads']}"
    return [
        f"celltron {results['celltron']}, commit {results['commit']}, {results['date']}: {results['command']}",
        f"{machine['processor']}, {where}, {machine['system']}, Python {machine['python']}; "
        f"{settings['shape']}, {settings['precision']}; {cells['num_cells']} cells, "
        f"median {cells['median_length']:,.0f} tokens, longest {cells['longest']:,}",
        *notes,
    ]


def _arithmetic(row: Mapping[str, Any]) -> dict[str, str]:
    """Columns of a system's floating-point operations; none where they were not counted."""
    if "flops_per_second" not in row:
        return {}
    return {"TFLOP/s": f"{row['flops_per_second'] / 1e12:,.4g}", "of peak": f"{row['model_flops_utilization']:.1%}"}


def _format_text(comparison: Comparison, results: Mapping[str, Any], notes: Sequence[str]) -> str:
    columns = "".join(f"{name:>10}" for name in _arithmetic(results[comparison.systems[0]]))
    head = f"{'':12}{'cells/s':>12}{'real tokens/s':>15}{columns}{'seconds':>10}  least to most"
    lines = [*headline(results, notes), "", head]
    for system in comparison.systems:
        row, seconds = results[system], results[system]["seconds"]
        lines.append(
            f"{system:12}{row['cells_per_second']:>12,.2f}{row['real_tokens_per_second']:>15,.0f}"
            + "".join(f"{value:>10}" for value in _arithmetic(row).values())
            + f"{seconds['median']:>10.3g}  {seconds['min']:.3g} to {seconds['max']:.3g}"
        )
    lines += ["", *(f"{name}: {ratio:.2f} x" for name, ratio in results["ratios"].items())]
    return "\n".join(lines)


def _format_markdown(comparison: Comparison, results: Mapping[str, Any], notes: Sequence[str]) -> str:
    lines = [f"## {results['date']}: {comparison.title}", "", "  \n".join(headline(results, notes)), ""]
    columns = list(_arithmetic(results[comparison.systems[0]]))
    heads = ["", "cells/s", "real tokens/s", *columns, "seconds (least to most)"]
    lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for system in comparison.systems:
        row, seconds = results[system], results[system]["seconds"]
        values = [
            system,
            f"{row['cells_per_second']:,.2f}",
            f"{row['real_tokens_per_second']:,.0f}",
            *_arithmetic(row).values(),
            f"{seconds['median']:.3g} ({seconds['min']:.3g} to {seconds['max']:.3g})",
        ]
        lines.append("| " + " | ".join(values) + " |")
    lines += ["", *(f"- {name}: {ratio:.2f} x" for name, ratio in results["ratios"].items())]
    return "\n".join(lines) + "\n"


def _draw(comparison: Comparison, results: Mapping[str, Any], path: Path) -> None:
    """The rate of each system as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    systems = list(reversed(comparison.systems))
    figure, axis = pyplot.subplots(figsize=(7, 2.8), layout="constrained")
    rates = [results[system][comparison.rate] for system in systems]
    axis.barh(systems, rates, color=["#e4572e" if system.startswith("ours") else "#1b6ca8" for system in systems])
    for place, rate in enumerate(rates):
        axis.text(rate, place, f" {rate:,.0f}" if rate >= 100 else f" {rate:.3g}", va="center", fontsize=8)
    axis.set_xlabel(RATES[comparison.rate])
    axis.set_xlim(0, 1.15 * max(rates))
    axis.spines[["top", "right"]].set_visible(False)
    settings = results["settings"]
    axis.set_title(f"{comparison.title}, {settings['shape']}, {settings['precision']}", loc="left")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
