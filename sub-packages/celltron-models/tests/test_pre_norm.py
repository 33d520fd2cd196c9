"""The pre-norm variant against the formula written out, and against megatron-core's own `BertModel`.

Axes: B cells, S places, D width, N heads, H head width, M = B x S.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.transformer.transformer_config import TransformerConfig

from celltron.models.geneformer import Geneformer, GeneformerConfig, build_geneformer, take_parameters
from celltron.models.layers.packing import PackedCells

pytestmark = pytest.mark.usefixtures("one_process")

NUM_TOKENS = 101
VARIANTS = ["pre_norm", "pre_norm_erf"]


@pytest.fixture
def make(make_model: Callable[..., Geneformer], small: GeneformerConfig) -> Callable[..., Geneformer]:
    """A small model of a variant, all of whose parameters have values of their own."""
    return lambda variant="pre_norm", dtype=torch.float64: make_model(replace(small, variant=variant), dtype=dtype)


@pytest.fixture
def no_compiler() -> Iterator[None]:
    """Megatron compiles its fused GELU, which takes a C++ compiler; the formula is the same without."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_formula(
    variant: str,
    make: Callable[..., Geneformer],
    make_cells: Callable[..., Any],
    layer_norm: Callable[..., torch.Tensor],
    attention: Callable[..., torch.Tensor],
) -> None:
    model = make(variant)
    tokens_BS, is_padding_BS = make_cells(9, 16, 1)
    p = take_parameters(model)
    hidden_BSD = p["embedding.word_embeddings.weight"][tokens_BS] + p["embedding.position_embeddings.weight"][:16]
    for layer in range(3):
        w = {name.removeprefix(f"encoder.layers.{layer}."): value for name, value in p.items()}
        x = layer_norm(hidden_BSD, w["input_layernorm.weight"], w["input_layernorm.bias"])
        qkv = x @ w["self_attention.linear_qkv.weight"].T + w["self_attention.linear_qkv.bias"]
        q, k, v = qkv.reshape(3, 16, 4, 3, 6).permute(3, 0, 2, 1, 4)
        attended = attention(q, k, v, is_padding_BS).transpose(1, 2).reshape(3, 16, 24)
        hidden_BSD = hidden_BSD + attended @ w["self_attention.linear_proj.weight"].T
        hidden_BSD = hidden_BSD + w["self_attention.linear_proj.bias"]
        x = layer_norm(hidden_BSD, w["pre_mlp_layernorm.weight"], w["pre_mlp_layernorm.bias"])
        x = x @ w["mlp.linear_fc1.weight"].T + w["mlp.linear_fc1.bias"]
        if variant == "pre_norm":
            x = x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
        else:
            x = x / 2 * (1 + torch.erf(x / 2**0.5))
        hidden_BSD = hidden_BSD + x @ w["mlp.linear_fc2.weight"].T + w["mlp.linear_fc2.bias"]
    hidden_BSD = layer_norm(hidden_BSD, p["encoder.final_layernorm.weight"], p["encoder.final_layernorm.bias"])
    x = hidden_BSD @ p["head.dense.weight"].T + p["head.dense.bias"]
    x = layer_norm(x / 2 * (1 + torch.erf(x / 2**0.5)), p["head.norm.weight"], p["head.norm.bias"])
    wanted_BSV = x @ p["embedding.word_embeddings.weight"].T + p["output_layer.bias"]
    with torch.no_grad():
        found_BSV = model(tokens_BS, is_padding_BS).reshape(wanted_BSV.shape)
    torch.testing.assert_close(found_BSV[~is_padding_BS], wanted_BSV[~is_padding_BS], rtol=0, atol=1e-11)


def build_bert(*, is_fused: bool) -> BertModel:
    config = TransformerConfig(
        num_layers=3,
        hidden_size=24,
        ffn_hidden_size=40,
        num_attention_heads=4,
        layernorm_epsilon=1e-12,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_func=torch.nn.functional.gelu,
        bias_activation_fusion=is_fused,
        params_dtype=torch.float64,
    )
    model = BertModel(
        config,
        num_tokentypes=0,
        transformer_layer_spec=bert_layer_local_spec,
        vocab_size=112,
        max_sequence_length=16,
        share_embeddings_and_output_weights=True,
        add_binary_head=False,
    )
    return model.to(torch.float64)


