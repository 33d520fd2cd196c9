"""Train a tiny Geneformer under many layouts and write down what every rank holds: run by `ranks.py`.

`train_layouts.py FOLDER LAYOUT ...` writes

    FOLDER/<layout>.<rank>.npz        this rank's parts of the initial weights, and of gradients and parameters after
                                      every step
    FOLDER/<layout>.<rank>.json       where these lie in the whole, and what was drawn
    FOLDER/<layout>/metrics.jsonl     of the training loop
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from late_gather import gathered_late
from megatron.core import parallel_state
from torch.overrides import TorchFunctionMode

from celltron.cells import NO_LABEL, Batch
from celltron.cells.corpus import DataConfig
from celltron.core import Vocabulary
from celltron.models.geneformer import GeneformerConfig
from celltron.recipes.geneformer_pretrain import Config, forward_step
from celltron.recipes.shared.pretrain_batches import make_step_batch
from celltron.recipes.shared.pretrain_model import build_model
from celltron.train.checkpoint import RunState
from celltron.train.engine import EngineConfig
from celltron.train.fully_sharded import FullyShardedModel
from celltron.train.launch import Launch, start_process_group
from celltron.train.loop import Job, StepBatch, fit
from celltron.train.loop_config import LoopConfig
from celltron.train.metrics import MetricsWriter
from celltron.train.optimizer import OptimizerConfig, wrap_model
from celltron.train.parallel import ParallelConfig, start_model_parallel
from celltron.train.parameter_shards import shard_parameters
from celltron.train.precision import DTYPES
from celltron.train.schedule import ScheduleConfig

NUM_STEPS = 6
VALIDATE_EVERY = 3
VOCABULARY = Vocabulary.from_genes([f"ENSG{number:011}" for number in range(98)])
# Two data-parallel ranks get three cells of the second batch, of one cell: one gets none.
NUM_VALIDATION_CELLS = 9


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many ranks, and what differs from the single process's run."""

    world_size: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp64"
    dropout: float = 0.0
    clip_gradient_norm: float = 0.0
    packing: bool = False
    variant: str = "post_norm"
    engine: dict[str, Any] = field(default_factory=dict)
    save_every: int = 1
    is_late: bool = False  # see late_gather.py
    device: str = "cpu"


