"""The model against formulas written out in plain torch."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel import layers as megatron_linears

from celltron.models.geneformer import build_geneformer, put_parameters, take_parameters
from celltron.models.geneformer.model import PADDING_ROW_BIAS, _of_output_layer, make_transformer_config
from celltron.models.layers.packing import PackedCells

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def compute(attention, layer_norm):
    """Geneformer's logits [B, S, R] from its parameters by name, every product written out."""

    def linear(parameters, name, values):
        return values @ parameters[f"{name}.weight"].T + parameters[f"{name}.bias"]

    def norm(parameters, name, values):
        return layer_norm(values, parameters[f"{name}.weight"], parameters[f"{name}.bias"])

    def logits(parameters, config, tokens_BS, is_padding_BS):
        embedding = {
            name: parameters[f"embedding.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
        }
        hidden_BSD = embedding["word"][tokens_BS] + embedding["position"][: tokens_BS.shape[1]]
        hidden_BSD = norm(parameters, "embedding.norm", hidden_BSD + embedding["token_type"][0])
        for layer in range(config.num_layers):
            name = f"encoder.layers.{layer}"
            joint = linear(parameters, f"{name}.self_attention.linear_qkv", hidden_BSD)
            q, k, v = joint.unflatten(-1, (config.num_attention_heads, 3, -1)).permute(3, 0, 2, 1, 4)
            attended_BSD = attention(q, k, v, is_padding_BS).transpose(1, 2).flatten(2)
            attended_BSD = linear(parameters, f"{name}.self_attention.linear_proj", attended_BSD)
            hidden_BSD = norm(parameters, f"{name}.attention_norm", hidden_BSD + attended_BSD)
            inner_BSF = linear(parameters, f"{name}.mlp.linear_fc1", hidden_BSD).relu()
            hidden_BSD = hidden_BSD + linear(parameters, f"{name}.mlp.linear_fc2", inner_BSF)
            hidden_BSD = norm(parameters, f"{name}.mlp_norm", hidden_BSD)
        transformed_BSD = norm(parameters, "head.norm", linear(parameters, "head.dense", hidden_BSD).relu())
        return transformed_BSD @ embedding["word"].T + parameters["output_layer.bias"]

    return logits


@torch.no_grad()
def test_logits_are_the_formula(make_model, make_cells, compute, small) -> None:
    model = make_model(dtype=torch.float64)
    tokens_BS, is_padding_BS = make_cells(16, 9, 1)
    expected = compute(take_parameters(model), small, tokens_BS, is_padding_BS)
    found = model(tokens_BS, is_padding_BS).reshape(expected.shape)
    torch.testing.assert_close(found[~is_padding_BS], expected[~is_padding_BS], rtol=0, atol=1e-11)


@torch.no_grad()
def test_the_head_on_chosen_places_gives_what_it_gives_on_all(make_model, make_cells) -> None:
    model = make_model()
    tokens_BS, is_padding_BS = make_cells(12, 7, 3)
    places_M = torch.tensor([0, 5, 11, 12, 18, 24, 26])
    everywhere = model(tokens_BS, is_padding_BS)
    assert everywhere.shape == (36, 112)
    torch.testing.assert_close(model(tokens_BS, is_padding_BS, places_M), everywhere[places_M], rtol=0, atol=1e-5)
    assert model(tokens_BS, is_padding_BS, places_M[:0]).shape == (0, 112)


@torch.no_grad()
def test_what_stands_in_the_padding_changes_nothing(make_model, make_cells) -> None:
    model = make_model(dtype=torch.float64)
    tokens_BS, is_padding_BS = make_cells(12, 7, 3)
    garbage_BS = torch.where(is_padding_BS, 50, tokens_BS)
    first, second = (model(tokens, is_padding_BS).reshape(3, 12, -1) for tokens in (tokens_BS, garbage_BS))
    assert torch.equal(first[~is_padding_BS], second[~is_padding_BS])


@torch.no_grad()
def test_more_padding_changes_nothing(make_model, make_cells) -> None:
    model = make_model(dtype=torch.float64)
    tokens_BS, is_padding_BS = make_cells(7, 7)
    assert not is_padding_BS.any()
    longer_BS = torch.nn.functional.pad(tokens_BS, (0, 5))
    is_longer_BS = torch.nn.functional.pad(is_padding_BS, (0, 5), value=True)
    short = model(tokens_BS, is_padding_BS).reshape(2, 7, -1)
    long = model(longer_BS, is_longer_BS).reshape(2, 12, -1)[:, :7]
    # Sums over more places, most of them zero, in another order.
    torch.testing.assert_close(long, short, rtol=0, atol=1e-12)


def test_a_row_of_padding_alone_gives_numbers_and_leaves_gradients_alone(make_model, make_cells) -> None:
    tokens_BS, is_padding_BS = make_cells(5, 0)
    gradients = []
    for num_rows in (1, 2):
        model = make_model(dtype=torch.float64)
        logits = model(tokens_BS[:num_rows], is_padding_BS[:num_rows]).reshape(num_rows, 5, -1)
        assert logits.isfinite().all()
        logits[0].square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-12, atol=1e-10)


