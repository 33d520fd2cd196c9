"""Reading back Megatron's distributed optimizer over PyTorch's own AdamW, as it is without Transformer Engine and Apex.

megatron-core 0.16 writes it, but stumbles over AdamW's count of steps when it reads it: it asks a new optimizer for the
count, which it has not got yet; it wants one count a parameter among the tensors of the file, which are without; and it
gives all parameters one count, which every parameter's step then raises. Over a fused Adam nothing is changed here.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer


def allocate_moments(optimizer: MegatronOptimizer) -> None:
    """Have a new optimizer make its moments and counts, by a step of zero gradients at learning rate 0."""
    for part in _parts(optimizer):
        assert all(group["lr"] == 0.0 for group in part.param_groups), [group["lr"] for group in part.param_groups]
        part._init_optimizer_states_with_dummy_values()


def load_distributed_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Load what the optimizer's `sharded_state_dict` was filled with."""
    for part in _parts(optimizer):
        part._set_main_param_and_optimizer_states = partial(_set_with_step, part)
    optimizer.load_state_dict(state)
    for part in _parts(optimizer):
        del part._set_main_param_and_optimizer_states
        for moments in part.optimizer.state.values():
            if "step" in moments:
                moments["step"] = moments["step"].clone()


def _set_with_step(part: Any, parameter: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
    """Megatron's own method, given the count that the parameter has already."""
    group, place = part.model_param_group_index_map[parameter]
    moments = part.optimizer.state[part.optimizer.param_groups[group]["params"][place]]
    kept = {"step": moments["step"]} if "step" in moments else {}
    type(part)._set_main_param_and_optimizer_states(part, parameter, tensors | kept)


def _parts(optimizer: MegatronOptimizer) -> Iterator[Any]:
    yield from getattr(optimizer, "chained_optimizers", [optimizer])
