"""Measure what steps of a small Geneformer cost under several layouts: run by `ranks.py` on two ranks.

`measure_layouts.py FOLDER` writes FOLDER/<layout>.<rank>.json: bytes of parameters, gradients and optimizer state, the
most that autograd kept and that FSDP had whole at once, and what a step communicated. The one-process layout is the
first rank's alone.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing.reductions import StorageWeakRef

from celltron.cells import NO_LABEL, Batch
from celltron.cells.corpus import DataConfig
from celltron.models.geneformer import GeneformerConfig, build_geneformer
from celltron.recipes.geneformer_pretrain import Config, forward_step
from celltron.recipes.shared.pretrain_batches import make_step_batch
from celltron.train.count_bytes import CountBytes
from celltron.train.engine import EngineConfig, Recompute, recompute_settings
from celltron.train.launch import read_launch, start_process_group
from celltron.train.loop_config import LoopConfig
from celltron.train.optimizer import OptimizerConfig, set_learning_rate, wrap_model
from celltron.train.parallel import ParallelConfig, start_model_parallel
from celltron.train.precision import DTYPES, Precision

NUM_TOKENS, PAD_ID = 1000, 0
PREDICTED_EVERY = 7
MODEL = GeneformerConfig(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    max_positions=64,
    hidden_dropout=0.1,
    attention_dropout=0.0,  # with it a CPU has no fused attention, and keeps the scores
    vocabulary_multiple=16,
)
LENGTHS = np.random.default_rng(4).integers(10, 33, size=24) * 2  # even: no pack is padded, to be cut in two
MICRO_BATCH_SIZE = 4
TP2_SP = ParallelConfig(tensor=2, sequence_parallel=True)
ON_TWO_RANKS: dict[str, tuple[ParallelConfig, Precision, Recompute]] = {
    "tp2": (ParallelConfig(tensor=2), "fp32", "none"),
    "tp2_full": (ParallelConfig(tensor=2), "fp32", "full"),
    "tp2_sp": (TP2_SP, "fp32", "none"),
    "tp2_sp_full": (TP2_SP, "fp32", "full"),
    "pp2": (ParallelConfig(pipeline=2), "fp32", "none"),
    "cp2": (ParallelConfig(context=2), "fp32", "none"),
    "cp2_zero_selective": (ParallelConfig(context=2, distributed_optimizer=True), "fp32", "selective"),
    "dp2": (ParallelConfig(), "fp32", "none"),
    "dp2_zero": (ParallelConfig(distributed_optimizer=True), "fp32", "selective"),
    "dp2_bf16": (ParallelConfig(), "bf16", "none"),
    "dp2_zero_bf16": (ParallelConfig(distributed_optimizer=True), "bf16", "none"),
    "pp2_pre_norm": (ParallelConfig(pipeline=2), "fp32", "none"),
    "tp2_sp_pre_norm": (TP2_SP, "fp32", "none"),
    "fsdp2": (ParallelConfig(fsdp=True), "fp32", "none"),
    "fsdp2_bf16": (ParallelConfig(fsdp=True), "bf16", "none"),
    "cp2_fsdp_full": (ParallelConfig(context=2, fsdp=True), "fp32", "full"),
}
ALONE: dict[str, tuple[ParallelConfig, Precision, Recompute]] = {"one": (ParallelConfig(), "fp32", "none")}


def model_of(name: str) -> GeneformerConfig:
    """The model of a layout."""
    return replace(MODEL, variant="pre_norm") if name.endswith("pre_norm") else MODEL


class Kept:
    """Bytes that autograd keeps for backward passes, each storage once, now and at most; parameters not counted."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self.parameters = {storage_of(parameter) for parameter in parameters}
        self.holders: dict[int, int] = {}
        self.now = self.most = 0

    def pack(self, tensor: torch.Tensor) -> "Held":
        return Held(self, tensor)


class Held:
    """A tensor that is kept; autograd lets go of it after the backward pass."""

    def __init__(self, kept: Kept, tensor: torch.Tensor) -> None:
        self.kept, self.tensor = kept, tensor
        self.place, self.num_bytes = storage_of(tensor), tensor.untyped_storage().nbytes()
        if self.place not in kept.parameters:
            if not kept.holders.get(self.place):
                kept.now += self.num_bytes
                kept.most = max(kept.most, kept.now)
            kept.holders[self.place] = kept.holders.get(self.place, 0) + 1

    def __del__(self) -> None:
        if self.place not in self.kept.parameters:
            self.kept.holders[self.place] -= 1
            if not self.kept.holders[self.place]:
                self.kept.now -= self.num_bytes


def storage_of(tensor: torch.Tensor) -> int:
    """Names the storage, also while it has no memory."""
    name: int = tensor.untyped_storage()._cdata
    return name


