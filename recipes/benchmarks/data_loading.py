"""How fast cells are converted and delivered: celltron and its peers in turn, on the same data.

    python recipes/benchmarks/data_loading.py --quick
    python recipes/benchmarks/data_loading.py --only celltron_fly,scdl --real my.h5ad

Each measurement is a process of its own on the same processor cores, with the files in the page cache and the cells
shuffled, for one epoch or up to a limit; all are repeated in turn. What is measured stands in
`data_loading_steps.json`, how it is done in `bench_cells.py` for celltron and in `bench_peers.py` for its peers, which
have an environment of their own: `make bench-env`.

Written to the folder `--out`: `data_loading.json`, `.txt` (tables), `.png` and `.md` (for RESULTS.md), `log.txt` (what
the measured programs said), and `data/`, which may be removed.
"""

import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from celltron.core import InputError, __version__, config_to_dict, parse_arguments, run_command, write_atomically
from celltron.recipes.benchmarks.bench_machine import describe_commit, describe_machine

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CELLS = ROOT / "recipes" / "data" / "pbmc_citeseq" / "pbmc_citeseq.h5ad"
FORMAT, VERSION = "celltron-data-loading-benchmark", 1
FLAGS = {
    "--" + name.replace("_", "-"): name
    for name in ("out", "cells", "real", "only", "quick", "tiny", "peers_python", "repeats", "cores", "threads", "gzip")
}


class Step(NamedTuple):
    """One thing to measure."""

    system: str
    """What `only` names. Those of celltron begin with "celltron"."""
    label: str
    """Its name in the tables; there are no two of one name."""
    function: str
    """In bench_cells.py for systems of celltron, else in bench_peers.py."""
    source: str
    """What is read: "h5ad", or the target of another step."""
    target: str | None
    """What is made, if this is a conversion."""
    delivers: str
    """"raw counts", "raw rows", "tokens" or "masked tokens"."""
    packages: list[str]
    """Whose versions are reported; one that is missing means that the step cannot be measured."""
    settings: Mapping[str, Any]

    @property
    def is_celltron(self) -> bool:
        """Whether it runs under this interpreter."""
        return self.system.startswith("celltron")


STEPS = tuple(Step(**step) for step in json.loads((HERE / "data_loading_steps.json").read_text(encoding="utf-8")))
OWN_CODE = "hand_written"
"""The system of steps in which a peer only reads, while ranking or masks are fast code written for this benchmark."""
OUR_TOKENS = ["celltron, ranked cache", "celltron, from counts"]
JOB_SETTINGS = ("batch", "cores", "max_length", "max_seconds", "min_seconds", "seed", "threads")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """What is measured, and for how long."""

    out: str = "runs/data_loading"
    """Folder for results and data."""
    cells: int = 200_000
    """Made cells."""
    real: str | None = None
    """Real .h5ad file with raw counts in X as CSR; None takes the cells of the quickstart."""
    only: str = ""
    """Systems to measure, with commas between them; empty for all."""
    quick: bool = False
    """40,000 cells."""
    tiny: bool = False
    """400 cells, once, for part of a second, without real cells: to see that everything runs."""
    peers_python: str = str(ROOT / ".venv-bench" / "bin" / "python")
    """Interpreter of the peers' environment."""
    repeats: int = 3
    """Times that everything is measured; the median, the least and the most are reported."""
    min_seconds: float = 2.0
    """Epochs are repeated until so much time has passed."""
    max_seconds: float = 60.0
    """A reader is stopped after so much time, be its epoch over or not."""
    enough_seconds: float = 120.0
    """What took so much time in all is not repeated again."""
    limit_seconds: float = 3600.0
    """A measurement that takes longer has failed."""
    batch: int = 64
    """Cells in a batch."""
    max_length: int = 2048
    """Largest number of tokens of a cell."""
    cores: int = 2
    """Processor cores that each measurement may use."""
    threads: int = 2
    """Threads of celltron; peers have the worker processes that the tables name."""
    seed: int = 0
    """Of data, orders and masks."""
    gzip: bool = False
    """Compress the made .h5ad file."""

    def __post_init__(self) -> None:
        for name in ("cells", "repeats", "batch", "cores", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: wanted 1 or more")
        known = list(dict.fromkeys(step.system for step in STEPS))
        for name in self.systems:
            if name not in known:
                raise InputError(f"only names {name!r}, which is not measured: choose from {', '.join(known)}")

    @property
    def systems(self) -> list[str]:
        """What `only` names."""
        return [name.strip() for name in self.only.split(",") if name.strip()]


class Data(NamedTuple):
    """One data set: its name and folder, what `bench_data.py` found out, and what to measure how often."""

    name: str
    folder: Path
    about: dict[str, Any]
    steps: list[Step]
    repeats: int


Run = dict[str, Any]


def main(arguments: Sequence[str]) -> None:
    """Make the data, measure, write."""
    config = parse_arguments(Config, arguments, flags=FLAGS).config
    if config.tiny:
        config = replace(config, cells=400, repeats=1, min_seconds=0.1, max_seconds=0.5)
    elif config.quick:
        config = replace(config, cells=40_000)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").unlink(missing_ok=True)
    datasets = [measure_all(data, config) for data in make_data(config)]
    results = {
        "format": FORMAT,
        "version": VERSION,
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "recipes/benchmarks/data_loading.py", *arguments]),
        "celltron": __version__,
        "commit": describe_commit(),
        "machine": describe_machine(),
        "settings": config_to_dict(config),
        "datasets": datasets,
    }
    path = out / "data_loading.json"
    write_atomically(path, json.dumps(results, indent=1) + "\n")
    if subprocess.run([sys.executable, str(HERE / "bench_report.py"), str(path)], check=False).returncode:
        raise InputError(f"{path} was written, but no tables and plot: the message above says why")
    rows = [row for data in datasets for row in [*data["conversions"], *data["readers"]]]
    failed = [row for row in rows if row["system"].startswith("celltron") and row["status"] != "measured"]
    if failed:
        raise InputError(f"{failed[0]['label']} was not measured ({failed[0]['reason']}): see {out / 'log.txt'}")