TP2 = {"tensor": 2}
TP2_SP = {"tensor": 2, "sequence_parallel": True}
PP2 = {"pipeline": 2}
CP2 = {"context": 2}
ZERO = {"distributed_optimizer": True}
FSDP = {"fsdp": True}
WIDE = {"fp32_residual": True}
ON_GPU = {"device": "cuda", "packing": True, "precision": "bf16"}
LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(world_size=2, parallel=TP2),
    "tp2_sp": Layout(world_size=2, parallel=TP2_SP),
    "pp2": Layout(world_size=2, parallel=PP2),
    "dp2": Layout(world_size=2),
    "dp2_zero": Layout(world_size=2, parallel=ZERO),
    "tp2_pp2": Layout(world_size=4, parallel=TP2 | PP2),
    "tp2_sp_pp2": Layout(world_size=4, parallel=TP2_SP | PP2),
    "one_packed": Layout(packing=True),
    "tp2_packed": Layout(world_size=2, parallel=TP2, packing=True),
    "tp2_sp_packed": Layout(world_size=2, parallel=TP2_SP, packing=True),
    "pp2_packed": Layout(world_size=2, parallel=PP2, packing=True),
    "dp2_packed": Layout(world_size=2, packing=True),
    "cp2": Layout(world_size=2, parallel=CP2),
    "cp2_packed": Layout(world_size=2, parallel=CP2, packing=True),
    "tp2_sp_cp2_packed": Layout(world_size=4, parallel=TP2_SP | CP2, packing=True),
    "cp2_zero": Layout(world_size=2, parallel=CP2 | ZERO, packing=True),
    # Of three ranks the first has fewer micro-batches; rows are not divided evenly, and two token types leave one none.
    "fsdp3": Layout(world_size=3, parallel=FSDP),
    "tp2_sp_fsdp2": Layout(world_size=4, parallel=TP2_SP | FSDP, packing=True),
    # Parameters are cut between context-parallel processes too.
    "cp2_fsdp_full": Layout(
        world_size=2, parallel=CP2 | FSDP, packing=True, engine={"recompute": "full", "compile": True}
    ),
    "one_pre_norm": Layout(variant="pre_norm"),
    "tp2_sp_pp2_pre_norm": Layout(world_size=4, parallel=TP2_SP | PP2, packing=True, variant="pre_norm"),
    "cp2_pp2_full_pre_norm": Layout(
        world_size=4, parallel=CP2 | PP2, packing=True, variant="pre_norm", engine={"recompute": "full"}
    ),
    "one_clipped": Layout(clip_gradient_norm=0.1),
    "tp2_pp2_clipped": Layout(world_size=4, parallel=TP2 | PP2, clip_gradient_norm=0.1),
    "dp2_zero_clipped": Layout(world_size=2, parallel=ZERO, clip_gradient_norm=0.1),
    "one_fp32": Layout(precision="fp32", clip_gradient_norm=1.0),
    "tp2_fp32": Layout(world_size=2, parallel=TP2, precision="fp32", clip_gradient_norm=1.0),
    "dp2_zero_bf16": Layout(world_size=2, parallel=ZERO, precision="bf16", clip_gradient_norm=1.0),
    "fsdp2_bf16": Layout(world_size=2, parallel=FSDP, precision="bf16", clip_gradient_norm=1.0),
    "one_bf16": Layout(precision="bf16"),
    "one_wide": Layout(precision="bf16", engine=WIDE),
    "tp2_sp_pp2_wide": Layout(world_size=4, parallel=TP2_SP | PP2, precision="bf16", engine=WIDE),
    "one_dropout": Layout(packing=True, dropout=0.2),
    "one_dropout_selective": Layout(packing=True, dropout=0.2, engine={"recompute": "selective"}),
    "one_dropout_full": Layout(packing=True, dropout=0.2, engine={"recompute": "full"}),
    "tp2_sp_full": Layout(world_size=2, parallel=TP2_SP, engine={"recompute": "full"}),
    "dp2_overlap": Layout(world_size=2, packing=True, engine={"overlap": True}),
    # Saving gathers all parameters, so they are gathered late only where it is rare.
    "dp2_zero_overlap": Layout(world_size=2, parallel=ZERO, packing=True, engine={"overlap": True}, save_every=6),
    "dp2_zero_late": Layout(
        world_size=2, parallel=ZERO, packing=True, engine={"overlap": True, "compile": True}, save_every=6, is_late=True
    ),
    "tp2_dp2_dropout": Layout(world_size=4, parallel=TP2, dropout=0.2),
    "tp2_sp_pp2_dropout": Layout(world_size=4, parallel=TP2_SP | PP2, dropout=0.2),
    # See test_gpu_layers.py.
    "gpu_fp32": Layout(**ON_GPU | {"precision": "fp32"}),
    "gpu_fp32_compiled": Layout(**ON_GPU | {"precision": "fp32"}, engine={"compile": True}),
    "gpu_fp32_pre_norm": Layout(**ON_GPU | {"precision": "fp32"}, variant="pre_norm"),
    "gpu_torch": Layout(**ON_GPU, engine={"layers": "torch"}),
    "gpu_torch_wide": Layout(**ON_GPU, engine={"layers": "torch"} | WIDE),
    "gpu_torch_pre_norm": Layout(**ON_GPU, engine={"layers": "torch"}, variant="pre_norm"),
    "gpu_te": Layout(**ON_GPU, engine={"layers": "te"}),
    "gpu_te_padded": Layout(**ON_GPU | {"packing": False}, engine={"layers": "te"}),
    "gpu_te_wide": Layout(**ON_GPU, engine={"layers": "te"} | WIDE),
    "gpu_te_compiled": Layout(**ON_GPU, engine={"layers": "te", "compile": True}),
    "gpu_te_recomputed": Layout(**ON_GPU, engine={"layers": "te", "recompute": "full"}),
    "gpu_te_pre_norm": Layout(**ON_GPU, engine={"layers": "te"}, variant="pre_norm"),
    "gpu_tensorwise": Layout(**ON_GPU, engine={"fp8": "tensorwise"}),
    "gpu_blockwise": Layout(**ON_GPU, engine={"fp8": "blockwise"}),
    "gpu_te_dropout": Layout(**ON_GPU, engine={"layers": "te"}, dropout=0.2),
    "gpu_compiled_dropout": Layout(**ON_GPU, engine={"layers": "torch", "compile": True}, dropout=0.2),
}


