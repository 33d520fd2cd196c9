"""The losses of a short run of one process, step by step, are those written down in losses_cpu.txt.

Float64 on a CPU; `python scripts/write_golden_losses.py` writes the file anew, when a change of the numbers is meant.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).with_name("losses_cpu.txt")
PROGRAM = Path(__file__).parents[1] / "equivalence" / "train_layouts.py"
# Processors and mathematical libraries differ in the last bits; six steps carry them on.
TOLERANCE = 1e-9


def test_losses_are_the_golden_ones(tmp_path: Path, run_ranks: Callable[..., str]) -> None:
    run_ranks(PROGRAM, tmp_path, "one", world_size=1)
    lines = (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    found = np.array([[record["step"], record["loss"]] for record in records])
    golden = np.loadtxt(GOLDEN, ndmin=2)
    np.testing.assert_array_equal(found[:, 0], golden[:, 0])
    np.testing.assert_allclose(found[:, 1], golden[:, 1], rtol=0, atol=TOLERANCE)
    assert golden[-1, 1] < golden[0, 1] - 0.3
