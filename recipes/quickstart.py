"""The whole path on bundled real cells, in minutes: convert, pretrain the tiny Geneformer, verify, export.

It runs the commands that a person would type, prints each, and writes `quickstart/summary.json`.
"""

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from celltron.core import InputError, describe_seconds, parse_arguments, run_command, write_atomically

RECIPES = Path(__file__).resolve().parent
CELLS = RECIPES / "data" / "pbmc_citeseq" / "pbmc_citeseq.h5ad"
CONFIG = RECIPES / "configs" / "geneformer_tiny.yaml"
MARK_NAME = ".made_by_quickstart"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Where the quickstart writes and what it computes on."""

    out: str = "quickstart"
    """Folder for everything that is made; what an earlier quickstart made there is replaced."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """What to train on."""


def main(arguments: Sequence[str]) -> None:
    """Run the quickstart."""
    config = parse_arguments(Config, arguments, flags={"--out": "out", "--device": "device"}).config
    out = Path(config.out)
    store, run, huggingface = out / "cells.store", out / "run", out / "huggingface"
    clear(out, [store, run, huggingface])
    celltron("convert", CELLS, "--out", store)
    start = time.monotonic()
    celltron("train", "--config", CONFIG, "--data", store, "--out", run, "--device", config.device)
    train_seconds = time.monotonic() - start
    checkpoint = run / "checkpoints" / (run / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    celltron("verify", checkpoint)
    celltron("export", "--checkpoint", checkpoint, "--out", huggingface)
    validation = last_validation(run / "metrics.jsonl")
    summary = {
        "validation_loss": validation["validation_loss"],
        "unigram_loss": validation["unigram_loss"],
        "train_seconds": round(train_seconds, 1),
        "checkpoint": str(checkpoint),
        "huggingface_folder": str(huggingface),
    }
    write_atomically(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    print(
        f"\nTrained in {describe_seconds(train_seconds)}. On cells it never saw the model is at "
        f"{summary['validation_loss']:.3f} nats a masked gene;\nknowing only how common each gene is costs "
        f"{summary['unigram_loss']:.3f} nats: {summary['unigram_loss'] - summary['validation_loss']:.3f} better.\n\n"
        f"  checkpoint            {checkpoint}\n  Hugging Face folder   {huggingface}\n"
        f"  metrics               {run / 'metrics.jsonl'}\n  summary               {out / 'summary.json'}"
    )


def clear(out: Path, folders: Sequence[Path]) -> None:
    """Remove what an earlier quickstart made, and nothing that it did not make."""
    mark = out / MARK_NAME
    if out.exists() and any(out.iterdir()) and not mark.exists():
        raise InputError(f"{out} holds files that no quickstart made; choose another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)


def celltron(*words: str | Path) -> None:
    """Print and run one celltron command."""
    texts = [str(word) for word in words]
    print("\n$ celltron " + shlex.join(texts), flush=True)
    if code := subprocess.run([sys.executable, "-m", "celltron.cli.main", *texts], check=False).returncode:
        raise InputError(f"celltron {texts[0]} failed with exit code {code}; its message above says why")


def last_validation(metrics: Path) -> dict[str, Any]:
    """The newest validation record of a run."""
    records: list[dict[str, Any]] = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if "validation_loss" in record][-1]


if __name__ == "__main__":
    sys.exit(run_command(main))
