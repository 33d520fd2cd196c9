"""Measure one job in a process of its own: the job is JSON on standard input, the answer JSON on standard output.

`data_loading.py` starts it, under the interpreter that has what is measured, so it needs the standard library alone. A
job names a module of this folder and a generator function in it, which is called with the job and yields

1. once, when everything is imported: from here on memory is counted;
2. once, when everything is open and compiled: from here on time is counted;
3. of a reader, (cells, tokens) of every batch, without end; of a converter, (cells, 0) when all is written.
"""

import importlib
import importlib.metadata
import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Generator
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 0.02
Stream = Generator[tuple[int, int], None, None]


def main() -> None:
    """Read the job, measure it, print the answer; whatever libraries print goes to standard error."""
    job = json.load(sys.stdin)
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["cores"]])
    try:
        versions = {name: importlib.metadata.version(name) for name in job["packages"]}
        module = importlib.import_module(job["module"])
        result = measure(job, getattr(module, job["function"])(job)) | {"status": "measured", "versions": versions}
    except (importlib.metadata.PackageNotFoundError, ModuleNotFoundError) as error:
        result = {"status": "not installed", "reason": f"{error.name} is not installed"}
    except Exception as error:
        traceback.print_exc()
        result = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    print(json.dumps(result), file=answer, flush=True)


def measure(job: dict[str, Any], stream: Stream) -> dict[str, Any]:
    """Run a job's generator and watch it."""
    next(stream)
    read_once(Path(job["input"]))
    os.sync()  # what earlier jobs left to write is not this one's work
    with Memory() as memory:
        next(stream)
        cpu, start = cpu_seconds(), time.perf_counter()
        cells = tokens = 0
        first_seconds = seconds = 0.0
        for some_cells, some_tokens in stream:
            cells += some_cells
            tokens += some_tokens
            seconds = time.perf_counter() - start
            first_seconds = first_seconds or seconds
            is_epoch = cells >= job["cells"] and seconds >= job["min_seconds"]
            if is_epoch or seconds >= job["max_seconds"]:
                break
        cpu = cpu_seconds() - cpu
    result = {"cells": cells, "tokens": tokens, "seconds": seconds, "first_seconds": first_seconds, "cpu_seconds": cpu}
    result |= memory.growth()
    if job["output"] is not None:
        result["bytes"] = sum(path.stat().st_size for path in files_of(Path(job["output"])))
    stream.close()
    return result


def read_once(path: Path) -> None:
    """Bring files into the page cache."""
    for part in files_of(path):
        with part.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def files_of(path: Path) -> list[Path]:
    """A file, or all files below a folder."""
    return [path] if path.is_file() else sorted(part for part in path.rglob("*") if part.is_file())


def cpu_seconds() -> float:
    """Processor time of this process and of its worker processes so far."""
    ticks = 0
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


class Memory:
    """How far the memory of this process (worker processes not counted) grows while the context is open.

    ``peak_bytes`` is all resident memory, pages of mapped files included, exact; ``private_bytes`` is memory that is no
    file's, sampled.
    """

    def __init__(self) -> None:
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Memory":
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        self._before = self._after = self._status()
        self._private = self._before["RssAnon"]
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._sampler.join()
        self._after = self._status()

    def growth(self) -> dict[str, int]:
        """Peaks above what there was at the beginning."""
        return {
            "peak_bytes": self._after["VmHWM"] - self._before["VmRSS"],
            "private_bytes": self._private - self._before["RssAnon"],
        }

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._private = max(self._private, self._status()["RssAnon"])

    def _status(self) -> dict[str, int]:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        fields = (line.split(":") for line in lines if line.endswith(" kB"))
        return {name: 1024 * int(text.split()[0]) for name, text in fields}


if __name__ == "__main__":
    main()
