"""The compiled form of the layers, with the compiler left out: it computes the same, in training alone."""

from dataclasses import replace
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
        model = build_geneformer(
            replace(small, variant=variant),
            num_tokens=101,
            dtype=torch.float64,
            sequence_parallel=False,
            seed=0,
            is_compiled=is_compiled,
        )
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
def test_nothing_of_a_forward_pass_is_kept_where_nothing_is_trained(make_model: Any, make_cells: Any) -> None:
    """Megatron turns gradients on where a branch ends."""
    assert not make_model()(*make_cells(9, 16, 1)).requires_grad
