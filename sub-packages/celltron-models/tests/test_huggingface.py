"""Against `transformers` itself: same logits, same loss, same gradients, and nothing lost on the way there and back."""

import dataclasses
import json
import shutil
import stat
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from celltron.core import InputError, MedianTable, Vocabulary, load_published_geneformer, verify_artefact
from celltron.models.geneformer import (
    GeneformerConfig,
    WholeGeneformer,
    from_huggingface,
    huggingface,
    masked_gene_loss,
    put_parameters,
    take_parameters,
    to_huggingface,
)
from celltron.models.geneformer.bert_tensors import to_bert_tensors

pytestmark = pytest.mark.usefixtures("one_process")

VOCABULARY = Vocabulary.from_genes([f"ENSG{number:011d}" for number in range(99)])
MEDIANS = MedianTable(VOCABULARY.genes[:90], [0.1 + number / 3 for number in range(90)])


def whole_of(model, vocabulary: Vocabulary = VOCABULARY, medians: MedianTable | None = MEDIANS) -> WholeGeneformer:
    config = dataclasses.replace(GeneformerConfig(), **_shape(model))
    return WholeGeneformer(
        config=config,
        num_tokens=model.num_tokens,
        parameters=take_parameters(model),
        vocabulary=vocabulary,
        medians=medians,
        max_length=config.max_positions,
    )


def _shape(model) -> dict[str, object]:
    return {
        "num_layers": model.config.num_layers,
        "hidden_size": model.config.hidden_size,
        "ffn_hidden_size": model.config.ffn_hidden_size,
        "num_attention_heads": model.config.num_attention_heads,
        "max_positions": model.embedding.position_embeddings.num_embeddings,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "vocabulary_multiple": 16,
    }


def load_reference(folder: Path, dtype: torch.dtype = torch.float32) -> BertForMaskedLM:
    model, report = AutoModelForMaskedLM.from_pretrained(
        folder, attn_implementation="eager", dtype=dtype, output_loading_info=True
    )
    assert type(model) is BertForMaskedLM
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def logits_of(model, tokens_BS: torch.Tensor, is_padding_BS: torch.Tensor, num_tokens: int) -> torch.Tensor:
    logits = model(tokens_BS, is_padding_BS)
    return logits.reshape(*tokens_BS.shape, -1)[:, :, :num_tokens]


@torch.no_grad()
def reference_logits_of(model, tokens_BS: torch.Tensor, is_padding_BS: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens_BS, attention_mask=(~is_padding_BS).long()).logits


def scrambled_reference(**changes: object) -> BertForMaskedLM:
    """A BertForMaskedLM of Geneformer's kind with random values everywhere."""
    values = {
        "vocab_size": 101,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "hidden_act": "relu",
        "max_position_embeddings": 16,
        "hidden_dropout_prob": 0.02,
        "attention_probs_dropout_prob": 0.02,
        "attn_implementation": "eager",
    }
    model = BertForMaskedLM(BertConfig(**{**values, **changes})).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("lengths", [(12, 12), (12, 7, 1)], ids=["unpadded", "padded"])
