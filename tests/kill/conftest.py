"""What the kill tests share: small files of many shards, and a Python that forks copies of itself to be killed."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from celltron.core import load_published_geneformer

HERE = Path(__file__).parent
NUM_KILLS = 30


@pytest.fixture(scope="session")
def files_of() -> Callable[[Path], dict[str, bytes]]:
    """`files_of(folder)`: every file below a folder, by its relative name."""
    return lambda folder: {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@dataclass
class Forks:
    """Runs functions of a program in copies of one process; see forks.py."""

    server: "subprocess.Popen[str]"

    def run(
        self, function: str, *, kill_after: float | None = None, here: bool = False, **arguments: Any
    ) -> dict[str, Any]:
        """Call a function; it is killed so many seconds after it began, if it still runs then."""
        assert self.server.stdin is not None and self.server.stdout is not None
        request = {"function": function, "arguments": arguments, "kill_after": kill_after, "here": here}
        print(json.dumps(request), file=self.server.stdin, flush=True)
        line = self.server.stdout.readline()
        assert line, f"forks.py ended: {self.server.poll()}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill_times(self, run: Callable[[], dict[str, Any]], seed: int) -> list[float]:
        """Moments spread evenly at random over the time that an undisturbed run takes."""
        seconds = []
        for _ in range(3):
            answer = run()
            assert answer["code"] == 0, answer["error"]
            seconds.append(answer["seconds"])
        moments: list[float] = (min(seconds) * np.random.default_rng(seed).random(NUM_KILLS)).tolist()
        return moments


@pytest.fixture(scope="session")
def slow_writers() -> Iterator[Forks]:
    """`slow_writers.run("run_convert", ...)`."""
    server = subprocess.Popen(
        [sys.executable, str(HERE / "forks.py"), str(HERE / "slow_writers.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None and server.stdin is not None
    assert json.loads(server.stdout.readline()) == "ready"
    yield Forks(server)
    server.stdin.close()
    server.wait(10)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three files of 40 cells and 60 genes each, the second ordered by genes, the last with 10 genes of its own."""
    folder = tmp_path_factory.mktemp("sources")
    random = np.random.default_rng(0)
    genes = load_published_geneformer("gc30M")[0].genes[:70]
    paths = []
    for i, form in enumerate((sp.csr_matrix, sp.csc_matrix, sp.csr_matrix)):
        counts = random.poisson(random.lognormal(0.0, 1.5, size=60), size=(40, 60))
        obs = pd.DataFrame({"donor": pd.Categorical(["a", "b"] * 20)}, index=[f"cell{i}.{k}" for k in range(40)])
        var = pd.DataFrame(index=list(genes[10:] if i == 2 else genes[:60]))
        paths.append(str(folder / f"{i}.h5ad"))
        anndata.AnnData(form(counts.astype(np.float32)), obs=obs, var=var).write_h5ad(paths[-1])
    return paths