def chosen_steps(config: Config) -> list[Step]:
    """The steps of the systems that were named, and those that make what they read, in the order of `STEPS`."""
    chosen = [step for step in STEPS if not config.systems or step.system in config.systems]
    for step in chosen:  # which grows meanwhile
        chosen += [maker for maker in STEPS if maker.target == step.source and maker not in chosen]
    return [step for step in STEPS if step in chosen]


def make_data(config: Config) -> list[Data]:
    """Real cells, then made ones; a quarter of these first, converted alone and once, to compare memory."""
    steps = chosen_steps(config)
    conversions = [step for step in steps if step.target is not None]
    made = [f"seed={config.seed}", f"gzip={str(config.gzip).lower()}", f"threads={config.threads}"]
    plans = [("made cells", steps, config.repeats, [f"cells={config.cells}", *made])]
    if not config.tiny:
        plans.insert(0, ("a quarter of the made cells", conversions, 1, [f"cells={max(1, config.cells // 4)}", *made]))
    if config.real is not None or not config.tiny:
        plans.insert(0, ("real cells", steps, config.repeats, [f"real={config.real or CELLS}"]))
    found = []
    for name, its_steps, repeats, words in plans:
        folder = Path(config.out).resolve() / "data" / name.replace(" ", "_")
        command = [sys.executable, str(HERE / "bench_data.py"), f"out={folder}", *words]
        if subprocess.run(command, check=False).returncode:
            raise InputError(f"the data set {name!r} could not be made: the message above says why")
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        found.append(Data(name, folder, about, its_steps, repeats))
    return found


def measure_all(data: Data, config: Config) -> dict[str, Any]:
    """Every step on one data set, each in turn and then again: conversions, then readers."""
    runs: dict[str, list[Run]] = {step.label: [] for step in data.steps}
    for is_conversion in (True, False):
        for repeat in range(data.repeats):
            for step in data.steps:
                before = runs[step.label]
                spent = sum(run.get("seconds", config.enough_seconds) for run in before)  # no second try of what failed
                if (step.target is not None) == is_conversion and spent < config.enough_seconds:
                    before.append(measure(step, data, config, runs))
                    turn = f"{data.name}, {repeat + 1} of {data.repeats}"
                    print(f"{turn}: {step.label}: {describe(before[-1])}", flush=True)
    rows = [summarise(step, runs[step.label], data) for step in data.steps]
    about = {key: value for key, value in data.about.items() if key not in ("path", "config")}
    return {
        "name": data.name,
        "about": about,
        "conversions": [row for row in rows if row["kind"] == "conversion"],
        "readers": [row for row in rows if row["kind"] == "reader"],
        "ratios": ratios(rows),
    }


