import shutil
from typing import Any

import pytest
import torch

from celltron.core import InputError
from celltron.models.layers.rows import CompiledRows, activate, add_branch_and_normalise, branch_end, check_compiler

CPU = torch.device("cpu")


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_a_branch_ends_in_the_residuals_dtype() -> None:
    branch_SBD, bias_D = draw(3, 2, 4, seed=0, dtype=torch.bfloat16), draw(4, seed=1, dtype=torch.bfloat16)
    residual_SBD = 1000.0 + draw(3, 2, 4, seed=2)
    ended = branch_end(is_compiled=False)(True, False)((branch_SBD, bias_D), residual_SBD, 0.0)
    assert torch.equal(ended, residual_SBD + (branch_SBD + bias_D).float())
    norm = torch.nn.LayerNorm(4)
    assert torch.equal(
        branch_end(is_compiled=False)(True, False, norm)((branch_SBD, bias_D), residual_SBD, 0.0), norm(ended)
    )


def test_a_branch_is_dropped_in_training_alone() -> None:
    ones, zeros = torch.ones(50, 1, 40), torch.zeros(50, 1, 40)
    in_training, after = (branch_end(is_compiled=False)(is_training, False) for is_training in (True, False))
    dropped = in_training((ones, zeros[0, 0]), zeros, 0.5)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(after((ones, zeros[0, 0]), zeros, 0.5), ones)


def arguments(num_rows: int) -> tuple[Any, ...]:
    """A branch, its bias, a residual, half of it dropped, and a norm; with gradients, as they have in a layer."""
    branch_TD, residual_TD = (draw(num_rows, 16, seed=seed).requires_grad_() for seed in (0, 1))
    bias_D, weight_D, norm_bias_D = (torch.nn.Parameter(draw(16, seed=seed)) for seed in (2, 3, 4))
    return branch_TD, bias_D, residual_TD, 0.5, (weight_D, norm_bias_D, 1e-12)


def run(function: Any, given: tuple[Any, ...]) -> list[torch.Tensor]:
    """The output and the gradients of branch, bias, residual and norm."""
    output = function(*given)
    weights = draw(*output.shape, seed=5)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), [*given[:3], *given[4][:2]])]


def add_and_normalise_kept(is_kept_TD: torch.Tensor) -> Any:
    """The formula, given what was not dropped."""

    def formula(branch_TD: Any, bias_D: Any, residual_TD: Any, probability: float, norm: Any) -> torch.Tensor:
        weight_D, norm_bias_D, epsilon = norm
        sum_TD = residual_TD + is_kept_TD * (branch_TD + bias_D) / (1 - probability)
        centred_TD = sum_TD - sum_TD.mean(-1, keepdim=True)
        return centred_TD / (centred_TD.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight_D + norm_bias_D

    return formula


@pytest.fixture
def num_compiled() -> Any:
    """How many graphs PyTorch has compiled since the test began."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def test_compiled_rows_depend_on_the_generator_alone(num_compiled: Any) -> None:
    """Not on how many rows the function was called with before: a resumed run has not called it."""
    numbers_of_rows = (40, 24, 7)

    def run_all(function: Any) -> list[list[torch.Tensor]]:
        torch.manual_seed(0)
        return [run(function, arguments(num_rows)) for num_rows in numbers_of_rows]

    function = CompiledRows(add_branch_and_normalise)
    first, again = run_all(function), run_all(function)
    assert num_compiled() == 1
    torch._dynamo.reset()
    fresh = CompiledRows(add_branch_and_normalise)
    run(fresh, arguments(9))
    for ones, others, thirds in zip(first, again, run_all(fresh), strict=True):
        for one, other, third in zip(ones, others, thirds, strict=True):
            assert torch.equal(one, other) and torch.equal(one, third)
    for num_rows, found in zip(numbers_of_rows, first, strict=True):
        is_kept_TD = found[1] != 0  # the branch's gradient
        assert 0.3 < float(is_kept_TD.float().mean()) < 0.7
        for value, expected in zip(found, run(add_and_normalise_kept(is_kept_TD), arguments(num_rows)), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(first[0][1][:24] != 0, first[1][1] != 0)


@torch.no_grad()
def test_compiled_activations_are_those_of_eager_ones(num_compiled: Any) -> None:
    inner_TF, bias_F = draw(5, 6, seed=0), torch.nn.Parameter(draw(6, seed=1))
    found = CompiledRows(activate)(inner_TF, bias_F, torch.nn.functional.relu)
    assert torch.equal(found, torch.relu(inner_TF + bias_F))


def test_a_compiler_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    check_compiler(CPU)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"engine\.compile is true, but there is no C\+\+ compiler"):
        check_compiler(CPU)
