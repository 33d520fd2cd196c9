"""What the linters of Dockerfiles and shell scripts find, where they are installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("scripts/slurm/*.sbatch"))


@pytest.mark.parametrize(
    "command",
    [
        ["hadolint", "--no-color", "Dockerfile", "docker/cpu.Dockerfile"],
        # Each batch script together with the job.sh that it sources.
        ["shellcheck", "--external-sources", "--severity=warning", *SCRIPTS, "docker/smoke.sh", "ci/run.sh"],
    ],
    ids=lambda command: command[0],
)
def test_linter_finds_nothing(command: list[str]) -> None:
    program = shutil.which(command[0], path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip(f"{command[0]} is not installed")
    ended = subprocess.run([program, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout + ended.stderr) == (0, "")
