from types import SimpleNamespace

import pytest
import torch

from celltron.models.layers.norm import LayerNorm, RoundedLayerNorm, Rounding

pytestmark = pytest.mark.usefixtures("one_process")


def make_norm(*, sequence_parallel: bool = False, dtype: torch.dtype = torch.float64, **keywords: object) -> LayerNorm:
    config = SimpleNamespace(params_dtype=dtype, sequence_parallel=sequence_parallel)
    return LayerNorm(config, 6, **keywords)


def test_values_are_the_formula(layer_norm) -> None:
    norm = make_norm(eps=0.1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(6, generator=generator, dtype=torch.float64))
    values = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    expected = layer_norm(values, norm.weight, norm.bias, 0.1)
    torch.testing.assert_close(norm(values), expected, rtol=0, atol=1e-14)


def test_parameters_have_the_dtype_of_the_model() -> None:
    assert make_norm(dtype=torch.bfloat16).weight.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("keywords", "is_marked"),
    [
        ({"sequence_parallel": False}, False),
        ({"sequence_parallel": True}, True),
        ({"sequence_parallel": True, "is_split": False}, False),
    ],
)
def test_parameters_say_whether_their_gradients_are_partial_sums(keywords: dict[str, bool], is_marked: bool) -> None:
    norm = make_norm(**keywords)
    assert norm.weight.sequence_parallel is norm.bias.sequence_parallel is is_marked


def test_a_float32_residual_is_normalised_in_float32(layer_norm) -> None:
    config = SimpleNamespace(params_dtype=torch.bfloat16, sequence_parallel=False)
    carried, branch = LayerNorm(config, 6), RoundedLayerNorm(config, 6)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 6, generator=generator)
    with torch.no_grad():
        for norm in (carried, branch):
            norm.weight.copy_(torch.linspace(0.5, 1.5, 6))
            norm.bias.copy_(torch.linspace(-1.0, 1.0, 6))
    expected = layer_norm(values, carried.weight.float(), carried.bias.float(), 1e-5)
    torch.testing.assert_close(carried(values), expected, rtol=0, atol=1e-6)
    assert torch.equal(branch(values), carried(values).bfloat16())
    assert torch.equal(Rounding(config)(values), values.bfloat16())