def test_packed_cells_give_what_padded_ones_give(make_model, make_cells) -> None:
    """Logits and all gradients, with padding at the end of the pack as under sequence parallelism."""
    lengths = (16, 9, 1, 12)
    tokens_BS, is_padding_BS = make_cells(*lengths)
    places_M = torch.tensor([0, 3, 15, 16, 24, 32, 48, 59])
    packed_places_M = torch.tensor([0, 3, 15, 16, 24, 25, 26, 37])
    row_1T = torch.nn.functional.pad(tokens_BS[~is_padding_BS], (0, 2))[None]
    gradients = []
    outputs = []
    for arguments, packed in (
        ((tokens_BS, is_padding_BS, places_M), None),
        ((row_1T, None, packed_places_M), PackedCells.of([*lengths, 2], torch.device("cpu"))),
    ):
        model = make_model(dtype=torch.float64)
        outputs.append(model(*arguments, packed=packed))
        outputs[-1].square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-11)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-11, atol=1e-9)


@torch.no_grad()
def test_padding_rows_never_get_any_probability(make_model, make_cells) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(dtype=dtype)
        logits = model(*make_cells(9, 4))
        assert (torch.softmax(logits, dim=-1)[:, 101:] == 0).all()
        assert (model.output_layer.bias[101:] == PADDING_ROW_BIAS).all()


def test_weights_are_tied(make_model) -> None:
    model = make_model()
    assert model.shared_embedding_or_output_weight() is model.embedding.word_embeddings.weight
    assert model.output_layer.weight is None
    assert not any("output_layer.weight" in name for name, _ in model.named_parameters())


def test_initial_weights_depend_on_the_seed_alone(small, one_process) -> None:
    def build(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed + 17)
        return take_parameters(
            build_geneformer(small, num_tokens=101, dtype=dtype, sequence_parallel=False, seed=seed)
        )

    first, again, other, rounded = build(0), build(0), build(1), build(0, torch.bfloat16)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name].bfloat16(), rounded[name]) for name in first)
    for name, values in first.items():
        if name.endswith("norm.weight"):
            assert (values == 1).all()
        elif name == "output_layer.bias":
            assert (values[:101] == 0).all() and (values[101:] == PADDING_ROW_BIAS).all()
        elif name.endswith("bias"):
            assert (values == 0).all()
        else:
            assert not torch.equal(values, other[name])
            assert 0.015 < values[:101].std() < 0.025, name
    assert (first["embedding.word_embeddings.weight"][101:] == 0).all()


def test_parameters_are_put_and_taken(make_model) -> None:
    first, second = make_model(), make_model(seed=1)
    put_parameters(second, take_parameters(first))
    taken = take_parameters(second)
    assert all(torch.equal(taken[name], parameter) for name, parameter in take_parameters(first).items())
    with pytest.raises(AssertionError, match="head.dense.bias"):
        put_parameters(second, {name: values for name, values in taken.items() if name != "head.dense.bias"})
    with pytest.raises(AssertionError, match="head.dense.bias"):
        put_parameters(second, {**taken, "head.dense.bias": torch.zeros(3)})