def test_an_exported_model_gives_the_same_logits(tmp_path, make_model, make_cells, lengths) -> None:
    model = make_model()
    to_huggingface(whole_of(model), tmp_path / "hf")
    tokens_BS, is_padding_BS = make_cells(*lengths)
    ours = logits_of(model, tokens_BS, is_padding_BS, 101)
    theirs = reference_logits_of(load_reference(tmp_path / "hf"), tokens_BS, is_padding_BS)
    assert theirs.abs().max() > 1.0
    torch.testing.assert_close(ours[~is_padding_BS], theirs[~is_padding_BS], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gc30M", "gc95M"])
def test_the_published_vocabularies_are_exported(tmp_path, make_model, make_cells, name) -> None:
    vocabulary, medians = load_published_geneformer(name)
    model = make_model(num_tokens=len(vocabulary))
    to_huggingface(whole_of(model, vocabulary, medians), tmp_path / "hf")
    tokens = json.loads((tmp_path / "hf" / "token_dictionary.json").read_text())
    assert len(tokens) == {"gc30M": 25_426, "gc95M": 20_275}[name]
    assert (tokens["<pad>"], tokens["<mask>"], tokens[vocabulary.genes[-1]]) == (0, 1, len(vocabulary) - 1)
    tokens_BS, is_padding_BS = make_cells(9, 4, num_tokens=len(vocabulary))
    ours = logits_of(model, tokens_BS, is_padding_BS, len(vocabulary))
    theirs = reference_logits_of(load_reference(tmp_path / "hf"), tokens_BS, is_padding_BS)
    torch.testing.assert_close(ours[~is_padding_BS], theirs[~is_padding_BS], rtol=0, atol=1e-5)
    back = from_huggingface(tmp_path / "hf")
    assert back.vocabulary == vocabulary and back.medians == medians


@pytest.mark.parametrize("num_tokens", [101, 112, 128])
def test_padding_rows_are_cut_off_and_put_back(tmp_path, make_model, num_tokens) -> None:
    vocabulary = Vocabulary.from_genes([f"g{number}" for number in range(num_tokens - 2)])
    model = make_model(num_tokens=num_tokens)
    to_huggingface(whole_of(model, vocabulary, None), tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert tensors["bert.embeddings.word_embeddings.weight"].shape == (num_tokens, 24)
    assert tensors["cls.predictions.bias"].shape == (num_tokens,)
    back = from_huggingface(tmp_path / "hf", vocabulary_multiple=64)
    assert back.parameters["embedding.word_embeddings.weight"].shape == (128, 24)
    assert (back.parameters["embedding.word_embeddings.weight"][num_tokens:] == 0).all()
    assert (back.parameters["output_layer.bias"][num_tokens:] == -10_000).all()
    assert back.medians is None


def test_loss_and_every_gradient_are_those_of_transformers(tmp_path, make_model, make_cells, float64_stays) -> None:
    model = make_model(dtype=torch.float64)
    to_huggingface(whole_of(model), tmp_path / "hf", dtype=torch.float64)
    tokens_BS, is_padding_BS = make_cells(16, 9, 3, 0)
    is_masked_BS = (torch.rand(tokens_BS.shape, generator=torch.Generator().manual_seed(1)) < 0.4) & ~is_padding_BS
    labels_BS = tokens_BS.masked_fill(~is_masked_BS, -100)
    inputs_BS = tokens_BS.masked_fill(is_masked_BS, VOCABULARY.mask_id)

    places_M = is_masked_BS.flatten().nonzero()[:, 0]
    total, count = masked_gene_loss(model(inputs_BS, is_padding_BS, places_M), labels_BS.flatten()[places_M])
    loss = total / count
    loss.backward()
    reference = load_reference(tmp_path / "hf", torch.float64)
    expected = reference(input_ids=inputs_BS, attention_mask=(~is_padding_BS).long(), labels=labels_BS).loss
    expected.backward()

    assert loss.dtype is expected.dtype is torch.float64
    # Both sum the same terms in another order.
    assert abs(loss.item() - expected.item()) < 1e-12
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert (ours["embedding.word_embeddings.weight"][101:] == 0).all()
    assert (ours["output_layer.bias"][101:] == 0).all()
    ours = to_bert_tensors(whole_of(model).config, ours, 101)
    theirs = {name: parameter.grad for name, parameter in reference.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name in ours:
        # A key's bias moves all scores of a query alike, so softmax takes it out: its gradient is 0 but for rounding.
        assert theirs[name].abs().max() > (0.0 if name.endswith("key.bias") else 1e-5), name
        assert (ours[name] - theirs[name]).abs().max() < 1e-10, name


def test_an_imported_model_gives_the_same_logits(tmp_path, make_model, make_cells) -> None:
    reference = scrambled_reference()
    reference.save_pretrained(tmp_path / "hf")
    whole = from_huggingface(tmp_path / "hf")
    assert whole.vocabulary is None and whole.medians is None and whole.max_length == 16
    assert (whole.config.num_layers, whole.config.num_attention_heads, whole.config.hidden_dropout) == (2, 3, 0.02)
    model = make_model(whole.config, seed=3)
    put_parameters(model, whole.parameters)
    tokens_BS, is_padding_BS = make_cells(12, 5, 12, 1)
    ours = logits_of(model, tokens_BS, is_padding_BS, 101)
    theirs = reference_logits_of(reference, tokens_BS, is_padding_BS)
    torch.testing.assert_close(ours[~is_padding_BS], theirs[~is_padding_BS], rtol=0, atol=1e-5)


def test_from_transformers_and_back_every_tensor_is_the_same_to_the_bit(tmp_path) -> None:
    scrambled_reference(num_hidden_layers=3, num_attention_heads=6).save_pretrained(tmp_path / "first")
    whole = dataclasses.replace(from_huggingface(tmp_path / "first"), vocabulary=VOCABULARY)
    to_huggingface(whole, tmp_path / "second")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second"))
    same = set(second) - {"transformers_version"}
    assert {key: first[key] for key in same} == {key: second[key] for key in same}
    # What the export leaves to transformers' defaults is what transformers writes for them.
    first, second = (BertConfig.from_pretrained(tmp_path / name).to_dict() for name in ("first", "second"))
    assert first == second


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_to_transformers_and_back_every_parameter_is_the_same_to_the_bit(tmp_path, make_model, dtype) -> None:
    model = make_model(dtype=dtype)
    # float32 holds every bfloat16 exactly.
    to_huggingface(whole_of(model), tmp_path / "hf", dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    back = from_huggingface(tmp_path / "hf", vocabulary_multiple=16)
    other = make_model(dtype=dtype, seed=5)
    put_parameters(other, back.parameters)
    ours = take_parameters(model)
    assert all(torch.equal(parameter, ours[name]) for name, parameter in take_parameters(other).items())
    assert back.config == whole_of(model).config
    assert (back.vocabulary, back.medians, back.max_length) == (VOCABULARY, MEDIANS, 16)


def test_bfloat16_is_said_in_the_config_and_loaded_as_such(tmp_path, make_model) -> None:
    to_huggingface(whole_of(make_model()), tmp_path / "hf", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "hf").dtype is torch.bfloat16


def test_an_empty_cell_has_finite_logits_and_leaves_others_alone(tmp_path, make_model, make_cells) -> None:
    model = make_model()
    to_huggingface(whole_of(model), tmp_path / "hf")
    tokens_BS, is_padding_BS = make_cells(6, 0, 4)
    ours = logits_of(model, tokens_BS, is_padding_BS, 101)
    theirs = reference_logits_of(load_reference(tmp_path / "hf"), tokens_BS, is_padding_BS)
    assert ours.isfinite().all()
    torch.testing.assert_close(ours[~is_padding_BS], theirs[~is_padding_BS], rtol=0, atol=1e-5)


def test_the_folder_explains_itself(tmp_path, make_model) -> None:
    facts = {"training steps": 1200, "validation loss": 5.25}
    to_huggingface(whole_of(make_model()), tmp_path / "hf", facts=facts)
    verify_artefact(tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "license" not in yaml.safe_load(card.split("---")[1])
    assert "| training steps | 1,200 |" in card and "| validation loss | 5.2500 |" in card and "{" not in card
    assert json.loads((tmp_path / "hf" / "tokenization.json").read_text())["max_length"] == 16
    medians = json.loads((tmp_path / "hf" / "gene_median_dictionary.json").read_text())
    assert list(medians) == list(MEDIANS.genes) and list(medians.values()) == MEDIANS.values.tolist()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "hf").iterdir()}
    assert len(modes) == 1


def test_a_folder_in_use_is_kept_unless_replaced(tmp_path, make_model) -> None:
    first, second = whole_of(make_model()), whole_of(make_model(seed=1))
    to_huggingface(first, tmp_path / "hf")
    with pytest.raises(InputError, match="exists already"):
        to_huggingface(second, tmp_path / "hf")
    to_huggingface(second, tmp_path / "hf", replace=True)
    back = from_huggingface(tmp_path / "hf", vocabulary_multiple=16).parameters
    assert torch.equal(back["head.dense.weight"], second.parameters["head.dense.weight"])


@pytest.mark.parametrize("vocabulary", [None, Vocabulary.from_genes(["ENSG1"])], ids=["none", "another size"])
def test_an_export_without_the_models_vocabulary_is_refused(tmp_path, make_model, vocabulary) -> None:
    with pytest.raises(InputError, match="vocabulary"):
        to_huggingface(whole_of(make_model(), vocabulary, None), tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path, make_model, monkeypatch) -> None:
    def fail(*unused: object, **unused_keywords: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(huggingface, "save_file", fail)
    with pytest.raises(OSError, match="No space left") as error:
        to_huggingface(whole_of(make_model()), tmp_path / "hf")
    assert error.value.errno == 28 and error.value.filename.endswith("model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_card_completed_by_hand_does_not_hinder_the_import(tmp_path, make_model) -> None:
    to_huggingface(whole_of(make_model()), tmp_path / "hf")
    (tmp_path / "hf" / "README.md").write_text("license: mit")
    assert from_huggingface(tmp_path / "hf").num_tokens == 101


def test_a_folder_moved_by_transformers_stays_importable(tmp_path, make_model) -> None:
    """Loaded and saved by transformers, as after further training, into a folder of its own."""
    to_huggingface(whole_of(make_model()), tmp_path / "hf")
    load_reference(tmp_path / "hf").save_pretrained(tmp_path / "saved")
    shutil.copy(tmp_path / "hf" / "token_dictionary.json", tmp_path / "saved")
    first, second = (from_huggingface(tmp_path / name) for name in ("hf", "saved"))
    assert second.vocabulary == VOCABULARY and second.medians is None
    assert all(torch.equal(first.parameters[name], second.parameters[name]) for name in first.parameters)
