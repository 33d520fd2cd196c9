"""The formula against what PyTorch counts in the model's forward and backward passes."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from celltron.models.geneformer.flops import flops_per_step
from celltron.models.layers.packing import PackedCells

NUM_TOKENS = 101
LENGTHS = (16, 9, 3)
PLACES_M = torch.tensor([0, 4, 15, 17, 26])


def count(model, *arguments, **keywords) -> int:
    """Forward and backward; attention with its products written out, for the counter gives fused ones other costs."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*arguments, **keywords).square().sum().backward()
    return counter.get_total_flops()


def expect(config, lengths, num_predicted: int) -> float:
    """By the padded vocabulary, since that is what is computed."""
    square_sum = sum(length**2 for length in lengths)
    return flops_per_step(config, config.padded_vocabulary(NUM_TOKENS), sum(lengths), square_sum, num_predicted)


@pytest.fixture
def wide(small):
    """Every width another number, so that none stands for another."""
    return replace(small, num_layers=2, hidden_size=20, ffn_hidden_size=36, num_attention_heads=5)


def test_packed_cells_cost_what_the_formula_says(make_model, make_cells, wide) -> None:
    tokens_BS, is_padding_BS = make_cells(*LENGTHS)
    packed = PackedCells.of(LENGTHS, torch.device("cpu"))
    found = count(make_model(wide), tokens_BS[~is_padding_BS][None], places_M=PLACES_M, packed=packed)
    assert found == expect(wide, LENGTHS, len(PLACES_M))


def test_padded_cells_cost_what_cells_of_the_padded_length_would(make_model, make_cells, wide) -> None:
    found = count(make_model(wide), *make_cells(*LENGTHS), places_M=PLACES_M)
    assert found == expect(wide, (16, 16, 16), len(PLACES_M))
    assert found > expect(wide, LENGTHS, len(PLACES_M))


def test_without_chosen_places_the_head_works_on_all(make_model, make_cells, small) -> None:
    assert count(make_model(small), *make_cells(7, 7)) == expect(small, (7, 7), 14)


def test_what_remains_without_attention_is_six_operations_a_parameter(small) -> None:
    """Without attention and head six operations a parameter and token remain (Kaplan et al. 2020, section 2.1)."""
    config = replace(small, num_layers=12, hidden_size=768, ffn_hidden_size=3072, num_attention_heads=12)
    parameters = 12 * (4 * 768 * 768 + 2 * 768 * 3072)
    assert flops_per_step(config, 25_426, 1000, 0, 0) == 6.0 * parameters * 1000
    assert flops_per_step(config, 25_426, 0, 0, 10) == 6.0 * 10 * (768 * 768 + 768 * 25_426)
