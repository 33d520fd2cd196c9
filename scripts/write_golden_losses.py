"""Write tests/golden/losses_cpu.txt anew, when a change of the numbers is meant; see tests/golden/test_losses.py."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
HEADER = "# step loss: scripts/write_golden_losses.py, float64 on a CPU"


def measure_losses() -> list[tuple[int, float]]:
    """Run the single process of the equivalence tests; step and loss."""
    with tempfile.TemporaryDirectory() as folder:
        equivalence = TESTS / "equivalence"
        programs = [equivalence / "ranks.py", "1", Path(folder) / "rendezvous", equivalence / "train_layouts.py"]
        command = [sys.executable, *map(str, programs), folder, "one"]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        lines = (Path(folder) / "one" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [(record["step"], record["loss"]) for record in map(json.loads, lines) if "loss" in record]


def main() -> None:
    """Read the arguments, run, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=TESTS / "golden" / "losses_cpu.txt", help="the file to write")
    arguments = parser.parse_args()
    lines = [HEADER, *(f"{step} {loss:.17g}" for step, loss in measure_losses())]
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
