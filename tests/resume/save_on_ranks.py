"""Saves beside the training on two data-parallel ranks: `save_on_ranks.py FOLDER`, started by ranks.py.

Each check has a name, which every rank prints once it holds there.
"""

import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from celltron.core import InputError
from celltron.models.geneformer import GeneformerConfig, build_geneformer
from celltron.train import async_save, checkpoint
from celltron.train.checkpoint import Checkpoints, load_training
from celltron.train.checkpoint_folder import RunState, verify_checkpoint
from celltron.train.fully_sharded import FullyShardedModel
from celltron.train.launch import Launch, read_launch, start_process_group
from celltron.train.optimizer import OptimizerConfig, set_learning_rate, wrap_model
from celltron.train.parallel import ParallelConfig, start_model_parallel
from celltron.train.precision import name_dtype

SHAPE = GeneformerConfig(
    num_layers=1, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2, max_positions=8, vocabulary_multiple=8
)


class Run:
    """A model in training, on gradients that both ranks invent alike."""

    def __init__(
        self, *, is_distributed: bool = False, fsdp: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> None:
        self.is_distributed = is_distributed
        self.dtype = dtype
        model = build_geneformer(SHAPE, num_tokens=20, dtype=dtype, sequence_parallel=False, seed=seed)
        # Parts of the gradient would be scaled by a norm that is summed in another order.
        config = OptimizerConfig(clip_gradient_norm=0.0)
        self.model, self.optimizer = wrap_model(
            model, config, dtype=dtype, distributed_optimizer=is_distributed, fsdp=fsdp
        )

    def take_step(self, step: int) -> None:
        self.model.zero_grad_buffer()
        generator = torch.Generator().manual_seed(step)
        for parameter in self.model.module.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                parameter.grad = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            else:
                parameter.main_grad.copy_(gradient)
        if isinstance(self.model, FullyShardedModel):
            self.model.finish_grad_sync()
        set_learning_rate(self.optimizer, 0.1, 0.01)
        self.optimizer.step()

    def state(self, step: int) -> RunState:
        dtype = name_dtype(self.dtype)
        return RunState(step=step, seed=0, loader={}, distributed_optimizer=self.is_distributed, dtype=dtype)

    def begin(self, checkpoints: Checkpoints, step: int) -> None:
        assert checkpoints.begin(self.state(step), self.model, self.optimizer) is None

    def parameters(self) -> list[torch.Tensor]:
        """The whole ones, as the model computes with them."""
        wholes = [
            parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            for parameter in self.model.module.parameters()
        ]
        return [whole.detach().to(self.dtype, copy=True) for whole in wholes]


def poll_until_complete(checkpoints: Checkpoints) -> Path:
    while True:
        path = checkpoints.poll()
        if path is not None:
            return path
        time.sleep(0.01)


def call_slowly(function: Callable[..., Any], *, seconds: float) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        time.sleep(seconds)
        return function(*arguments)

    return call


def fail_with_full_disk(*unused: Any, **unused_keywords: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def check_training_goes_on(folder: Path, launch: Launch, *, is_distributed: bool) -> None:
    """One rank is slow; a save of later steps has the plan of the first."""
    checkpoints = Checkpoints(folder, launch=launch)
    run = Run(is_distributed=is_distributed)
    write_item = async_save._write_item
    if launch.rank == 1:
        async_save._write_item = call_slowly(write_item, seconds=0.002)
    for step in (1, 2):
        run.take_step(step)
        expected = run.parameters()
        run.begin(checkpoints, step)
        run.take_step(3)
        assert poll_until_complete(checkpoints) == checkpoints.path(step)
        other = Run(is_distributed=is_distributed, seed=1)
        load_training(checkpoints.path(step), other.model, other.optimizer)
        assert all(map(torch.equal, other.parameters(), expected))
        other.take_step(3)
        assert all(map(torch.equal, other.parameters(), run.parameters()))
    async_save._write_item = write_item
    if launch.is_main:
        verify_checkpoint(checkpoints.path(2))
        # The replicas share the work.
        sizes = [os.path.getsize(path) for path in sorted(checkpoints.path(2).glob("state/*.distcp"))]
        assert len(sizes) == 2 and max(sizes) < 2 * min(sizes), sizes
        assert sorted(os.listdir(folder)) == ["latest", "step_00000001", "step_00000002"]


def check_kinds(folder: Path, launch: Launch, *, dtype: torch.dtype) -> None:
    """What one kind of data parallelism saves goes on under another, with the same bits."""
    fsdp, replicated, distributed = {"fsdp": True}, {"fsdp": False}, {"is_distributed": True}
    pairs = {
        torch.float32: [(fsdp, distributed), (replicated, fsdp)],
        torch.bfloat16: [(fsdp, fsdp), (fsdp, replicated), (distributed, fsdp)],
    }
    for number, (saved, loaded) in enumerate(pairs[dtype]):
        run, other = Run(**saved, dtype=dtype), Run(**loaded, dtype=dtype, seed=1)
        checkpoints = Checkpoints(folder / str(number), launch=launch)
        run.take_step(1)
        load_training(checkpoints.save(run.state(1), run.model, run.optimizer), other.model, other.optimizer)
        assert all(map(torch.equal, other.parameters(), run.parameters())), (saved, loaded)
        for step in (2, 3):
            run.take_step(step)
            other.take_step(step)
        assert all(map(torch.equal, other.parameters(), run.parameters())), (saved, loaded)


def check_full_disk(folder: Path, launch: Launch, *, where: int, finishing: bool) -> None:
    """Both ranks hear of it at the same poll, and the next save is whole."""
    checkpoints = Checkpoints(folder, launch=launch)
    run = Run(is_distributed=False)
    run.take_step(1)
    owner, name = (checkpoint, "finish_artefact") if finishing else (async_save, "_write_item")
    function = getattr(owner, name)
    if launch.rank == where:
        setattr(owner, name, fail_with_full_disk)
    run.begin(checkpoints, 1)
    try:
        poll_until_complete(checkpoints)
    except OSError as error:
        assert launch.rank in (0, where) and error.errno == errno.ENOSPC, error
        assert ("(on process 1)" in str(error)) == (where != launch.rank), error
    except InputError as error:
        assert launch.rank not in (0, where) and "another process" in str(error), error
    setattr(owner, name, function)
    torch.distributed.barrier()
    assert os.listdir(folder) == [], os.listdir(folder)
    run.begin(checkpoints, 1)
    assert checkpoints.wait() == checkpoints.path(1)


def say(name: str, launch: Launch) -> None:
    """Print a line in one piece, since ranks share the pipe."""
    sys.stdout.write(f"{name}: {launch.rank}\n")
    sys.stdout.flush()


def main() -> None:
    """Run the checks one after the other."""
    folder, launch = Path(sys.argv[1]), read_launch()
    start_process_group(launch, torch.device("cpu"))
    start_model_parallel(ParallelConfig(), seed=0)
    for is_distributed in (False, True):
        name = "distributed" if is_distributed else "replicated"
        check_training_goes_on(folder / name, launch, is_distributed=is_distributed)
        say(name, launch)
    for dtype in (torch.float32, torch.bfloat16):
        name = f"kinds in {name_dtype(dtype)}"
        check_kinds(folder / name, launch, dtype=dtype)
        say(name, launch)
    for where, finishing in ((0, False), (1, False), (0, True)):
        name = f"full disk on {where}{' at the end' if finishing else ''}"
        check_full_disk(folder / name, launch, where=where, finishing=finishing)
        say(name, launch)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
