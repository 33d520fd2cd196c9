"""Whether two runs are the same: their metrics, and their newest checkpoints bit for bit."""

import json
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from celltron.train.checkpoint_folder import STATE_FOLDER, find_checkpoint, list_checkpoints, verify_checkpoint
from celltron.train.metrics import METRICS_NAME

# What a step computes; speed, and what else a clock says, differs from run to run.
COMPUTED = ("step", "loss", "learning_rate", "grad_norm", "validation_loss", "unigram_loss")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """What was computed, of every line of a run's metrics."""
    records = [json.loads(line) for line in (run / METRICS_NAME).read_text(encoding="utf-8").splitlines()]
    return [{key: record[key] for key in COMPUTED if key in record} for record in records]


def read_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every parameter and every moment of the optimizer in a checkpoint, whole, whatever layout wrote it."""
    reader = FileSystemReader(checkpoint / STATE_FOLDER)
    tensors = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata), name
        tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def compare_runs(run: Path, other: Path) -> list[str]:
    """Say what differs between two finished runs of one config, a sentence each; nothing where they are the same.

    Equal are: the computed numbers of every line of metrics; the loader's state, so that the next cell is the same; and
    every bit of the newest checkpoint's parameters and optimizer.

    Raises:
        InputError: a newest checkpoint is damaged.
    """
    differences = _compare_metrics(read_metrics(run), read_metrics(other))
    newest, newest_of_other = find_checkpoint(run), find_checkpoint(other)
    for checkpoint in (newest, newest_of_other):
        verify_checkpoint(checkpoint)
    state, state_of_other = (json.loads((path / "run.json").read_text()) for path in (newest, newest_of_other))
    differences += [
        f"run.json's {key} is {state.get(key)!r} in {newest}, {state_of_other.get(key)!r} in {newest_of_other}"
        for key in state.keys() | state_of_other.keys()
        if state.get(key) != state_of_other.get(key)
    ]
    tensors, tensors_of_other = read_tensors(newest), read_tensors(newest_of_other)
    if tensors.keys() != tensors_of_other.keys():
        return [*differences, f"{newest} and {newest_of_other} do not hold tensors of the same names"]
    unequal = [name for name in tensors if not torch.equal(tensors[name], tensors_of_other[name])]
    if unequal:
        differences.append(f"{len(unequal)} of {len(tensors)} tensors differ in {newest}, the first is {unequal[0]}")
    return differences


def _compare_metrics(records: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[str]:
    for number, (record, other) in enumerate(zip(records, others, strict=False), start=1):
        if record != other:
            return [f"line {number} of {METRICS_NAME} says {record}, in the other run {other}"]
    if len(records) != len(others):
        return [f"{METRICS_NAME} has {len(records)} lines, in the other run {len(others)}"]
    return []


def find_litter(run: Path, *, keep: int) -> list[str]:
    """What a finished run should not have left in its folder of checkpoints, a sentence each.

    Raises:
        InputError: a checkpoint that was kept is damaged.
    """
    folder = run / "checkpoints"
    kept = list_checkpoints(folder)
    for checkpoint in kept:
        verify_checkpoint(checkpoint)
    extra = sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
    litter = [f"{folder} still holds {', '.join(extra)}"] if extra else []
    if len(kept) > keep:
        litter.append(f"{folder} holds {len(kept)} checkpoints, {keep} were to be kept")
    return litter
