"""Turn a Geneformer checkpoint of any layout into a Hugging Face folder that `transformers` loads; on one process."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from celltron.core import InputError, MedianTable, Vocabulary, parse_arguments, run_command
from celltron.models.geneformer import (
    ModelShape,
    WholeGeneformer,
    build_geneformer,
    read_model_shape,
    take_parameters,
    to_huggingface,
)
from celltron.recipes.shared.conversion import check_conversion
from celltron.train.checkpoint import RunState, find_checkpoint, load_model, read_run_state, verify_checkpoint
from celltron.train.launch import read_launch, start_process_group
from celltron.train.parallel import ParallelConfig, start_model_parallel
from celltron.train.precision import DTYPES, Precision

FLAGS = {"--checkpoint": "checkpoint", "--out": "out", "--dtype": "dtype", "--replace": "replace"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """An export."""

    checkpoint: str = ""
    """A checkpoint's folder; or a run's folder, whose newest checkpoint is taken."""
    out: str = ""
    """The Hugging Face folder to make."""
    dtype: Precision = "fp32"
    """Of the exported tensors; what the checkpoint holds is rounded to it."""
    replace: bool = False
    """Whether `out` may be a folder that an export made."""

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ValueError("checkpoint is empty; name one, such as --checkpoint runs/first")
        if not self.out:
            raise ValueError("out is empty; name a folder to make, such as --out runs/first/huggingface")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the export that the command line describes."""
    config = parse_arguments(Config, sys.argv[1:] if arguments is None else arguments, flags=FLAGS).config
    out = Path(config.out)
    check_conversion("export", out, replace=config.replace)
    checkpoint = find_checkpoint(Path(config.checkpoint))
    whole = read_whole(checkpoint)
    to_huggingface(
        whole,
        out,
        dtype=DTYPES[config.dtype],
        facts=gather_facts(checkpoint, read_run_state(checkpoint)),
        replace=config.replace,
    )
    without = "" if whole.medians is not None else "; it holds no medians, as the checkpoint has none"
    print(f"{out}: {checkpoint} as a Hugging Face folder in {config.dtype}{without}", file=sys.stderr)


def read_whole(checkpoint: Path) -> WholeGeneformer:
    """Verify a checkpoint of any layout and read its model whole, in its own precision.

    Raises:
        InputError: the checkpoint is damaged, or its files do not belong together.
    """
    verify_checkpoint(checkpoint)
    shape = read_model_shape(checkpoint)
    vocabulary = Vocabulary.from_json(checkpoint / "vocabulary.json")
    medians_path = checkpoint / "medians.json"
    return WholeGeneformer(
        config=shape.config,
        num_tokens=shape.num_tokens,
        parameters=read_parameters(checkpoint, shape),
        vocabulary=vocabulary,
        medians=MedianTable.from_json(medians_path) if medians_path.is_file() else None,
        max_length=shape.max_length,
    )


def read_parameters(checkpoint: Path, shape: ModelShape) -> dict[str, torch.Tensor]:
    """Load the parameters of a verified checkpoint into one process."""
    state = read_run_state(checkpoint)
    dtype = next((dtype for dtype in DTYPES.values() if str(dtype) == f"torch.{state.dtype}"), None)
    if dtype is None:
        raise InputError(f"{checkpoint / 'run.json'}: dtype is {state.dtype!r}; use the celltron that wrote it")
    start_process_group(read_launch(), torch.device("cpu"))
    start_model_parallel(ParallelConfig(), seed=0)
    model = build_geneformer(
        shape.config, num_tokens=shape.num_tokens, dtype=dtype, sequence_parallel=False, seed=state.seed
    )
    load_model(checkpoint, model)
    return take_parameters(model)


def gather_facts(checkpoint: Path, state: RunState) -> dict[str, object]:
    """What the model card says of the training: what the checkpoint and the run's metrics tell, and nothing else."""
    if not state.has_optimizer:
        return {"origin": "imported into celltron, not trained by it"}
    facts: dict[str, object] = {"training steps": state.step, "seed": str(state.seed), "trained in": state.dtype}
    split_path = checkpoint / "split.json"
    if split_path.is_file():
        try:
            split = json.loads(split_path.read_text(encoding="utf-8"))
            facts["training cells"] = int(split["train"]["cells"])
            facts["validation cells"] = f"{int(split['validation']['cells']):,}, set aside by {split['rule']['by']}"
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{split_path} is no manifest of a split; use an undamaged checkpoint") from None
    validation = find_validation(checkpoint.resolve().parent.parent / "metrics.jsonl", state.step)
    if validation:
        facts["validation loss, nats a masked gene"] = validation["validation_loss"]
        facts["the same of gene frequencies alone (unigram)"] = validation.get("unigram_loss", "not measured")
    return facts


def find_validation(metrics: Path, step: int) -> dict[str, Any]:
    """The run's validation after a step; empty where its metrics do not tell."""
    found: dict[str, Any] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            # A line that a kill cut short.
            continue
        if isinstance(record, dict) and record.get("step") == step and "validation_loss" in record:
            found = record
    return found


if __name__ == "__main__":
    sys.exit(run_command(main))
