"""Dropout's generators, set anew at every step from (seed, step) and the process's place.

Nothing of their state is carried from step to step: a resumed run needs no saved generator to drop what the
uninterrupted run drops, and a validation between two steps moves nothing.
"""

import hashlib

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed


def seed_step(seed: int, step: int) -> None:
    """Set the generators for one training step.

    Tensor-parallel processes get the same default generator (they must drop the same hidden values) and different
    model-parallel ones (they hold different heads); pipeline stages, data-parallel replicas and context-parallel
    processes differ in both.

    Args:
        seed: The run's seed.
        step: The step about to be taken.
    """
    data_rank = parallel_state.get_data_parallel_rank()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    context_rank = parallel_state.get_context_parallel_rank()
    place = f"{data_rank} {stage}" + (f" {context_rank}" if context_rank else "")
    digest = hashlib.sha256(f"dropout {seed} {step} {place}".encode()).digest()
    # Megatron adds small offsets to the seed for each tensor-parallel rank; 2^48 leaves them room.
    step_seed = int.from_bytes(digest[:6], "little")
    torch.default_generator.manual_seed(step_seed)
    model_parallel_cuda_manual_seed(step_seed)