def make_config(layout: Layout) -> Config:
    return Config(
        out="unused",
        device=layout.device,  # type: ignore[arg-type]
        precision=layout.precision,  # type: ignore[arg-type]
        data=DataConfig(paths="unused", max_length=32),
        model=GeneformerConfig(
            variant=layout.variant,  # type: ignore[arg-type]
            num_layers=4,
            hidden_size=32,
            ffn_hidden_size=48,
            num_attention_heads=4,
            max_positions=32,
            hidden_dropout=layout.dropout,
            attention_dropout=layout.dropout,
            vocabulary_multiple=16,
        ),
        parallel=ParallelConfig(**layout.parallel),
        engine=EngineConfig(**layout.engine),
        optimizer=OptimizerConfig(clip_gradient_norm=layout.clip_gradient_norm),
        schedule=ScheduleConfig(learning_rate=1e-2, minimum_learning_rate=1e-3, warmup_steps=2),
        loop=LoopConfig(
            max_steps=NUM_STEPS,
            global_batch_size=8,
            micro_batch_size=2,
            packing=layout.packing,
            seed=1,
            log_every=1,
            validate_every=VALIDATE_EVERY,
            save_every=layout.save_every,
        ),
    )


def make_cells(number: int, num_cells: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and labels of cells: the first is empty, the second has two tokens, and neither has a masked place.

    In the third batch none of the first half of the cells has one: all that the first of two replicas gets.
    """
    generator = np.random.default_rng([20260101, number])
    weights = 1.0 / np.arange(1, len(VOCABULARY.genes) + 1)
    cells = []
    for place in range(num_cells):
        length = place * 2 if place < 2 else int(generator.integers(3, 24))
        tokens = VOCABULARY.first_gene_id + generator.choice(len(weights), size=length, p=weights / weights.sum())
        is_masked = generator.random(length) < 0.3
        is_masked[-1:] = True
        if place < 2 or (number == 3 and place < num_cells // 2):
            is_masked[:] = False
        labels = np.where(is_masked, tokens, NO_LABEL)
        cells.append((np.where(is_masked, VOCABULARY.mask_id, tokens), labels))
    return cells


def batch_of(cells: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
    """This data-parallel rank's part of a global batch, cut as the loader cuts it."""
    rank, world_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    part = cells[len(cells) * rank // world_size : len(cells) * (rank + 1) // world_size]
    empty = np.zeros(0, dtype=np.int32)
    return Batch(
        tokens=np.concatenate([empty, *(tokens for tokens, _ in part)]).astype(np.int32),
        labels=np.concatenate([empty, *(labels for _, labels in part)]).astype(np.int32),
        lengths=np.array([len(tokens) for tokens, _ in part], dtype=np.int32),
        cells=np.arange(len(part), dtype=np.int64),
        epochs=np.zeros(len(part), dtype=np.int64),
    )


class Stream:
    """Training batches 1, 2, ...; remembers what its micro-batches were like."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.number = 0
        self.widths: list[int] = []
        self.num_masked: list[int] = []
        self.num_tokens = 0

    def __next__(self) -> StepBatch:
        self.number += 1
        batch = step_batch(self.config, make_cells(self.number, self.config.loop.global_batch_size))
        self.widths += [micro_batch["tokens_BS"].shape[1] for micro_batch in batch.micro_batches]
        self.num_tokens += batch.num_tokens
        self.num_masked += [len(micro_batch["places_M"]) for micro_batch in batch.micro_batches]
        return batch

    def state(self) -> dict[str, int]:
        return {"number": self.number}

    def cells(self) -> list[int]:
        """Nobody asks."""
        return []


def step_batch(config: Config, cells: list[tuple[np.ndarray, np.ndarray]]) -> StepBatch:
    corpus: Any = SimpleNamespace(tokenizer=SimpleNamespace(vocabulary=VOCABULARY))
    return make_step_batch(config, corpus, batch_of(cells), torch.device(config.device))


def validation_batches(config: Config) -> Iterator[StepBatch]:
    cells = make_cells(0, NUM_VALIDATION_CELLS)
    for start in range(0, len(cells), config.loop.global_batch_size):
        yield step_batch(config, cells[start : start + config.loop.global_batch_size])


class Recorder:
    """Stands where checkpoints are saved, and keeps this rank's parameters and gradients instead."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.parts: dict[str, dict[str, Any]] = {}

    def record(self, step: int, model: Any, *, with_gradients: bool) -> None:
        is_cut = isinstance(model, FullyShardedModel)
        for name, entry in (model.shard_parameters() if is_cut else shard_parameters(model.module)).items():
            self.parts[name] = {
                "key": entry.key,
                "offset": list(entry.global_offset),
                "shape": list(entry.global_shape),
            }
            self.arrays[f"{step} parameter {name}"] = to_array(entry.data)
            if with_gradients:
                gradient = entry.data.grad if is_cut else entry.data.main_grad
                self.arrays[f"{step} gradient {name}"] = to_array(gradient)

    def begin(self, state: RunState, model: Any, optimizer: Any) -> None:
        # The distributed optimizer leaves a rank only its part of the summed gradients.
        self.record(state.step, model, with_gradients=not state.distributed_optimizer)

    def poll(self) -> None:
        """Kept already, as for the two below."""

    wait = close = poll


def to_array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.double() if tensor.dtype is torch.bfloat16 else tensor).numpy().copy()


class DrawnDropout(TorchFunctionMode):
    """Notes the state of the generator before every draw of a dropout mask: equal states draw equal masks."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: list[str] = []
        self.attention: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = dict(kwargs or {})
        if func is torch.nn.functional.dropout and keywords.get("training", True) and keywords["p"] > 0:
            self.hidden.append(digest(torch.default_generator.get_state()))
        if func is torch.nn.functional.scaled_dot_product_attention and keywords.get("dropout_p"):
            self.attention.append(digest(torch.default_generator.get_state()))
        return func(*args, **keywords)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(to_array(tensor).tobytes()).hexdigest()[:16]


def record_hidden_states(model: Any) -> list[tuple[str, str]]:
    """Have the output of the embedding and of every layer noted in the list that is returned."""
    noted: list[tuple[str, str]] = []

    def note(name: str, module: torch.nn.Module, arguments: Any, output: Any) -> None:
        if module.training:
            noted.append((name, digest(output[0] if isinstance(output, tuple) else output)))

    if model.pre_process:
        model.embedding.register_forward_hook(partial(note, "embedding"))
    for layer in model.encoder.layers:
        layer.register_forward_hook(partial(note, f"layer {layer.layer_number}"))
    return noted


def train(layout: Layout, rank: int, folder: Path, name: str) -> None:
    """Train as the recipe does, on this file's cells, and write down what this rank holds."""
    config = make_config(layout)
    dtype = DTYPES[config.precision]
    start_model_parallel(config.parallel, seed=config.loop.seed)
    model = build_model(config, num_tokens=len(VOCABULARY))
    recorder, stream = Recorder(), Stream(config)
    hidden_states = record_hidden_states(model)
    wrapped, optimizer = wrap_model(
        model,
        config.optimizer,
        dtype=dtype,
        distributed_optimizer=config.parallel.distributed_optimizer,
        overlap=config.engine.overlap,
        fsdp=config.parallel.fsdp,
    )
    recorder.record(0, wrapped, with_gradients=False)
    (folder / name).mkdir(exist_ok=True)
    job = Job(
        model=wrapped,
        optimizer=optimizer,
        weight_decay=config.optimizer.weight_decay,
        schedule=config.schedule,
        forward_step=forward_step,
        train=stream,
        validation=partial(validation_batches, config),
        checkpoints=recorder,  # type: ignore[arg-type]
        metrics=MetricsWriter(folder / name, is_main=rank == 0, first_step=1),
    )
    drawn = DrawnDropout()
    # What is compiled cannot be watched.
    with nullcontext() if config.engine.compile else drawn:
        fit(config.loop, job)
    facts = {
        "tensor_rank": parallel_state.get_tensor_model_parallel_rank(),
        "pipeline_rank": parallel_state.get_pipeline_model_parallel_rank(),
        "data_rank": parallel_state.get_data_parallel_rank(),
        "context_rank": parallel_state.get_context_parallel_rank(),
        "widths": stream.widths,
        "num_masked": stream.num_masked,
        "num_tokens": stream.num_tokens,
        "hidden_states": hidden_states,
        "hidden_draws": drawn.hidden,
        "attention_draws": drawn.attention,
        "parts": recorder.parts,
    }
    np.savez(folder / f"{name}.{rank}.npz", **recorder.arrays)
    (folder / f"{name}.{rank}.json").write_text(json.dumps(facts))


def main() -> None:
    """Train every layout, each in a process group of its own over the first ranks."""
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    rank = 0
    if torch.distributed.is_initialized():  # by ranks.py, whose processes are forked, as none with a GPU may be
        rank = torch.distributed.get_rank()
        torch.distributed.destroy_process_group()
    for name in names:
        world_size = LAYOUTS[name].world_size
        if rank >= world_size:
            continue
        device = torch.device("cuda", rank) if LAYOUTS[name].device == "cuda" else torch.device("cpu")
        if device.type == "cpu":
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{folder}/{name}.rendezvous", rank=rank, world_size=world_size
            )
            # Compiling takes longer than training.
            torch.compiler.set_stance("force_eager")
        start_process_group(Launch(rank=rank, world_size=world_size), device)
        with gathered_late() if LAYOUTS[name].is_late else nullcontext():
            train(LAYOUTS[name], rank, folder, name)
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
