"""Save one model under several layouts and export it from each: run by `ranks.py` on four ranks.

`export_layouts.py FOLDER` writes for every layout FOLDER/<layout>/checkpoints, a run as the loop leaves it, and its
logits FOLDER/<layout>.safetensors; from the first rank FOLDER/<layout>.hf, what the export recipe makes of it. Every
rank writes FOLDER/rank.<rank>.json at its end.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors.torch import save_file

from celltron.core import InputError, MedianTable, Vocabulary
from celltron.models.geneformer import Geneformer, GeneformerConfig, ModelShape, build_geneformer
from celltron.models.layers.initialise import draw_parameter
from celltron.recipes import geneformer_export_hf, geneformer_import_hf
from celltron.train.checkpoint import MODEL_METADATA, Checkpoints, RunState, load_training
from celltron.train.fully_sharded import DataParallel
from celltron.train.launch import Launch, read_launch, start_process_group
from celltron.train.optimizer import OptimizerConfig, set_learning_rate, wrap_model
from celltron.train.parallel import ParallelConfig, start_model_parallel

CPU = torch.device("cpu")
STEP = 7
VOCABULARY = Vocabulary.from_genes([f"ENSG{number:011}" for number in range(99)], with_cls_eos=False)
MEDIANS = MedianTable(VOCABULARY.genes, [0.5 + number / 7 for number in range(99)])
CONFIG = GeneformerConfig(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    max_positions=24,
    hidden_dropout=0.1,
    attention_dropout=0.1,
    vocabulary_multiple=16,
)
ON_FOUR_RANKS = {
    "tp2_pp2": ParallelConfig(tensor=2, pipeline=2),
    "tp2_sp_pp2": ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True, distributed_optimizer=True),
    "tp2_fsdp2": ParallelConfig(tensor=2, fsdp=True),
}
ON_ONE_RANK = {"one": torch.float32, "one_bf16": torch.bfloat16}


def draw_cells() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two micro-batches, one without padding, one with cells of several lengths: tokens and where there is padding."""
    generator = torch.Generator().manual_seed(3)
    cells = []
    for lengths in ((12, 12), (16, 9, 1)):
        S = max(lengths)
        tokens_BS = torch.randint(2, len(VOCABULARY), (len(lengths), S), generator=generator)
        is_padding_BS = torch.arange(S)[None, :] >= torch.tensor(lengths)[:, None]
        cells.append((tokens_BS.masked_fill(is_padding_BS, VOCABULARY.pad_id), is_padding_BS))
    return cells


@torch.no_grad()
def scramble(model: Geneformer) -> None:
    """Add to every parameter a draw that depends on its global name alone: biases and norms must not stay alike."""
    for entry in model.sharded_state_dict(metadata=dict(MODEL_METADATA)).values():
        if not isinstance(entry, ShardedTensor):
            continue
        rows = min(entry.global_shape[0], model.num_tokens) if entry.allow_shape_mismatch else entry.global_shape[0]
        whole = torch.from_numpy(draw_parameter(5, f"{entry.key}.noise.weight", (rows, *entry.global_shape[1:]), 0.2))
        corners = zip(entry.global_offset, entry.local_shape, strict=True)
        cut = whole[tuple(slice(start, start + size) for start, size in corners)]
        entry.data[tuple(slice(size) for size in cut.shape)] += cut.to(entry.data.dtype)


def save(folder: Path, name: str, parallel: ParallelConfig, dtype: torch.dtype, launch: Launch) -> None:
    """Build the model under a layout, write its logits, take a step that moves nothing, and save all."""
    start_model_parallel(parallel, seed=0)
    model = build_geneformer(
        CONFIG, num_tokens=len(VOCABULARY), dtype=dtype, sequence_parallel=parallel.sequence_parallel, seed=1
    )
    scramble(model)
    wrapped, optimizer = wrap_model(
        model,
        OptimizerConfig(),
        dtype=dtype,
        distributed_optimizer=parallel.distributed_optimizer,
        fsdp=parallel.fsdp,
    )
    wrapped.eval()
    write_logits(folder / f"{name}.safetensors", wrapped)
    wrapped.zero_grad_buffer()
    set_learning_rate(optimizer, 0.0, 0.0)
    optimizer.step()
    state = RunState(
        step=STEP,
        seed=1,
        loader={"seed": 1, "epoch": 0, "position": 40},
        distributed_optimizer=parallel.distributed_optimizer,
        dtype=str(dtype).removeprefix("torch."),
    )
    checkpoints = Checkpoints(folder / name / "checkpoints", launch=launch, files=travelling_files(folder))
    checkpoints.save(state, wrapped, optimizer)


