"""How the processes of a run divide the work: validated here, and nowhere else."""

from dataclasses import dataclass

from megatron.core import parallel_state

from celltron.core import InputError
from celltron.train.randomness import seed_step


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Degrees of parallelism; what is left of the processes is data parallel."""

    tensor: int = 1
    """Processes that share every layer's matrices."""
    pipeline: int = 1
    """Processes that share the stack of layers, one stage each."""
    context: int = 1
    """Processes that share the tokens of every cell, for long cells; attention gathers their keys and values."""
    sequence_parallel: bool = False
    """Whether tensor-parallel processes also split the activations between the matrices along the sequence."""
    fsdp: bool = False
    """Whether data-parallel processes split parameters, gradients and the optimizer's state between them (FSDP2), for
    models whose training one GPU does not hold; each layer's parameters are gathered where it computes. At the start
    every process has all parameters once."""
    distributed_optimizer: bool = False
    """Whether data-parallel processes split the optimizer's state between them. It is then saved in float32, so a run
    in fp64 resumes exactly only without it."""

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name} is {getattr(self, name)}, but must be at least 1")
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError(
                "parallel.sequence_parallel is true with parallel.tensor 1; it splits the sequence between "
                "tensor-parallel processes, so raise parallel.tensor or set it to false"
            )
        if self.fsdp and self.distributed_optimizer:
            raise ValueError(
                "parallel.fsdp and parallel.distributed_optimizer are both true; fsdp splits the optimizer's state "
                "already, so set parallel.distributed_optimizer to false"
            )
        if self.fsdp and self.pipeline > 1:
            raise ValueError(
                f"parallel.fsdp is true with parallel.pipeline {self.pipeline}, which Megatron-core does not do; set "
                "parallel.pipeline to 1, or parallel.fsdp to false"
            )

    def data(self, world_size: int) -> int:
        """Data-parallel degree on `world_size` processes.

        Raises:
            InputError: tensor x pipeline x context does not divide the number of processes.
        """
        replica = self.tensor * self.pipeline * self.context
        if world_size % replica:
            raise InputError(
                f"parallel.tensor {self.tensor} x parallel.pipeline {self.pipeline} x parallel.context {self.context} "
                f"= {replica} does not divide the number of processes, {world_size}; tensor x pipeline x context x "
                "data must equal the number of processes, so start another number of them (torchrun --nproc-per-node) "
                "or change the degrees"
            )
        return world_size // replica


def start_model_parallel(config: ParallelConfig, *, seed: int) -> None:
    """Make Megatron's process groups and generators; `torch.distributed` must have been started."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        context_parallel_size=config.context,
    )
    seed_step(seed, step=0)


def data_parallel_place() -> tuple[int, int]:
    """This process's rank among those that share its part of the model and differ in their cells, and their number."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def context_parallel_place() -> tuple[int, int]:
    """This process's rank among those that share its cells' tokens, in the order of the tokens, and their number."""
    return parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()


def cut_row(num_places: int, rank: int, num_parts: int) -> slice:
    """The places of a row that a context-parallel process holds: parts of like size, one after the other.

    Parts may begin and end within cells. All processes then compute on as many places, whatever the cells' lengths; and
    since attention is not causal, there is no need to deal out places so that each has early and late ones.

    >>> [cut_row(12, rank, 3) for rank in range(3)]
    [slice(0, 4, None), slice(4, 8, None), slice(8, 12, None)]
    """
    assert num_places % num_parts == 0, f"{num_places} places, wanted a multiple of {num_parts}"
    size = num_places // num_parts
    return slice(rank * size, (rank + 1) * size)
