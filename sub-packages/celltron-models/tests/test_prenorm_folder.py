"""An exported folder against `transformers`: same logits, same bits, and what else a user of the folder meets."""

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.dynamic_module_utils
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from celltron.core import InputError, MedianTable, verify_artefact
from celltron.models.geneformer import (
    GeneformerConfig,
    WholeGeneformer,
    build_geneformer,
    from_huggingface,
    put_parameters,
    take_parameters,
    to_huggingface,
    vocabulary_of_genes,
)

pytestmark = pytest.mark.usefixtures("one_process")

GENES = tuple(f"ENSG{number:011d}" for number in range(96))
VOCABULARY = vocabulary_of_genes(GENES)
MEDIANS = MedianTable(GENES, [0.5 + number / 3 for number in range(96)])


def make_whole(variant: Any = "pre_norm", medians: MedianTable | None = MEDIANS) -> WholeGeneformer:
    config = GeneformerConfig(
        variant=variant,
        num_layers=3,
        hidden_size=24,
        ffn_hidden_size=40,
        num_attention_heads=4,
        max_positions=16,
        attention_dropout=0.1,
        vocabulary_multiple=16,
    )
    generator = torch.Generator().manual_seed(1)
    parameters = {
        name: value + 0.3 * torch.randn(value.shape, generator=generator)
        for name, value in take_parameters(build(config)).items()
    }
    return WholeGeneformer(
        config=config,
        num_tokens=len(VOCABULARY),
        parameters=parameters,
        vocabulary=VOCABULARY,
        medians=medians,
        max_length=16,
    )


def build(config: GeneformerConfig) -> Any:
    return build_geneformer(
        config, num_tokens=len(VOCABULARY), dtype=torch.float32, sequence_parallel=False, seed=0
    ).eval()


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Load a folder with its own modelling file, whose copy transformers keeps elsewhere than at home."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))

    def load(folder: Path, auto_class: Any = AutoModelForMaskedLM, **more: Any) -> Any:
        return auto_class.from_pretrained(folder, trust_remote_code=True, local_files_only=True, **more)

    return load


@pytest.mark.parametrize("variant", ["pre_norm", "pre_norm_erf"])
def test_transformers_gives_the_same_logits_and_loss(
    tmp_path: Path, load: Callable[..., Any], make_cells: Callable[..., Any], variant: str
) -> None:
    whole = make_whole(variant)
    to_huggingface(whole, tmp_path / "hf")
    verify_artefact(tmp_path / "hf")
    theirs = load(tmp_path / "hf").eval()
    ours = build(whole.config)
    put_parameters(ours, whole.parameters)
    tokens_BS, is_padding_BS = make_cells(16, 9, 1, 13)
    labels_BS = tokens_BS.masked_fill(is_padding_BS | (tokens_BS % 3 > 0), -100)
    with torch.no_grad():
        wanted_MV = ours(tokens_BS, is_padding_BS)[:, : len(VOCABULARY)]
        output = theirs(input_ids=tokens_BS, attention_mask=(~is_padding_BS).long(), labels=labels_BS)
        no_mask = theirs(tokens_BS[:1]).logits
    is_token_M = ~is_padding_BS.flatten()
    found_MV = output.logits.flatten(0, 1)
    torch.testing.assert_close(found_MV[is_token_M], wanted_MV[is_token_M], rtol=0, atol=1e-5)
    torch.testing.assert_close(no_mask[0], found_MV[:16], rtol=0, atol=1e-5)
    labels_M = labels_BS.flatten()
    loss = torch.nn.functional.cross_entropy(wanted_MV[labels_M >= 0], labels_M[labels_M >= 0])
    torch.testing.assert_close(output.loss, loss, rtol=0, atol=1e-5)


