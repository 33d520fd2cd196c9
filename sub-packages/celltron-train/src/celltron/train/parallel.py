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
    sequence_parallel: bool = False
    """Whether tensor-parallel processes also split the activations between the matrices along the sequence."""
    distributed_optimizer: bool = False
    """Whether data-parallel processes split the optimizer's state between them. It is then saved in float32, so a run
    in fp64 resumes exactly only without it."""

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name} is {getattr(self, name)}, but must be at least 1")
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError(
                "parallel.sequence_parallel is true with parallel.tensor 1; it splits the sequence between "
                "tensor-parallel processes, so raise parallel.tensor or set it to false"
            )

    def data(self, world_size: int) -> int:
        """Data-parallel degree on `world_size` processes.

        Raises:
            InputError: tensor x pipeline does not divide the number of processes.
        """
        model = self.tensor * self.pipeline
        if world_size % model:
            raise InputError(
                f"parallel.tensor {self.tensor} x parallel.pipeline {self.pipeline} = {model} does not divide the "
                f"{world_size} processes of this run; tensor x pipeline x data must equal the number of processes, "
                "so start another number of them (torchrun --nproc-per-node) or change the degrees"
            )
        return world_size // model


def start_model_parallel(config: ParallelConfig, *, seed: int) -> None:
    """Make Megatron's process groups and generators; `torch.distributed` must have been started."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
    )
    seed_step(seed, step=0)


def data_parallel_place() -> tuple[int, int]:
    """This process's rank among those that share its part of the model and differ in their cells, and their number."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
