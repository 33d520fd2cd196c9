"""The optimizer against `torch.optim.AdamW`. Axes: M places, D width of the input."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core import optimizer as megatron_optimizer

from celltron.train.optimizer import OptimizerConfig, set_learning_rate, wrap_model

NUM_STEPS = 4
RATE, DECAY = 0.1, 0.3
# epsilon 1 makes an Adam step depend on the length of the gradient, as clipping does.
ADAM: dict[str, Any] = {"weight_decay": DECAY, "beta1": 0.8, "beta2": 0.9, "epsilon": 1.0}


def give_gradients(wrapped: Any, step: int, scale: float) -> dict[str, torch.Tensor]:
    """Put invented gradients where Megatron's backward leaves them."""
    generator = torch.Generator().manual_seed(step)
    gradients = {}
    for name, parameter in wrapped.module.named_parameters():
        gradients[name] = scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.main_grad.copy_(gradients[name])
    return gradients


def run_ours(model: Any, config: OptimizerConfig, *, scale: float = 1.0, is_distributed: bool = False) -> list[float]:
    """Take the steps; the gradient norms."""
    dtype = model.config.params_dtype
    wrapped, optimizer = wrap_model(model, config, dtype=dtype, distributed_optimizer=is_distributed)
    norms = []
    for step in range(NUM_STEPS):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        give_gradients(wrapped, step, scale)
        set_learning_rate(optimizer, RATE * (step + 1), config.weight_decay)
        norms.append(float(optimizer.step()[1]))
    return norms


def run_reference(model: Any, *, scale: float = 1.0, clip: float | None = None) -> None:
    """The same steps by PyTorch, on the same invented gradients; matrices alone are decayed."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(ADAM["beta1"], ADAM["beta2"]), eps=ADAM["epsilon"])
    for step in range(NUM_STEPS):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for group in optimizer.param_groups:
            group["lr"] = RATE * (step + 1)
        optimizer.step()


def difference(left: torch.nn.Module, right: torch.nn.Module) -> float:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return max(float((one - other).detach().abs().max()) for one, other in pairs)


@pytest.mark.parametrize("is_distributed", [False, True])
def test_it_is_adamw_and_decays_matrices_alone(make_model: Callable[..., Any], is_distributed: bool) -> None:
    ours, reference = make_model(), make_model()
    run_ours(ours, OptimizerConfig(**ADAM, clip_gradient_norm=0.0), is_distributed=is_distributed)
    run_reference(reference)
    assert difference(ours, make_model()) > 0.1
    # The same formula in another order of operations.
    assert difference(ours, reference) < 1e-13


@pytest.mark.parametrize("is_distributed", [False, True])
def test_a_limit_of_zero_never_scales_and_still_measures(make_model: Callable[..., Any], is_distributed: bool) -> None:
    ours, reference = make_model(), make_model()
    norms = run_ours(
        ours, OptimizerConfig(**ADAM, clip_gradient_norm=0.0), scale=1e6, is_distributed=is_distributed
    )
    run_reference(reference, scale=1e6)
    assert difference(ours, reference) < 1e-13
    assert min(norms) > 1e6


@pytest.mark.parametrize("is_distributed", [False, True])
def test_longer_gradients_are_scaled_down(make_model: Callable[..., Any], is_distributed: bool) -> None:
    ours, reference, unclipped = make_model(), make_model(), make_model()
    norms = run_ours(ours, OptimizerConfig(**ADAM, clip_gradient_norm=0.5), is_distributed=is_distributed)
    run_reference(reference, clip=0.5)
    run_reference(unclipped)
    assert min(norms) > 0.5
    assert difference(unclipped, reference) > 1e-2
    # Megatron's norm is a float32, and 1e-6 is added to it.
    assert difference(ours, reference) < 1e-6


def test_shorter_gradients_are_left_alone(make_model: Callable[..., Any]) -> None:
    ours, reference = make_model(), make_model()
    norms = run_ours(ours, OptimizerConfig(**ADAM, clip_gradient_norm=10.0))
    run_reference(reference)
    assert max(norms) < 10.0
    assert difference(ours, reference) < 1e-13


def test_it_is_pytorchs_adamw_whatever_else_is_installed(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformer Engine's and Apex's keep the count of steps elsewhere than checkpoints have it."""
    monkeypatch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False)
    config = OptimizerConfig()
    _, optimizer = wrap_model(make_model(), config, dtype=torch.float64, distributed_optimizer=False)
    (part,) = optimizer.chained_optimizers
    assert type(part.optimizer) is torch.optim.AdamW
    assert not megatron_optimizer.USING_PYTORCH_OPTIMIZER


def test_the_learning_rate_reaches_every_group(make_model: Callable[..., Any]) -> None:
    _, optimizer = wrap_model(
        make_model(), OptimizerConfig(weight_decay=0.5), dtype=torch.float64, distributed_optimizer=False
    )
    set_learning_rate(optimizer, 0.25, 0.5)
    groups = optimizer.param_groups
    num_dims = [{parameter.dim() for parameter in group["params"]} for group in groups]
    assert sorted(map(tuple, num_dims)) == [(1,), (2,)]
    assert [group["lr"] for group in groups] == [0.25, 0.25]
    assert [group["weight_decay"] for group in groups] == [0.5 if dims == {2} else 0.0 for dims in num_dims]
    set_learning_rate(optimizer, 0.125, 0.0)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.125, 0.0)] * 2


@pytest.mark.parametrize("is_distributed", [False, True])
def test_bfloat16_parameters_are_updated_through_float32_copies(
    make_model: Callable[..., Any], is_distributed: bool
) -> None:
    model = make_model(dtype=torch.bfloat16)
    wrapped, optimizer = wrap_model(
        model, OptimizerConfig(weight_decay=0.0), dtype=torch.bfloat16, distributed_optimizer=is_distributed
    )
    weight = model.norm.weight
    assert weight.main_grad.dtype is torch.float32
    for _ in range(100):
        # Steps of 1e-3 from 1 are lost in bfloat16, whose next number below 1 is 0.996.
        wrapped.zero_grad_buffer()
        weight.main_grad.fill_(1.0)
        set_learning_rate(optimizer, 1e-3, 0.0)
        optimizer.step()
    assert weight.dtype is torch.bfloat16
    assert weight.tolist() == pytest.approx([0.9] * 4, abs=4e-3)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"beta1": 1.0}, "optimizer.beta1 is 1.0"),
        ({"beta2": -0.1}, "optimizer.beta2 is -0.1"),
        ({"weight_decay": -1.0}, "optimizer.weight_decay is -1.0"),
        ({"clip_gradient_norm": -1.0}, "optimizer.clip_gradient_norm is -1.0"),
        ({"epsilon": 0.0}, "optimizer.epsilon is 0.0"),
    ],
)
def test_impossible_settings_are_named(values: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        OptimizerConfig(**values)