def measure(step: Step, data: Data, config: Config, runs: Mapping[str, list[Run]]) -> Run:
    """Measure a step once, in a process of its own."""
    makers = [maker for maker in data.steps if maker.target == step.source]
    for run in (runs[maker.label][-1] for maker in makers):
        if run["status"] != "measured":
            return {"status": run["status"], "reason": f"what it reads could not be made: {run['reason']}"}
    python = sys.executable if step.is_celltron else config.peers_python
    if not Path(python).is_file():
        return {"status": "not installed", "reason": f"there is no {python}: run make bench-env"}
    target = None if step.target is None else data.folder / step.target
    if target is not None:
        shutil.rmtree(target, ignore_errors=True)
    largest = data.about["largest_count"]
    smallest = {"smallest": "uint8" if largest < 2**8 else "uint16" if largest < 2**16 else "uint32"}
    places = {"store": data.folder / "store", "tokens": data.folder / "tokens.npz"}
    job = {
        "module": "bench_cells" if step.is_celltron else "bench_peers",
        "function": step.function,
        "packages": step.packages,
        "input": data.about["path"] if step.source == "h5ad" else str(data.folder / step.source),
        "output": None if target is None else str(target),
        "cells": data.about["cells"],
        "genes": data.about["genes"],
        "settings": {name: smallest.get(value, value) for name, value in step.settings.items()},
        **{name: str(place) for name, place in places.items()},
        **{name: getattr(config, name) for name in JOB_SETTINGS},
    }
    return run_job(python, job, Path(config.out) / "log.txt", config.limit_seconds)


def run_job(python: str, job: Mapping[str, Any], log: Path, limit_seconds: float) -> Run:
    """Run bench_measure.py under an interpreter, with all that it starts, and take its answer."""
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    if python != sys.executable:
        environment.pop("PYTHONPATH", None)
    with log.open("a", encoding="utf-8") as stderr:
        print(f"\n{job['function']} {json.dumps(job)}", file=stderr, flush=True)
        process = subprocess.Popen(
            [python, str(HERE / "bench_measure.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
            text=True,
            start_new_session=True,
        )
        try:
            answer, _ = process.communicate(json.dumps(job), limit_seconds)
        except subprocess.TimeoutExpired:
            return {"status": "failed", "reason": f"not done after {limit_seconds:g} s"}
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # whatever it left behind
            except ProcessLookupError:
                pass
            process.wait()
    try:
        run: Run = json.loads(answer)
    except ValueError:
        return {"status": "failed", "reason": f"the process ended with code {process.returncode}; see log.txt"}
    return run


def describe(run: Run) -> str:
    """One run in a few words."""
    if run["status"] != "measured":
        return f"{run['status']}: {run['reason']}"
    return f"{run['cells'] / run['seconds']:,.0f} cells/s"


def summarise(step: Step, runs: Sequence[Run], data: Data) -> dict[str, Any]:
    """A row of the results: medians, least and most over the runs, and the most memory."""
    row: dict[str, Any] = {
        "system": step.system,
        "label": step.label,
        "kind": "reader" if step.target is None else "conversion",
        "delivers": step.delivers,
        "settings": dict(step.settings),
        "status": runs[-1]["status"],
    }
    if row["status"] != "measured":
        return row | {"reason": runs[-1]["reason"]}
    row |= {
        "versions": runs[-1]["versions"],
        "runs": len(runs),
        "cells": statistics.median(run["cells"] for run in runs),
        "seconds": spread([run["seconds"] for run in runs]),
        "cells_per_second": spread([run["cells"] / run["seconds"] for run in runs]),
        "cpu_microseconds_per_cell": spread([1e6 * run["cpu_seconds"] / run["cells"] for run in runs]),
        "seconds_to_first_batch": spread([run["first_seconds"] for run in runs]),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "private_bytes": max(run["private_bytes"] for run in runs),
    }
    if runs[-1]["tokens"]:
        row["tokens_per_second"] = spread([run["tokens"] / run["seconds"] for run in runs])
    if step.target is not None:
        row |= {"bytes": runs[-1]["bytes"], "bytes_per_non_zero": runs[-1]["bytes"] / data.about["non_zeros"]}
    return row


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """How much faster celltron is, by medians of this run, than the fastest row of a kind of peer."""
    measured = [row for row in rows if row["status"] == "measured"]
    peers = [row for row in measured if not row["system"].startswith("celltron")]
    tokens = [row for row in peers if row["kind"] == "reader" and row["delivers"] == "masked tokens"]
    against = {
        "scdl": ([row for row in peers if row["kind"] == "conversion" and row["system"] == "scdl"], ["celltron"]),
        "peers with tokens": ([row for row in tokens if row["system"] != OWN_CODE], OUR_TOKENS),
        "hand-written code on peers": ([row for row in tokens if row["system"] == OWN_CODE], OUR_TOKENS),
        "peers with raw rows": ([row for row in peers if row["delivers"] == "raw rows"], ["celltron, rows"]),
    }
    found = {}
    for whom, (theirs, labels) in against.items():
        best = max(theirs, key=lambda row: row["cells_per_second"]["median"], default=None)
        for ours in measured:
            if best is not None and ours["label"] in labels:
                ratio = ours["cells_per_second"]["median"] / best["cells_per_second"]["median"]
                found[f"{ours['label']} / {whom}"] = {"ratio": ratio, "fastest": best["label"]}
    return found


if __name__ == "__main__":
    sys.exit(run_command(main))
