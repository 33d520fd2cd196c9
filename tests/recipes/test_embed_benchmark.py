"""The benchmark of embedding on very little: it compares the vectors of all systems, and writes its results."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from celltron.recipes.benchmarks.bench_compare import check_agreement

PROGRAM = Path(__file__).parents[2] / "recipes" / "benchmarks" / "embed.py"
SMALL = ["--shape", "tiny", "--cells", "8", "batch_size=2", "padded_share=2", "max_length=48", "pack_cells=2"]
SYSTEMS = ["ours_packed", "ours_padded", "hf_grouped", "hf_padded"]


@pytest.mark.slow
def test_embedding_is_compared(warm_python: Any, tmp_path: Path) -> None:
    once = ["--passes", "1", "--repeats", "1", "--threads", "1", "--out", tmp_path]
    ended = warm_python.run(PROGRAM, *SMALL, *once)
    assert ended.code == 0 and not ended.left_running, ended.stderr
    results = json.loads((tmp_path / "embed.json").read_text())
    assert results["format"] == "celltron-embed-benchmark" and results["commit"] and results["versions"]["transformers"]
    for name in SYSTEMS:
        row = results[name]
        assert row["real_tokens_per_second"] > row["cells_per_second"] > 0 and row["seconds"]["steps"] == 1
    assert [results[name]["cells"] for name in SYSTEMS] == [8, 8, 8, 4]
    assert results["ours_packed"]["tokens"] == results["hf_grouped"]["tokens"] <= 8 * 48
    assert results["layers"] == {"layers": "torch", "reason": "the device is a CPU"}
    assert set(results["ratios"]) == {f"{ours} / {theirs}" for ours in SYSTEMS[:2] for theirs in SYSTEMS[2:]}
    agreement = results["agreement"]
    assert set(agreement["largest_difference"]) == set(SYSTEMS[1:])
    # All systems agree far more closely than any two cells do, so that the comparison says something.
    assert max(agreement["largest_difference"].values()) < 1e-5 < 1e-2 < agreement["nearest_cells"]
    text = (tmp_path / "embed.txt").read_text()
    assert "ours_packed / hf_padded" in text and "TFLOP/s" not in text
    assert "| ours_packed |" in (tmp_path / "embed.md").read_text()
    assert (tmp_path / "embed.png").read_bytes().startswith(b"\x89PNG")


def test_vectors_that_differ_end_the_benchmark() -> None:
    ours_CD = np.eye(4, 6, dtype=np.float32) + 1
    vectors = {name: ours_CD[::2] if name == "hf_padded" else ours_CD.copy() for name in SYSTEMS}
    how: dict[str, Any] = {"every": {"hf_padded": 2}, "tolerance": 1e-5}
    agreement = check_agreement(vectors, **how)
    assert agreement["largest_difference"] == {"ours_padded": 0.0, "hf_grouped": 0.0, "hf_padded": 0.0}
    # |(1, -1)| over |(2, 1, 1, 1, 1, 1)|.
    assert agreement["nearest_cells"] == pytest.approx(2**0.5 / 3)
    vectors["hf_grouped"][2] *= 1.001
    with pytest.raises(RuntimeError, match=r"hf_grouped and ours_packed are up to 1\.00e-03"):
        check_agreement(vectors, **how)
    vectors["hf_grouped"][2] = np.nan
    with pytest.raises(RuntimeError, match="hf_grouped"):
        check_agreement(vectors, **how)


def test_cells_that_do_not_fill_batches_are_refused(warm_python: Any) -> None:
    ended = warm_python.run(PROGRAM, "--cells", "12")
    assert ended.code == 2 and len(ended.stderr.splitlines()) == 1 and "multiple of" in ended.stderr