def test_every_bit_and_dtype(tmp_path: Path) -> None:
    whole = make_whole()
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        to_huggingface(whole, tmp_path / name, dtype=dtype)
        found = load_file(tmp_path / name / "model.safetensors")
        assert torch.equal(
            found["model.encoder.layers.2.self_attention.linear_qkv.weight"],
            whole.parameters["encoder.layers.2.self_attention.linear_qkv.weight"].to(dtype),
        )
        words = whole.parameters["embedding.word_embeddings.weight"]
        assert torch.equal(found["model.embedding.word_embeddings.weight"], words[:101].to(dtype))
        assert torch.equal(found["output_bias"], whole.parameters["output_layer.bias"][:101].to(dtype))
        assert len(found) == len(whole.parameters)
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_the_encoder_alone_hidden_states_and_tuples(
    tmp_path: Path, load: Callable[..., Any], make_cells: Callable[..., Any]
) -> None:
    to_huggingface(make_whole(), tmp_path / "hf")
    model, encoder = load(tmp_path / "hf").eval(), load(tmp_path / "hf", AutoModel).eval()
    tokens_BS, is_padding_BS = make_cells(16, 9)
    words = {"input_ids": tokens_BS, "attention_mask": (~is_padding_BS).long()}
    with torch.no_grad():
        output = model(**words, output_hidden_states=True)
        encoded = encoder(**words, output_hidden_states=True)
        as_tuple = model(**words, return_dict=False)
        nothing = model(input_ids=tokens_BS, attention_mask=torch.zeros_like(tokens_BS))
    assert len(output.hidden_states) == 4 and output.loss is None
    assert all(torch.equal(a, b) for a, b in zip(output.hidden_states, encoded.hidden_states, strict=True))
    assert torch.equal(encoded.last_hidden_state, output.hidden_states[-1])
    embedding = encoder.embedding
    first = embedding.word_embeddings(tokens_BS) + embedding.position_embeddings.weight[:16]
    assert torch.equal(output.hidden_states[0], first)
    assert len(as_tuple) == 1 and torch.equal(as_tuple[0], output.logits)
    assert bool(torch.isfinite(nothing.logits).all()), "a cell without tokens makes no NaN"
    with pytest.raises(ValueError, match="has 17 places, more than the 16 positions"):
        model(torch.zeros(1, 17, dtype=torch.int64))


def test_what_the_model_cannot_do_is_refused(tmp_path: Path, load: Callable[..., Any]) -> None:
    to_huggingface(make_whole(), tmp_path / "hf")
    tokens_BS = torch.arange(8)[None]
    zeros_BS = torch.zeros_like(tokens_BS)
    for auto_class in (AutoModelForMaskedLM, AutoModel):
        model = load(tmp_path / "hf", auto_class, attn_implementation="eager").eval()
        plain, given = model(tokens_BS), model(tokens_BS, token_type_ids=zeros_BS, output_attentions=False)
        assert torch.equal(plain[0], given[0])
        with pytest.raises(ValueError, match="token_type_ids holds more than zeros"):
            model(tokens_BS, token_type_ids=zeros_BS + 1)
        with pytest.raises(ValueError, match="output_attentions is true"):
            model(tokens_BS, output_attentions=True)
        for name in ("position_ids", "inputs_embeds", "num_items_in_batch"):
            with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
                model(tokens_BS, **{name: zeros_BS})
        model.config.output_attentions = True
        with pytest.raises(ValueError, match="output_attentions is true"):
            model(tokens_BS)


