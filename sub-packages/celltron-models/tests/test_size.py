"""Sizes from formulas against the model itself, and against published counts; `tests/plan` measures layouts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from celltron.models.geneformer import Geneformer, GeneformerConfig
from celltron.models.geneformer.flops import flops_per_step
from celltron.models.geneformer.size import (
    Places,
    Share,
    activation_bytes,
    count_parameters,
    count_split_parameters,
    layer_bytes,
    list_operations,
    logit_bytes,
    working_bytes,
)

M106 = GeneformerConfig(num_layers=12, hidden_size=768, ffn_hidden_size=3072, num_attention_heads=12)
PLACES = Places(computed=2048.0, squares=2048.0**2, predicted=300.0)


@pytest.mark.parametrize("variant", ["post_norm", "pre_norm"])
def test_parameters_are_those_of_the_model(
    make_model: Callable[..., Geneformer], small: GeneformerConfig, variant: Any
) -> None:
    config = replace(small, variant=variant)
    model = make_model(config, num_tokens=101)
    assert count_parameters(config, 101, Share()) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("config", "published"), [(GeneformerConfig(), 10_300_032), (M106, 106_808_960)])
def test_parameters_are_the_published_ones(config: GeneformerConfig, published: int) -> None:
    """BioNeMo's logs give those of the pre-norm variant, which has no token types."""
    assert count_parameters(replace(config, variant="pre_norm"), 25_426, Share()) == published
    assert count_parameters(config, 25_426, Share()) == published + 2 * config.hidden_size


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (4, 1), (1, 2), (1, 6), (2, 3)])
def test_shares_together_are_the_model_and_its_copies(tensor: int, pipeline: int) -> None:
    config = GeneformerConfig()
    D = config.hidden_size
    shares = [Share(tensor=tensor, pipeline=pipeline, stage=stage) for stage in range(pipeline)]
    together = tensor * sum(count_parameters(config, 25_426, share) for share in shares)
    # Held by every tensor-parallel process: norms, biases after sums, tables but the vocabulary's, the head's product.
    copied = config.num_layers * 6 * D + (2048 + 2 + 2) * D + D * D + 3 * D
    tied = 25_472 * D if pipeline > 1 else 0
    assert together == count_parameters(config, 25_426, Share()) + (tensor - 1) * copied + tied
    assert sum(count_split_parameters(config, share) for share in shares) == 6 * 6 * D + 2 * D


@pytest.mark.parametrize("config", [GeneformerConfig(), M106])
def test_products_are_those_of_the_step(config: GeneformerConfig) -> None:
    padded = config.padded_vocabulary(25_426)
    operations = list_operations(config, 25_426, Share(), PLACES, value_bytes=2)
    step = flops_per_step(config, padded, PLACES.computed, PLACES.squares, PLACES.predicted)
    assert 3 * sum(one.flops for one in operations) == pytest.approx(step, rel=1e-12)
    # Two stages of four processes each do them together, but the head's transform, which each of the four does.
    shares = [Share(tensor=4, pipeline=2, stage=stage) for stage in (0, 1)]
    parts = [one for share in shares for one in list_operations(config, 25_426, share, PLACES, value_bytes=2)]
    transform = 2 * PLACES.predicted * config.hidden_size**2
    assert 3 * (4 * sum(one.flops for one in parts) - 3 * transform) == pytest.approx(step, rel=1e-12)


def test_activations_of_a_layer_written_out() -> None:
    """768 wide, 3,072 in the feed-forward branch, 12 heads, in bfloat16."""
    whole = layer_bytes(M106, Share(), value_bytes=2)
    assert whole == 2 * (9 * 768 + 3072) + 2 * 768 + 4 * 12 + 4 * 4
    # Korthikanti et al. 2022, section 4.1, without scores: 34 bytes a place and a value of width, D = F / 4.
    assert whole / 768 == pytest.approx(34 - 6, rel=0.01)
    assert layer_bytes(M106, Share(tensor=4, sequence_parallel=True), value_bytes=2) == pytest.approx(whole / 4)
    assert layer_bytes(M106, Share(), value_bytes=2, recompute="full") == 2 * 768
    selective = layer_bytes(M106, Share(), value_bytes=2, recompute="selective")
    assert whole - selective == 2 * 768 + 4 * 12
    half, shared = (layer_bytes(M106, Share(tensor=2, context=context), value_bytes=2) for context in (1, 4))
    assert shared - half == 2 * 2 * 768 * 4 / 2
    assert layer_bytes(M106, Share(context=4), value_bytes=2, recompute="selective") == selective
    undropped = layer_bytes(replace(M106, hidden_dropout=0.0), Share(), value_bytes=2)
    assert whole - undropped == 2 * 768


def test_logits_are_on_the_last_stage_and_in_float32_too() -> None:
    first, last = (Share(tensor=2, pipeline=2, stage=stage) for stage in (0, 1))
    assert logit_bytes(M106, 25_426, first, PLACES, value_bytes=2) == 0
    assert logit_bytes(M106, 25_426, last, PLACES, value_bytes=2) == 300 * 25_472 / 2 * 6
    assert logit_bytes(M106, 25_426, last, PLACES, value_bytes=4) == 300 * 25_472 / 2 * 4


def test_activations_grow_with_places_and_layers() -> None:
    one = activation_bytes(M106, Share(), PLACES, value_bytes=2)
    deeper = activation_bytes(replace(M106, num_layers=24), Share(), PLACES, value_bytes=2)
    assert deeper - one == pytest.approx(12 * 2048 * layer_bytes(M106, Share(), value_bytes=2))
    double = Places(computed=4096.0, squares=0.0, predicted=600.0)
    assert activation_bytes(M106, Share(), double, value_bytes=2) == pytest.approx(2 * one)


def test_a_layer_that_is_computed_anew_is_kept_for_a_moment() -> None:
    small, large = (Places(computed=places, squares=0.0, predicted=0.0) for places in (1.0, 8192.0))
    # The embedding's gradients, from the head and from the tokens, are what is largest beside few places.
    assert working_bytes(M106, 25_426, Share(), small, value_bytes=2) == 2 * 25_472 * 768 * 2
    kept, anew = (working_bytes(M106, 25_426, Share(), large, value_bytes=2, recompute=how) for how in ("none", "full"))
    assert kept == 8192 * 2 * (2 * 768 + 2 * 3072)
    assert anew - kept == 8192 * (layer_bytes(M106, Share(), value_bytes=2) - 2 * 768)
