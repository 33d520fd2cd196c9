"""The renaming, against tensors whose place in the other layout is written out by hand."""

import pytest
import torch

from celltron.models.geneformer import GeneformerConfig
from celltron.models.geneformer.bert_tensors import from_bert_tensors, list_bert_shapes, to_bert_tensors

CONFIG = GeneformerConfig(
    num_layers=2, hidden_size=4, ffn_hidden_size=6, num_attention_heads=2, max_positions=5, vocabulary_multiple=8
)
QKV = "encoder.layers.1.self_attention.linear_qkv"


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in list_bert_shapes(CONFIG, 11).items()}


def test_every_tensor_comes_back(tensors) -> None:
    back = to_bert_tensors(CONFIG, from_bert_tensors(CONFIG, tensors), 11)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) and back[name].is_contiguous() for name in tensors)


def test_attention_projections_stand_side_by_side_for_each_head(tensors) -> None:
    joint = from_bert_tensors(CONFIG, tensors)[f"{QKV}.weight"]
    q, k, v = (tensors[f"bert.encoder.layer.1.attention.self.{name}.weight"] for name in ("query", "key", "value"))
    # Two heads of width two: rows 0 and 1 of each matrix belong to the first.
    expected = [q[0], q[1], k[0], k[1], v[0], v[1], q[2], q[3], k[2], k[3], v[2], v[3]]
    assert torch.equal(joint, torch.stack(expected))
    bias = from_bert_tensors(CONFIG, tensors)[f"{QKV}.bias"]
    key_bias = tensors["bert.encoder.layer.1.attention.self.key.bias"]
    assert torch.equal(bias[[2, 3, 8, 9]], key_bias)


def test_the_vocabulary_is_padded_and_cut(tensors) -> None:
    parameters = from_bert_tensors(CONFIG, tensors)
    words, bias = parameters["embedding.word_embeddings.weight"], parameters["output_layer.bias"]
    assert words.shape == (16, 4) and torch.equal(words[11:], torch.zeros(5, 4))
    assert bias.shape == (16,) and torch.equal(bias[11:], torch.full((5,), -10_000.0))
    # Whatever stands in the padding rows, none of it is exported.
    words[11:] = 7.0
    assert torch.equal(to_bert_tensors(CONFIG, parameters, 11)["bert.embeddings.word_embeddings.weight"], words[:11])


def test_parameters_of_another_shape_are_a_defect(tensors) -> None:
    parameters = from_bert_tensors(CONFIG, tensors)
    parameters["head.dense.bias"] = torch.zeros(5)
    with pytest.raises(AssertionError, match="cls.predictions.transform.dense.bias"):
        to_bert_tensors(CONFIG, parameters, 11)
