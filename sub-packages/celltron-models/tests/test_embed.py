"""A cell's vector is the plain mean over its tokens, however the cells are laid out, and `transformers` agrees."""

import pytest
import torch
from transformers import BertModel

from celltron.core import Vocabulary
from celltron.models.geneformer import WholeGeneformer, take_parameters, to_huggingface
from celltron.models.geneformer.embed import embed_cells, mean_hidden
from celltron.models.layers.packing import PackedCells

pytestmark = pytest.mark.usefixtures("one_process")
LENGTHS = [7, 1, 12, 4]


@pytest.fixture
def padded(make_cells) -> tuple[torch.Tensor, torch.Tensor]:
    return make_cells(*LENGTHS)


def test_means_are_of_each_cell_and_summed_wide() -> None:
    hidden_TD = torch.randn(30, 5, dtype=torch.float64)
    expected = torch.stack([hidden_TD[:7].mean(0), hidden_TD[7], hidden_TD[8:].mean(0)])
    found = mean_hidden(hidden_TD, torch.tensor([7, 1, 22]))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    # In bfloat16 a running sum of ones stays at 256.
    ones_TD = torch.ones(1000, 2, dtype=torch.bfloat16)
    found = mean_hidden(ones_TD, torch.tensor([1000], dtype=torch.int32))
    assert found.dtype == torch.float32 and torch.equal(found, torch.ones(1, 2))


def test_packed_padded_and_single_cells_have_one_vector(make_model, padded) -> None:
    model = make_model(dtype=torch.float64).eval()
    tokens_BS, is_padding_BS = padded
    packed = PackedCells.of(LENGTHS, torch.device("cpu"))
    of_packed = embed_cells(model, tokens_BS[~is_padding_BS][None], packed=packed)
    of_padded = embed_cells(model, tokens_BS, is_padding_BS)
    one_by_one = [
        embed_cells(model, cell[None, :length]) for cell, length in zip(tokens_BS, LENGTHS, strict=True)
    ]
    assert of_packed.shape == (4, model.config.hidden_size) and of_packed.dtype == torch.float64
    torch.testing.assert_close(of_packed, torch.cat(one_by_one), rtol=0, atol=1e-12)
    torch.testing.assert_close(of_padded, torch.cat(one_by_one), rtol=0, atol=1e-12)


def test_transformers_agrees(make_model, padded, small, tmp_path) -> None:
    model = make_model().eval()
    tokens_BS, is_padding_BS = padded
    whole = WholeGeneformer(
        config=small,
        num_tokens=model.num_tokens,
        parameters=take_parameters(model),
        vocabulary=Vocabulary.from_genes([f"ENSG{number:011d}" for number in range(model.num_tokens - 2)]),
        max_length=small.max_positions,
    )
    to_huggingface(whole, tmp_path / "hf")
    bert = BertModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False).eval()
    with torch.inference_mode():
        hidden_BSD = bert(input_ids=tokens_BS, attention_mask=(~is_padding_BS).long()).last_hidden_state
    expected = torch.stack([hidden_BSD[row, :length].mean(0) for row, length in enumerate(LENGTHS)])
    torch.testing.assert_close(embed_cells(model, tokens_BS, is_padding_BS), expected, rtol=0, atol=1e-5)


def test_a_model_in_training_mode_is_refused(make_model, padded) -> None:
    with pytest.raises(AssertionError, match="training mode"):
        embed_cells(make_model().train(), *padded)
