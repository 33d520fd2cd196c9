"""What imports and exports of whole models share; they run on one process."""

from pathlib import Path
from typing import Literal

import torch

from celltron.core import InputError
from celltron.models.geneformer import WholeGeneformer, build_geneformer, put_parameters
from celltron.train.checkpoint import RunState, save_model
from celltron.train.launch import read_launch, start_process_group
from celltron.train.parallel import ParallelConfig, start_model_parallel
from celltron.train.precision import DTYPES, Precision, name_dtype


def check_conversion(what: Literal["import", "export"], out: Path, *, replace: bool) -> None:
    """Refuse several processes, and a folder that is there and not to be replaced."""
    world_size = read_launch().world_size
    if world_size > 1:
        raise InputError(f"the {what} was started on {world_size} processes, but needs one; start it alone")
    if not replace and out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} exists already; choose another --out, or give --replace")


def write_import(whole: WholeGeneformer, out: Path, precision: Precision, *, replace: bool) -> None:
    """Write a model without an optimizer as a checkpoint of step 0.

    Args:
        whole: The model.
        out: The checkpoint's folder.
        precision: Of its parameters; those of `whole` are rounded to it.
        replace: Whether `out` may be a checkpoint already.

    Raises:
        InputError: the folder is in use.
    """
    dtype, launch = DTYPES[precision], read_launch()
    start_process_group(launch, torch.device("cpu"))
    start_model_parallel(ParallelConfig(), seed=0)
    model = build_geneformer(whole.config, num_tokens=whole.num_tokens, dtype=dtype, sequence_parallel=False, seed=0)
    put_parameters(model, whole.parameters)
    state = RunState(
        step=0, seed=0, loader={}, distributed_optimizer=False, dtype=name_dtype(dtype), has_optimizer=False
    )
    save_model(out, state, model, files=whole.travelling_files(), launch=launch, replace=replace)