@pytest.mark.parametrize("variant", ["post_norm", "pre_norm"])
def test_a_float32_residual_comes_closer_to_float32(small, one_process, make_cells, variant) -> None:
    """With the same weights, which are rounded to bfloat16 in all three."""
    deep = replace(small, num_layers=12, variant=variant)

    def build(dtype, **settings):
        return build_geneformer(deep, num_tokens=101, dtype=dtype, sequence_parallel=False, seed=0, **settings)

    narrow = build(torch.bfloat16)
    wide = build(torch.bfloat16, fp32_residual_connection=True)
    exact = build(torch.float32)
    put_parameters(exact, {name: values.float() for name, values in take_parameters(narrow).items()})
    dtypes = set()
    for module in wide.encoder.layers.modules():
        if hasattr(module, "linear_fc1"):
            module.linear_fc1.register_forward_hook(lambda *call: dtypes.add((call[1][0].dtype, call[2][0].dtype)))
    for layer in wide.encoder.layers:
        layer.register_forward_hook(lambda *call: dtypes.add(call[2][0].dtype))
    tokens_BS, is_padding_BS = make_cells(16, 12, 5)
    weights_M = torch.randn(48, 112, generator=torch.Generator().manual_seed(0))
    hidden, gradients = {}, {}
    for name, model in (("narrow", narrow), ("wide", wide), ("exact", exact)):
        (model(tokens_BS, is_padding_BS).float()[:, :101] * weights_M[:, :101]).sum().backward()
        hidden[name] = model.hidden_states(tokens_BS, is_padding_BS).detach().float()
        gradients[name] = torch.cat([parameter.grad.float().flatten() for parameter in model.parameters()])
    assert dtypes == {torch.float32, (torch.bfloat16, torch.bfloat16)}

    def error(values, name):
        return float((values[name] - values["exact"]).norm() / values["exact"].norm())

    assert error(hidden, "wide") < 0.3 * error(hidden, "narrow")
    assert error(gradients, "wide") < 0.7 * error(gradients, "narrow")


def test_gradients_that_kernels_add_up_are_those_that_are_added_afterwards(
    small, one_process, make_cells, monkeypatch
) -> None:
    """Apex's kernel adds to `main_grad`, which is there in data parallelism alone; the decoder is the embedding too."""
    called = []

    def add_gradient(input_TD, output_gradient_TE, main_gradient) -> None:
        called.append(main_gradient.dtype)
        main_gradient.add_(output_gradient_TE.T.float() @ input_TD.float())

    kernels = SimpleNamespace(wgrad_gemm_accum_fp32=add_gradient)
    monkeypatch.setattr(megatron_linears, "fused_weight_gradient_mlp_cuda", kernels, raising=False)
    monkeypatch.setattr(megatron_linears, "_grad_accum_fusion_available", True)
    cells = [make_cells(16, 9, 1), make_cells(7, 12, seed=1)]
    gradients = []
    for is_fused in (False, True):
        model = build_geneformer(
            small,
            num_tokens=101,
            dtype=torch.bfloat16,
            sequence_parallel=False,
            seed=0,
            gradient_accumulation_fusion=is_fused,
        )
        before = model(*cells[0])  # there is no main_grad yet
        wrapped = DistributedDataParallel(
            config=model.config,
            ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True),
            module=model,
        )
        for tokens_BS, is_padding_BS in cells:
            wrapped(tokens_BS, is_padding_BS).float().square().sum().mul(1e-6).backward()
        gradients.append({name: parameter.main_grad.clone() for name, parameter in model.named_parameters()})
        with torch.no_grad():
            assert torch.equal(wrapped(*cells[0]), before)
    # Four matrices a layer, and the decoder.
    assert called == [torch.float32] * 2 * (4 * 3 + 1)
    for name, expected in gradients[0].items():
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


def test_the_output_layer_does_without_the_kernel_that_is_not_there(small, one_process) -> None:
    """Transformer Engine's layers bring their own, the output layer's is apex's."""
    config = make_transformer_config(
        small, dtype=torch.bfloat16, sequence_parallel=False, gradient_accumulation_fusion=True
    )
    assert not _of_output_layer(config).gradient_accumulation_fusion and config.gradient_accumulation_fusion
