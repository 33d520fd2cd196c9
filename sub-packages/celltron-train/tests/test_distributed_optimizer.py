from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from celltron.train.distributed_optimizer import allocate_moments, load_distributed_optimizer
from celltron.train.optimizer import OptimizerConfig, set_learning_rate, wrap_model

METADATA = {"non_homogeneous_layers": True, "distrib_optim_sharding_type": "fully_reshardable"}


@pytest.fixture
def wrapped_and_optimizer(make_model: Callable[..., Any]) -> tuple[Any, Any]:
    return wrap_model(make_model(), OptimizerConfig(), dtype=torch.float64, distributed_optimizer=True)


def moments_of(optimizer: Any) -> Iterator[dict[str, torch.Tensor]]:
    for part in optimizer.chained_optimizers:
        yield from part.optimizer.state.values()


def test_moments_are_made_without_moving_anything(wrapped_and_optimizer: tuple[Any, Any]) -> None:
    wrapped, optimizer = wrapped_and_optimizer
    before = [parameter.detach().clone() for parameter in wrapped.parameters()]
    assert list(moments_of(optimizer)) == []
    allocate_moments(optimizer)
    moments = list(moments_of(optimizer))
    assert len(moments) == len(before) == 4
    for entry in moments:
        assert not entry["exp_avg"].any() and not entry["exp_avg_sq"].any()
    for old, parameter in zip(before, wrapped.parameters(), strict=True):
        assert torch.equal(old, parameter)


def test_only_a_new_optimizer_is_given_moments(wrapped_and_optimizer: tuple[Any, Any]) -> None:
    _, optimizer = wrapped_and_optimizer
    set_learning_rate(optimizer, 0.1, 0.0)
    with pytest.raises(AssertionError, match="0.1"):
        allocate_moments(optimizer)


def test_every_parameter_counts_its_own_steps_after_loading(wrapped_and_optimizer: tuple[Any, Any]) -> None:
    wrapped, optimizer = wrapped_and_optimizer
    allocate_moments(optimizer)
    model_state = wrapped.module.sharded_state_dict(metadata=dict(METADATA))
    state = optimizer.sharded_state_dict(model_state, is_loading=True, metadata=dict(METADATA))
    load_distributed_optimizer(optimizer, unwrap(state))
    counts = [float(entry["step"]) for entry in moments_of(optimizer)]
    assert len(set(counts)) == 1
    wrapped.zero_grad_buffer()
    set_learning_rate(optimizer, 0.1, 0.0)
    optimizer.step()
    assert [float(entry["step"]) for entry in moments_of(optimizer)] == [counts[0] + 1] * 4


def unwrap(state: Any) -> Any:
    """A sharded state dict as one that was loaded: every sharded tensor its data."""
    if isinstance(state, dict):
        return {key: unwrap(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [unwrap(value) for value in state]
    return getattr(state, "data", state) if not isinstance(state, torch.Tensor) else state