def travelling_files(folder: Path) -> dict[str, str]:
    shape = ModelShape(config=CONFIG, num_tokens=len(VOCABULARY), max_length=20)
    split = {"rule": {"by": "donor"}, "train": {"cells": 1234}, "validation": {"cells": 56}}
    files = {"model.json": shape.to_json(), "split.json": json.dumps(split)}
    for name in ("vocabulary.json", "medians.json"):
        files[name] = (folder / name).read_text(encoding="utf-8")
    return files


@torch.no_grad()
def write_logits(path: Path, wrapped: DataParallel) -> None:
    """Run Megatron's schedule forward; one rank of the last stage writes each micro-batch's logits [B x S, V]."""

    def collect(logits_local: torch.Tensor, non_loss_data: bool = False) -> torch.Tensor:
        assert non_loss_data, "there is no loss here"
        whole = tensor_parallel.gather_from_tensor_model_parallel_region(logits_local)
        return whole[:, : len(VOCABULARY)].float()

    def run_next(cells: Iterator[Any], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        return model(*next(cells)), collect

    cells = draw_cells()
    collected = get_forward_backward_func()(
        forward_step_func=run_next,
        data_iterator=iter(cells),
        model=[wrapped],
        num_microbatches=len(cells),
        seq_length=1,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_data_parallel_rank()
    if parallel_state.is_pipeline_last_stage() and ranks == (0, 0):
        save_file({str(place): logits.contiguous() for place, logits in enumerate(collected)}, path)


def run_alone(folder: Path) -> dict[str, str]:
    """What one rank does when the others are gone: save, export, import, export again; what was refused on the way."""
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    launch = read_launch()
    start_process_group(launch, CPU)
    for name, dtype in ON_ONE_RANK.items():
        save(folder, name, ParallelConfig(), dtype, launch)
    (folder / "one" / "metrics.jsonl").write_text(
        json.dumps({"step": STEP, "validation_loss": 4.5, "unigram_loss": 5.25}) + '\n{"step": 8, "vali'
    )
    export, import_ = geneformer_export_hf.main, geneformer_import_hf.main
    for name in (*ON_FOUR_RANKS, *ON_ONE_RANK):
        # From the run's folder, whose newest checkpoint it is.
        export(["--checkpoint", str(folder / name), "--out", str(folder / f"{name}.hf")])
    import_(["--folder", str(folder / "one.hf"), "--out", str(folder / "imported"), "vocabulary_multiple=64"])
    export(["--checkpoint", str(folder / "imported"), "--out", str(folder / "imported.hf")])
    export(["--checkpoint", str(folder / "imported"), "--out", str(folder / "imported_bf16.hf"), "--dtype", "bf16"])
    return {"resume from an import": refuse_to_resume(folder / "imported")}


def refuse_to_resume(checkpoint: Path) -> str:
    model = build_geneformer(CONFIG, num_tokens=len(VOCABULARY), dtype=torch.float32, sequence_parallel=False, seed=0)
    wrapped, optimizer = wrap_model(model, OptimizerConfig(), dtype=torch.float32, distributed_optimizer=False)
    try:
        load_training(checkpoint, wrapped, optimizer)
    except InputError as error:
        return str(error)
    return ""


def main() -> None:
    """Do this rank's part."""
    folder = Path(sys.argv[1])
    launch = read_launch()
    start_process_group(launch, CPU)
    if launch.is_main:
        VOCABULARY.to_json(folder / "vocabulary.json")
        MEDIANS.to_json(folder / "medians.json")
    torch.distributed.barrier()
    write = partial(save, folder, dtype=torch.float32, launch=launch)
    for name, parallel in ON_FOUR_RANKS.items():
        write(name, parallel)
    torch.distributed.barrier()
    refused = run_alone(folder) if launch.is_main else {}
    (folder / f"rank.{launch.rank}.json").write_text(json.dumps({"launch": asdict(launch), "refused": refused}))


if __name__ == "__main__":
    main()
