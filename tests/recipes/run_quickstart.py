"""The quickstart on other cells, its commands forked: `run_quickstart.py CELLS CONFIG ARGUMENT ...`."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from celltron.cli.main import main as celltron
from celltron.core import run_command
from celltron.recipes import quickstart


def run_forked(command: list[str], *, check: bool) -> "subprocess.CompletedProcess[Any]":
    """Instead of `subprocess.run([python, "-m", "celltron.cli.main", ...])`, which would import everything again."""
    assert command[:3] == [sys.executable, "-m", "celltron.cli.main"] and not check
    pid = os.fork()
    if pid == 0:
        sys.exit(celltron(command[3:]))
    _, status = os.waitpid(pid, 0)
    return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    quickstart.CELLS, quickstart.CONFIG = Path(sys.argv[1]), Path(sys.argv[2])
    quickstart.subprocess.run = run_forked  # type: ignore[attr-defined]
    sys.exit(run_command(quickstart.main, sys.argv[3:]))
