"""What the tests of commands and recipes share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Celltron = Callable[..., Any]


@pytest.fixture(scope="session")
def celltron(warm_python: Any) -> Celltron:
    """`celltron("train", ...)`: the command, as a process of its own; see `warm_python`."""

    def run(*arguments: object, **more: Any) -> Any:
        return warm_python.run("-m", "celltron.cli.main", *arguments, **more)

    return run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, celltron: Celltron, tiny_config: Path, tiny_h5ad: Path) -> Path:
    """A finished run of four steps, made of the .h5ad file by donors; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    split = ["data.validation_by=donor", "data.validation_groups=[donor 1]"]
    arguments = ["--config", tiny_config, "--data", tiny_h5ad, "--out", out, *split]
    ended = celltron("train", *arguments, "loop.validate_every=2", "loop.save_every=2")
    assert ended.code == 0, ended.stderr
    return out


@pytest.fixture(scope="session")
def read_metrics() -> Callable[[Path], list[dict[str, Any]]]:
    """Reads the metrics of a run's folder."""
    return lambda run: [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