def test_it_trains_and_comes_back_from_save_pretrained(
    tmp_path: Path, load: Callable[..., Any], make_cells: Callable[..., Any]
) -> None:
    to_huggingface(make_whole(), tmp_path / "hf")
    model = load(tmp_path / "hf").train()
    assert model.model.encoder.layers[0].self_attention.dropout == 0.1
    assert model.model.embedding.dropout.p == 0.02
    tokens_BS, _ = make_cells(16, 16)
    model(tokens_BS, labels=tokens_BS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.save_pretrained(tmp_path / "again")
    # What save_pretrained leaves to its user: the modelling file.
    (tmp_path / "again" / "modeling_geneformer_prenorm.py").write_text(
        (tmp_path / "hf" / "modeling_geneformer_prenorm.py").read_text()
    )
    again = load(tmp_path / "again")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_the_folder_needs_no_celltron(tmp_path: Path, load: Callable[..., Any]) -> None:
    to_huggingface(make_whole(), tmp_path / "hf")
    config = load(tmp_path / "hf", AutoConfig)
    assert (config.model_type, config.vocab_size, config.hidden_act) == ("geneformer_prenorm", 101, "gelu_pytorch_tanh")
    assert (config.pad_token_id, config.num_attention_heads, config.layer_norm_eps) == (2, 4, 1e-12)
    assert type(config).__module__.startswith("transformers_modules."), "the folder's own file, not celltron's"
    imports = {name for name, _ in inspect.getmembers(sys.modules[type(config).__module__], inspect.ismodule)}
    assert imports == {"torch", "nn"}
    assert "celltron" not in (tmp_path / "hf" / "modeling_geneformer_prenorm.py").read_text()
    config.hidden_act = "relu"
    with pytest.raises(ValueError, match="hidden_act is 'relu'"):
        AutoModel.from_config(config, trust_remote_code=True)


def test_what_the_folder_says(tmp_path: Path) -> None:
    to_huggingface(make_whole(), tmp_path / "hf", facts={"origin": "a test"})
    card = (tmp_path / "hf" / "README.md").read_text()
    for words in ("trust_remote_code=True", "GELU (tanh), pre-norm", "| origin | a test |", "put `<cls>` before them"):
        assert words in card, words
    tokenization = json.loads((tmp_path / "hf" / "tokenization.json").read_text())
    assert (tokenization["max_length"], tokenization["first_token"], tokenization["last_token"]) == (16, "<cls>", None)
    to_huggingface(make_whole(medians=None), tmp_path / "bare")
    assert not (tmp_path / "bare" / "gene_median_dictionary.json").exists()
    assert "(not known to this export)" in (tmp_path / "bare" / "README.md").read_text()


@pytest.mark.parametrize("variant", ["pre_norm", "pre_norm_erf"])
def test_what_is_imported_is_what_was_exported_to_the_bit(tmp_path: Path, variant: str) -> None:
    whole = make_whole(variant)
    to_huggingface(whole, tmp_path / "hf")
    found = from_huggingface(tmp_path / "hf", vocabulary_multiple=16)
    assert (found.config, found.num_tokens, found.max_length) == (whole.config, 101, 16)
    assert found.vocabulary == VOCABULARY and found.medians == MEDIANS and found.unused_tensors == ()
    words, bias = "embedding.word_embeddings.weight", "output_layer.bias"
    assert found.parameters.keys() == whole.parameters.keys()
    for name, parameter in found.parameters.items():
        num_rows = 101 if name in (words, bias) else None
        assert torch.equal(parameter[:num_rows], whole.parameters[name][:num_rows]), name
    # Rows that only pad the vocabulary are no token's, in no probability.
    assert found.parameters[words].shape == (112, 24) and not found.parameters[words][101:].any()
    put_parameters(build(found.config), found.parameters)
    assert bool((found.parameters[bias][101:] < -1e3).all())


def change_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def drop_tensor(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_config(hidden_act="relu"), "hidden_act is 'relu', but a pre-norm Geneformer has gelu_pytorch_tanh or"),
        (change_config(hidden_act=["gelu"]), "hidden_act is ['gelu']"),
        (change_config(model_type="bert"), "hidden_act is 'gelu_pytorch_tanh', but the BERT of Geneformer has 'relu'"),
        (change_config(architectures=["PreNormGeneformerModel"]), "wanted PreNormGeneformerForMaskedLM"),
        (change_config(num_hidden_layers=4), "lacks 12 tensors of the model, the first is model.encoder.layers.3."),
        (change_config(num_hidden_layers=2), "the first is model.encoder.layers.2."),
        (change_config(intermediate_size=41), "mlp.linear_fc1.bias has shape (40,), but config.json makes it (41,)"),
        (change_config(layer_norm_eps=None), "layer_norm_eps is None, wanted a number"),
        (drop_tensor("output_bias"), "lacks 1 tensors of the model, the first is output_bias"),
    ],
)
def test_a_folder_that_is_wrong_is_refused(tmp_path: Path, change: Callable[[Path], None], said: str) -> None:
    to_huggingface(make_whole(), tmp_path / "hf")
    (tmp_path / "hf" / "manifest.json").unlink()
    change(tmp_path / "hf")
    with pytest.raises(InputError) as error:
        from_huggingface(tmp_path / "hf", vocabulary_multiple=16)
    assert said in str(error.value)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    whole = make_whole()
    to_huggingface(whole, tmp_path / "hf")
    with pytest.raises(InputError, match="exists"):
        to_huggingface(whole, tmp_path / "hf")
    to_huggingface(whole, tmp_path / "hf", replace=True)
    other = replace(whole, vocabulary=vocabulary_of_genes(GENES[:80]))
    with pytest.raises(InputError, match="has 85 tokens, but the model 101"):
        to_huggingface(other, tmp_path / "other")
    assert not (tmp_path / "other").exists()
