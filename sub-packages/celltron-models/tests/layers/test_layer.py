"""The compiled form of the layers, with the compiler left out: it computes the same, in training alone."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from celltron.models.geneformer import build_geneformer
from celltron.models.layers import layer, rows

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the functions that were asked for compiled."""
    names: list[str] = []

    def leave(function: Any) -> Any:
        names.append(function.__name__)
        return function

    for module in (layer, rows):
        monkeypatch.setattr(module, "compiled", leave)
    return names


def build(small: Any, variant: str, *, is_compiled: bool) -> Any:
    return build_geneformer(
        replace(small, variant=variant),
        num_tokens=101,
        dtype=torch.float64,
        sequence_parallel=False,
        seed=0,
        is_compiled=is_compiled,
    )


@pytest.mark.parametrize(
    ("variant", "functions"),
    [
        ("post_norm", ["add_branch_and_normalise", "activate", "add_branch_and_normalise"]),
        ("pre_norm", ["add_branch", "activate", "add_branch"]),
    ],
)
def test_compiled_layers_compute_the_same(
    small: Any, make_cells: Any, called: list[str], variant: str, functions: list[str]
) -> None:
    tokens_BS, is_padding_BS = make_cells(9, 16, 1)
    outputs, gradients = [], []
    for is_compiled in (False, True):
        model = build(small, variant, is_compiled=is_compiled)
        output = model.train()(tokens_BS, is_padding_BS)
        output.square().mean().backward()
        outputs.append(output)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert called == 3 * functions
    assert torch.equal(*outputs)
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    called.clear()
    assert torch.equal(model.eval()(tokens_BS, is_padding_BS), outputs[0])
    assert not called


@torch.no_grad()
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("variant", ["post_norm", "pre_norm"])
def test_parameters_need_not_be_there_before_their_module_is_called(
    small: Any, make_cells: Any, called: list[str], variant: str, is_compiled: bool
) -> None:
    """Megatron gathers them while computing goes on, and waits for a module's own where it is called."""
    model = build(small, variant, is_compiled=is_compiled)
    cells = make_cells(9, 16, 1)
    expected = model.train()(*cells)
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        module.register_forward_pre_hook(partial(arrive, own, [parameter.clone() for parameter in own]))
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    assert torch.equal(model(*cells), expected)
    assert bool(called) is is_compiled


def arrive(parameters: list[torch.Tensor], values: list[torch.Tensor], *unused: Any) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


@torch.no_grad()
def test_nothing_of_a_forward_pass_is_kept_where_nothing_is_trained(make_model: Any, make_cells: Any) -> None:
    """Megatron turns gradients on where a branch ends."""
    assert not make_model()(*make_cells(9, 16, 1)).requires_grad