class CountWhole(CountBytes):
    """Counts beside them the most bytes that FSDP has whole at once: parameters, their gradients, buffers of both.

    The head's gradient of the tied weight is no parameter's yet: autograd keeps it for the sum with the embedding's.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.parameters, self.most = parameters, 0
        self.tied_shape = max((parameter.shape for parameter in parameters), key=torch.Size.numel)
        self.others: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        place = {"_allgather_base_": 0, "_reduce_scatter_base_": 1}.get(func.overloadpacket.__name__)
        other = result if place is None else args[place]
        if place is not None or (isinstance(other, torch.Tensor) and other.shape == self.tied_shape):
            storage = other.untyped_storage()
            self.others[storage_of(other)] = StorageWeakRef(storage), storage.nbytes()
        if func.overloadpacket.__name__ == "_record_function_enter_new":  # FSDP tells profilers what it begins
            self.most = max(self.most, self.now())
        return result

    def now(self) -> int:
        sizes = {name: size for name, (storage, size) in self.others.items() if not storage.expired()}
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        sizes |= {storage_of(tensor): tensor.untyped_storage().nbytes() for tensor in (*self.parameters, *gradients)}
        return sum(sizes.values())


def whole_parameters(model: torch.nn.Module) -> list[torch.Tensor]:
    """As the model computes with them; FSDP gathers them into the same storages every time."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
    parameters: list[torch.Tensor] = list(model.parameters())
    for unit in units:
        unit.reshard()
    return parameters


def draw_batch() -> Batch:
    """The cells of one replica, every seventh place of them predicted."""
    tokens = np.random.default_rng(5).integers(2, NUM_TOKENS, size=LENGTHS.sum()).astype(np.int32)
    labels = np.where(np.arange(len(tokens)) % PREDICTED_EVERY == 0, tokens, NO_LABEL).astype(np.int32)
    cells = np.arange(len(LENGTHS))
    return Batch(tokens=tokens, labels=labels, lengths=LENGTHS, cells=cells, epochs=np.zeros_like(cells))


def num_bytes(tensors: Any, *, besides: frozenset[int] = frozenset()) -> int:
    """Of the storages of tensors, each once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for place, size in storages.items() if place not in besides)


def optimizer_tensors(optimizer: Any) -> list[torch.Tensor]:
    """Moments and the parameters that the optimizer updates."""
    tensors = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                tensors += [parameter, *(value for name, value in state.items() if name != "step")]
    return tensors


def measure(folder: Path, name: str, parallel: ParallelConfig, precision: Precision, recompute: Recompute) -> None:
    """Take two steps; the second, when all buffers are there, is measured."""
    start_model_parallel(parallel, seed=0)
    config = Config(
        out="unused",
        data=DataConfig(paths="unused", max_length=64),
        model=model_of(name),
        parallel=parallel,
        precision=precision,
        engine=EngineConfig(recompute=recompute),
        loop=LoopConfig(global_batch_size=48, micro_batch_size=MICRO_BATCH_SIZE),
    )
    dtype = DTYPES[precision]
    model = build_geneformer(
        config.model,
        num_tokens=NUM_TOKENS,
        dtype=dtype,
        sequence_parallel=parallel.sequence_parallel,
        seed=0,
        **recompute_settings(recompute),
    )
    wrapped, optimizer = wrap_model(
        model,
        OptimizerConfig(),
        dtype=dtype,
        distributed_optimizer=parallel.distributed_optimizer,
        fsdp=parallel.fsdp,
    )
    corpus: Any = SimpleNamespace(tokenizer=SimpleNamespace(vocabulary=SimpleNamespace(pad_id=PAD_ID)))
    take_step = partial(step, config, corpus, wrapped, optimizer)
    parameters = whole_parameters(model)
    kept, counter = Kept(parameters), CountWhole(parameters) if parallel.fsdp else CountBytes()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda held: held.tensor):
        take_step()
    with counter:
        take_step()
    parts = list(wrapped.parameters())
    places = [part.untyped_storage().data_ptr() for part in parts]
    gradients = [part.grad for part in parts] if parallel.fsdp else [buffer.grad_data for buffer in wrapped.buffers]
    others = frozenset([*places, *(tensor.untyped_storage().data_ptr() for tensor in gradients)])
    facts = {
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "parameters": num_bytes(parts),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "gradients": num_bytes(gradients),
        "optimizer": num_bytes(optimizer_tensors(optimizer), besides=others),
        "kept": kept.most,
        "kept_at_the_end": kept.now,
        "whole": getattr(counter, "most", 0),
        "traffic": [[kind, group, part.calls, part.sent_bytes] for (kind, group), part in counter.traffic.items()],
    }
    (folder / f"{name}.{torch.distributed.get_rank()}.json").write_text(json.dumps(facts))


def step(config: Config, corpus: Any, wrapped: Any, optimizer: Any) -> None:
    """A training step as the loop takes it."""
    batch = make_step_batch(config, corpus, draw_batch(), torch.device("cpu"))
    wrapped.train()
    wrapped.zero_grad_buffer()
    optimizer.zero_grad()

    def run_next(micro_batches: Any, model: Any) -> Any:
        output, loss_function = forward_step(next(micro_batches), model)
        return output, lambda output: (*loss_function(output), {})

    get_forward_backward_func()(
        forward_step_func=run_next,
        data_iterator=iter(batch.micro_batches),
        model=[wrapped],
        num_microbatches=len(batch.micro_batches),
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )
    set_learning_rate(optimizer, 1e-3, 0.0)
    optimizer.step()


def main() -> None:
    """Every layout on both ranks, then the first rank alone."""
    folder, launch = Path(sys.argv[1]), read_launch()
    start_process_group(launch, torch.device("cpu"))
    for name, job in ON_TWO_RANKS.items():
        measure(folder, name, *job)
    torch.distributed.barrier()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    if launch.is_main:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            del os.environ[name]
        start_process_group(read_launch(), torch.device("cpu"))
        for name, job in ALONE.items():
            measure(folder, name, *job)


if __name__ == "__main__":
    main()
