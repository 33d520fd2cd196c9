"""What tests that start processes share."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from celltron.cells import convert
from celltron.core import load_published_geneformer

RANKS = Path(__file__).parent / "equivalence" / "ranks.py"
WARM_PYTHON = Path(__file__).parent / "warm_python.py"
TINY_CONFIG = """
device: cpu
data: {max_length: 32, validation_fraction: 0.15}
model:
  num_layers: 2
  hidden_size: 16
  ffn_hidden_size: 32
  num_attention_heads: 2
  max_positions: 32
  hidden_dropout: 0.1
  attention_dropout: 0.1
  vocabulary_multiple: 8
schedule: {learning_rate: 1.0e-2, warmup_steps: 2}
loop: {max_steps: 4, global_batch_size: 8, micro_batch_size: 2, log_every: 1}
"""


@dataclass(frozen=True)
class Ended:
    """How a program ended and all that it printed."""

    code: int
    stdout: str
    stderr: str
    left_running: bool
    """Whether it left a process behind, which has been ended."""


class WarmPython:
    """Starts `python ARGUMENT ...` without the wait for its imports: see warm_python.py."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_started = 0
        # One thread, and the loop-back device: no network is needed.
        self.environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self.server = subprocess.Popen(
            [sys.executable, str(WARM_PYTHON)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "server.txt").open("w"),
            env=self.environment,
            text=True,
        )
        self._answer()

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self.server.stdin is not None
        print(json.dumps(request), file=self.server.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        assert line, (self.folder / "server.txt").read_text()[-4000:]
        return json.loads(line)

    def start(
        self,
        *arguments: object,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        max_file_bytes: int | None = None,
    ) -> "WarmProcess":
        """Start a program: its file, or `-m` and a module, then its arguments."""
        self.num_started += 1
        outputs = [self.folder / f"{self.num_started}.{name}.txt" for name in ("stdout", "stderr")]
        request = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd or self.folder),
            "environment": self.environment | dict(environment or {}),
            "max_file_bytes": max_file_bytes,
            "stdout": str(outputs[0]),
            "stderr": str(outputs[1]),
        }
        return WarmProcess(self._ask, self._ask(request), outputs[0], outputs[1])

    def run(self, *arguments: object, timeout_seconds: float = 120, **more: Any) -> Ended:
        """Start a program as `start` does and wait for its end."""
        return self.start(*arguments, **more).wait(timeout_seconds)


@dataclass
class WarmProcess:
    """A started program: the first process of its own session."""

    ask: Callable[[dict[str, Any]], Any]
    pid: int
    stdout: Path
    stderr: Path

    def kill(self) -> bool:
        """End all processes of the program at once; whether any was left."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def wait(self, timeout_seconds: float = 120) -> Ended:
        """How it ended; fails, and ends it, when time is up."""
        code = self.ask({"pid": self.pid, "timeout_seconds": timeout_seconds})
        left_running = self.kill()
        ended = Ended(-1 if code is None else code, self.stdout.read_text(), self.stderr.read_text(), left_running)
        if code is None:
            self.ask({"pid": self.pid, "timeout_seconds": 10})
            pytest.fail(f"not done after {timeout_seconds} s:\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}")
        return ended


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmPython]:
    """`warm_python.run(program, *arguments)` for tests that start many programs."""
    python = WarmPython(tmp_path_factory.mktemp("warm_python"))
    yield python
    assert python.server.stdin is not None
    python.server.stdin.close()
    python.server.wait(60)


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory, warm_python: WarmPython) -> Callable[..., str]:
    """`run_ranks(program, *arguments, world_size=..., timeout_seconds=...)`: all that it printed; see `ranks.py`.

    Fails when a rank does not end well, when time is up, or when a process is left behind.
    """

    def run(program: Path, *arguments: object, world_size: int, timeout_seconds: float = 300) -> str:
        rendezvous = tmp_path_factory.mktemp("ranks") / "rendezvous"
        ended = warm_python.run(
            RANKS, world_size, rendezvous, program, *arguments, timeout_seconds=timeout_seconds
        )
        assert ended.code == 0 and not ended.left_running, (ended.stdout + ended.stderr)[-4000:]
        return ended.stdout + ended.stderr

    return run


@pytest.fixture(scope="session")
def tiny_cells() -> anndata.AnnData:
    """97 invented cells of three donors over 120 real genes, most cells with 20 to 50 of them."""
    random = np.random.default_rng(1)
    rate_G = random.lognormal(-1.6, 1.5, size=120)
    counts_CG = random.poisson(random.lognormal(0.0, 0.3, size=(97, 1)) * rate_G)
    obs = pd.DataFrame({"donor": [f"donor {i % 3}" for i in range(97)]}, index=[f"cell{i}" for i in range(97)])
    genes = load_published_geneformer("gc30M")[0].genes[1000:1120]
    return anndata.AnnData(sp.csr_matrix(counts_CG.astype(np.float32)), obs=obs, var=pd.DataFrame(index=list(genes)))


@pytest.fixture(scope="session")
def tiny_h5ad(tmp_path_factory: pytest.TempPathFactory, tiny_cells: anndata.AnnData) -> Path:
    """The tiny cells as a file; not to be changed."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.h5ad"
    tiny_cells.write_h5ad(path)
    return path


@pytest.fixture(scope="session")
def tiny_store(tiny_h5ad: Path) -> Path:
    """The tiny cells as a store of three shards; not to be changed."""
    path = tiny_h5ad.with_name("tiny.store")
    convert([tiny_h5ad], path, shard_cells=40)
    return path


@pytest.fixture(scope="session")
def tiny_config(tiny_h5ad: Path) -> Path:
    """A config of a run that takes a second, on a model of two layers; it wants --data and --out."""
    path = tiny_h5ad.with_name("tiny.yaml")
    path.write_text(TINY_CONFIG)
    return path