# Megatron's fused GELU has sqrt(2/pi) to eight digits.
@pytest.mark.parametrize(("variant", "tolerance"), [("pre_norm_erf", 1e-10), ("pre_norm", 1e-6)])
def test_logits_and_gradients_are_those_of_bert_model(
    variant: str, tolerance: float, make: Callable[..., Geneformer], make_cells: Callable[..., Any], no_compiler: None
) -> None:
    model, bert = make(variant), build_bert(is_fused=variant == "pre_norm").eval()
    own = dict(model.named_parameters())
    pairs = [
        (own.pop(name.replace("lm_head.", "head.").replace(".layer_norm.", ".norm.")), parameter)
        for name, parameter in bert.named_parameters()
    ]
    assert not own
    with torch.no_grad():
        for ours, theirs in pairs:
            theirs.copy_(ours)
    tokens_BS, is_padding_BS = make_cells(16, 9, 1, 13)
    is_token_M = ~is_padding_BS.flatten()
    wanted_MV = bert(tokens_BS, (~is_padding_BS).long())[0].flatten(0, 1)[is_token_M, :NUM_TOKENS]
    found_MV = model(tokens_BS, is_padding_BS)[is_token_M, :NUM_TOKENS]
    assert wanted_MV.std() > 1.0
    torch.testing.assert_close(found_MV, wanted_MV, rtol=0, atol=tolerance)
    for logits_MV in (wanted_MV, found_MV):
        torch.nn.functional.cross_entropy(logits_MV, tokens_BS.flatten()[is_token_M], reduction="sum").backward()
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=100 * tolerance)


def test_packed_cells_give_what_padded_ones_give(
    make: Callable[..., Geneformer], make_cells: Callable[..., Any]
) -> None:
    """Logits and all gradients, with padding at the end of the pack as under sequence parallelism."""
    lengths = (16, 9, 1, 12)
    tokens_BS, is_padding_BS = make_cells(*lengths)
    places_M = torch.tensor([0, 3, 15, 16, 24, 32, 48, 59])
    packed_places_M = torch.tensor([0, 3, 15, 16, 24, 25, 26, 37])
    row_1T = torch.nn.functional.pad(tokens_BS[~is_padding_BS], (0, 2))[None]
    padded, packed = make(), make()
    wanted = padded(tokens_BS, is_padding_BS, places_M)
    found = packed(row_1T, None, packed_places_M, packed=PackedCells.of([*lengths, 2], torch.device("cpu")))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)
    wanted.square().sum().backward()
    found.square().sum().backward()
    for (name, parameter), other in zip(padded.named_parameters(), packed.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-11, atol=1e-9, msg=name)


@torch.no_grad()
def test_padding_and_empty_cells(make: Callable[..., Geneformer], make_cells: Callable[..., Any]) -> None:
    model = make()
    tokens_BS, is_padding_BS = make_cells(9, 12, num_places=12)
    all_MV = model(tokens_BS, is_padding_BS)
    torch.testing.assert_close(model(tokens_BS[:1, :9]), all_MV[:9], rtol=0, atol=1e-12)
    assert bool(torch.isfinite(model(tokens_BS, torch.ones_like(is_padding_BS))).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_initial_weights(dtype: torch.dtype, small: GeneformerConfig) -> None:
    model = build_geneformer(
        replace(small, variant="pre_norm"), num_tokens=NUM_TOKENS, dtype=dtype, sequence_parallel=False, seed=0
    )
    for name, parameter in model.named_parameters():
        assert parameter.dtype is dtype, name
        values = parameter.detach().float()
        if name == "output_layer.bias":
            assert not values[:NUM_TOKENS].any() and bool((values[NUM_TOKENS:] < -9000).all())
        elif name.endswith("norm.weight"):
            assert bool((values == 1).all()), name
        elif name.endswith("bias"):
            assert not values.any(), name
        else:
            true = values[:NUM_TOKENS] if "word_embeddings" in name else values
            wanted = 0.02 / 6**0.5 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0.02
            assert true.std().item() == pytest.approx(wanted, rel=0.12), name


def test_gradients_reach_every_parameter(make: Callable[..., Geneformer], make_cells: Callable[..., Any]) -> None:
    model = make().train()
    model(*make_cells(9, 16)).square().mean().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in model.parameters())


@pytest.mark.parametrize("variant", ["pre_norm", "post_norm"])
def test_weights_that_end_a_branch_begin_smaller(variant: str, small: GeneformerConfig) -> None:
    """By sqrt(2 layers), in the pre-norm model alone."""
    config = replace(small, variant=variant, num_layers=8)
    model = build_geneformer(config, num_tokens=NUM_TOKENS, dtype=torch.float64, sequence_parallel=False, seed=3)
    deviation = config.initial_standard_deviation
    parameters = take_parameters(model)
    for name, part in (("linear_qkv", 1.0), ("linear_fc1", 1.0), ("linear_proj", 0.25), ("linear_fc2", 0.25)):
        weights = torch.cat([value.flatten() for key, value in parameters.items() if key.endswith(f"{name}.weight")])
        wanted = deviation * (part if variant == "pre_norm" else 1.0)
        assert weights.std().item() == pytest.approx(wanted, rel=0.05)
