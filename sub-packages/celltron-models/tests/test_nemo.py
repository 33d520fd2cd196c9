"""Names and shapes of NeMo's tensors: every value arrives where it belongs, and what does not fit is refused."""

import pytest
import torch

from celltron.core import InputError
from celltron.models.geneformer import GeneformerConfig, from_nemo_tensors, list_nemo_shapes, read_nemo_shape

CONFIG = GeneformerConfig(
    variant="pre_norm_erf",
    attention_dropout=0.1,
    num_layers=3,
    hidden_size=8,
    ffn_hidden_size=12,
    num_attention_heads=2,
    max_positions=6,
    vocabulary_multiple=4,
)
SETTINGS = {"num_attention_heads": 2, "variant": "pre_norm_erf"}
# The parameters of the published models, as their logs give them, with the padded vocabulary.
PUBLISHED = {
    10_300_032: GeneformerConfig(variant="pre_norm"),
    106_808_960: GeneformerConfig(
        variant="pre_norm", num_layers=12, hidden_size=768, ffn_hidden_size=3072, num_attention_heads=12
    ),
}


def read(shapes, **settings):
    return read_nemo_shape(shapes, SETTINGS | settings, vocabulary_multiple=4, where="weights")


@pytest.mark.parametrize("num_parameters", PUBLISHED)
@pytest.mark.parametrize("is_joined", [True, False])
def test_published_numbers_of_parameters(num_parameters: int, is_joined: bool) -> None:
    shapes = list_nemo_shapes(PUBLISHED[num_parameters], 25_472, is_joined=is_joined)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == num_parameters


def test_names_of_a_joined_checkpoint() -> None:
    shapes = list_nemo_shapes(CONFIG, 20, is_joined=True)
    assert shapes["module.encoder.layers.self_attention.linear_qkv.weight"] == (3, 24, 8)
    assert shapes["module.encoder.layers.self_attention.linear_qkv.layer_norm_bias"] == (3, 8)
    assert shapes["module.encoder.layers.mlp.linear_fc1.bias"] == (3, 12)
    assert shapes["module.embedding.word_embeddings.weight"] == (20, 8)
    assert len(shapes) == 9 + 12


@pytest.mark.parametrize("is_joined", [True, False])
def test_the_shape_is_read_off_the_tensors(is_joined: bool) -> None:
    shapes = list_nemo_shapes(CONFIG, 20, is_joined=is_joined)
    others = {
        "optimizer.state.exp_avg.module.embedding.word_embeddings.weight": (160,),
        "module.encoder.layers.self_attention.linear_qkv._extra_state/shard_0_3": (1,),
    }
    model = read(shapes | others, hidden_size=8, max_positions=6)
    assert (model.config, model.num_rows, model.shapes) == (CONFIG, 20, shapes)


@pytest.mark.parametrize("is_joined", [True, False])
def test_every_value_arrives(is_joined: bool) -> None:
    model = read(list_nemo_shapes(CONFIG, 20, is_joined=is_joined))
    tensors = {
        name: torch.full(shape, float(place)) if not is_joined or ".layers." not in name
        else torch.stack([torch.full(shape[1:], place + layer / 10) for layer in range(3)])
        for place, (name, shape) in enumerate(model.shapes.items())
    }
    found = from_nemo_tensors(model, tensors, 17)
    stack = "module.encoder.layers."
    for layer in range(3):
        for ours, theirs in {
            "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
            "pre_mlp_layernorm.bias": "mlp.linear_fc1.layer_norm_bias",
            "self_attention.linear_proj.bias": "self_attention.linear_proj.bias",
            "mlp.linear_fc2.weight": "mlp.linear_fc2.weight",
        }.items():
            wanted = tensors[stack + theirs][layer] if is_joined else tensors[f"{stack}{layer}.{theirs}"]
            assert torch.equal(found[f"encoder.layers.{layer}.{ours}"], wanted), (layer, ours)
    for ours, theirs in (("head.dense.weight", "lm_head.dense.weight"), ("head.norm.bias", "lm_head.layer_norm.bias")):
        assert torch.equal(found[ours], tensors[f"module.{theirs}"])
    assert torch.equal(found["encoder.final_layernorm.bias"], tensors["module.encoder.final_layernorm.bias"])
    words, bias = found["embedding.word_embeddings.weight"], found["output_layer.bias"]
    assert torch.equal(words[:17], tensors["module.embedding.word_embeddings.weight"][:17]) and not words[17:].any()
    assert torch.equal(bias[:17], tensors["module.output_layer.bias"][:17])
    assert bias[17:].tolist() == [-10_000.0] * 3
    assert bool((tensors["module.output_layer.bias"] > -1).all()), "what was given is left alone"
    assert len(found) == 9 + 12 * 3
    storages = {value.untyped_storage().data_ptr() for value in found.values()}
    assert len(storages) == len(found), "no two share memory, which safetensors refuses"


def test_without_a_config_all_but_the_heads_is_as_bionemo_trained() -> None:
    shapes = list_nemo_shapes(CONFIG, 20, is_joined=True)
    config = read_nemo_shape(shapes, {"num_attention_heads": 2}, vocabulary_multiple=4, where="weights").config
    assert (config.variant, config.hidden_dropout, config.attention_dropout) == ("pre_norm", 0.02, 0.1)
    assert (config.norm_epsilon, config.initial_standard_deviation) == (1e-12, 0.02)


FC1 = "module.encoder.layers.mlp.linear_fc1.weight"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({FC1: None}, "weights lacks the tensor module.encoder.layers.0.mlp.linear_fc1.weight"),
        ({FC1: (12, 8)}, "linear_fc1.weight has shape (12, 8), wanted 3 axes"),
        ({"module.embedding.word_embeddings.weight": None}, "holds no Geneformer that BioNeMo wrote"),
        ({"module.embedding.word_embeddings.weight": (21, 8)}, "has 21 rows, no multiple of 4"),
        ({"module.encoder.final_layernorm.bias": None}, "lacks 1 tensors of the model, the first is module.encoder.fi"),
        ({"module.embedding.tokentype_embeddings.weight": (2, 8)}, "does not have, the first is module.embedding.tok"),
        ({"module.output_layer.bias": (16,)}, "module.output_layer.bias has shape (16,), but the other tensors make"),
        (
            {"module.encoder.layers.self_attention.linear_qkv.weight": (3, 16, 8)},
            "linear_qkv.weight has shape (3, 16, 8), but the other tensors make it (3, 24, 8)",
        ),
    ],
)
def test_what_is_no_such_model_is_refused(changes, expected: str) -> None:
    shapes = list_nemo_shapes(CONFIG, 20, is_joined=True) | changes
    with pytest.raises(InputError, match=r"^[^\n]+$") as error:
        read({name: shape for name, shape in shapes.items() if shape is not None})
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_layers": 4}, "the tensors have num_layers 3, but the config beside them 4"),
        ({"max_positions": 7}, "the tensors have max_positions 6, but the config beside them 7"),
        ({"num_attention_heads": 3}, "no multiple of model.num_attention_heads"),
        ({"num_attention_heads": "2"}, "'num_attention_heads' is \"2\", wanted a whole number"),
        ({"attention_dropout": 1.5}, "model.attention_dropout is 1.5"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, expected: str) -> None:
    with pytest.raises(InputError) as error:
        read(list_nemo_shapes(CONFIG, 20, is_joined=True), **settings)
    assert expected in str(error.value)
