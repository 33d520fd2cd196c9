"""Hugging Face folders that are damaged, of another architecture, or crafted: each refused in one sentence."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from celltron.core import InputError, Vocabulary
from celltron.models.geneformer import WholeGeneformer, from_huggingface, to_huggingface
from celltron.models.geneformer.bert_tensors import from_bert_tensors, list_bert_shapes

TOKENS = ("<pad>", "<mask>", *(f"ENSG{number:011d}" for number in range(28)))
LAYER = "bert.encoder.layer.1"


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    from celltron.models.geneformer import GeneformerConfig

    config = GeneformerConfig(
        num_layers=2, hidden_size=8, ffn_hidden_size=12, num_attention_heads=2, max_positions=10, vocabulary_multiple=16
    )
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) for name, shape in list_bert_shapes(config, len(TOKENS)).items()
    }


@pytest.fixture
def folder(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A folder such as transformers writes, with a vocabulary and medians, and no manifest."""
    folder = tmp_path / "hf"
    folder.mkdir()
    config = {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "hidden_act": "relu",
        "vocab_size": len(TOKENS),
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "intermediate_size": 12,
        "num_attention_heads": 2,
        "max_position_embeddings": 10,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    }
    write_json(folder / "config.json", config)
    write_json(folder / "token_dictionary.json", {token: place for place, token in enumerate(TOKENS)})
    write_json(folder / "gene_median_dictionary.json", {TOKENS[2]: 1.5, TOKENS[4]: 2})
    write_json(folder / "tokenization.json", {"max_length": 9})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def change_json(name: str, **changes: object) -> Callable[[Path], None]:
    """Set keys of a JSON file; `...` removes one."""

    def change(folder: Path) -> None:
        values = {**json.loads((folder / name).read_text()), **changes}
        write_json(folder / name, {key: value for key, value in values.items() if value is not ...})

    return change


def change_tensors(**changes: Callable[[torch.Tensor], torch.Tensor] | torch.Tensor | None) -> Callable[[Path], None]:
    """Replace, add or (None) remove tensors; `__` stands for a dot."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        for key, value in changes.items():
            name = key.replace("__", ".")
            if value is None:
                del tensors[name]
            else:
                tensors[name] = value(tensors[name]) if callable(value) else value
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def overwrite(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def cut(name: str, share: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return change


def replace_by_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def split_tensors(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    write_json(folder / "model.safetensors.index.json", {})


def set_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[0] = value
        return tensor

    return change


QUERY = "bert__encoder__layer__1__attention__self__query__weight"
TOKEN_FILE, MEDIAN_FILE = "token_dictionary.json", "gene_median_dictionary.json"
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "config is no JSON": (overwrite("config.json", b'{"model_type": "bert"'), "config.json is not readable as JSON"),
    "config is no object": (overwrite("config.json", b"[1]"), "holds no JSON object"),
    "config is binary": (overwrite("config.json", b"\xff\xfe\x00"), "not readable as JSON"),
    "config nests without end": (overwrite("config.json", b"[" * 100_000), "not readable as JSON"),
    "another model": (change_json("config.json", model_type="megatron-bert"), "model_type is 'megatron-bert'"),
    "no model named": (change_json("config.json", model_type=...), "model_type is None"),
    "gelu": (change_json("config.json", hidden_act="gelu"), "hidden_act is 'gelu'"),
    "activation left to the default": (change_json("config.json", hidden_act=...), "hidden_act is 'gelu'"),
    "relative positions": (
        change_json("config.json", position_embedding_type="relative_key"),
        "position_embedding_type is 'relative_key'",
    ),
    "one token type": (change_json("config.json", type_vocab_size=1), "type_vocab_size is 1"),
    "untied": (change_json("config.json", tie_word_embeddings=False), "tie_word_embeddings is False"),
    "decoder": (change_json("config.json", is_decoder=True), "is_decoder is True"),
    "decoder as a number": (change_json("config.json", is_decoder=1), "is_decoder is 1"),
    "another head": (change_json("config.json", architectures=["BertForSequenceClassification"]), "architectures"),
    "heads do not divide": (change_json("config.json", num_attention_heads=3), "no multiple of model.num_attention"),
    "size is text": (change_json("config.json", hidden_size="8"), "hidden_size is '8'"),
    "size is missing": (change_json("config.json", intermediate_size=...), "intermediate_size is None"),
    "size is true": (change_json("config.json", num_hidden_layers=True), "num_hidden_layers is True"),
    "dropout of one": (change_json("config.json", hidden_dropout_prob=1.0), "hidden_dropout is 1.0"),
    "epsilon of zero": (change_json("config.json", layer_norm_eps=0), "norm_epsilon is 0.0"),
    "epsilon is no number": (change_json("config.json", layer_norm_eps=float("nan")), "layer_norm_eps is nan"),
    "epsilon beyond numbers": (change_json("config.json", layer_norm_eps=10**400), "layer_norm_eps is 1000"),
    "no pad id": (change_json("config.json", pad_token_id=None), "pad_token_id is None"),
    "another pad id": (change_json("config.json", pad_token_id=1), "pad_token_id in config.json is 1"),
    "more layers than tensors": (change_json("config.json", num_hidden_layers=10**9), "too few for the 1000000000"),
    "one layer too many": (change_json("config.json", num_hidden_layers=3), "lacks 16 tensors"),
    "one layer too few": (change_json("config.json", num_hidden_layers=1), "does not have, the first is bert.encoder"),
    "more tokens than rows": (change_json("config.json", vocab_size=31), "token_dictionary.json must give each id"),
    "more positions than rows": (change_json("config.json", max_position_embeddings=11), "has shape (10, 8)"),
    "no tensors": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
    "pickle": (replace_by_pickle, "as pickle (.bin), which can run code and is not read here"),
    "tensors in parts": (split_tensors, "max_shard_size"),
    "cut tensors": (cut("model.safetensors", 0.7), "not readable as safetensors"),
    "empty tensors": (cut("model.safetensors", 0.0), "not readable as safetensors"),
    "pickle named as tensors": (overwrite("model.safetensors", b"\x80\x04." * 40), "not readable as safetensors"),
    "a tensor is missing": (change_tensors(**{QUERY: None}), f"the first is {LAYER}.attention.self.query.weight"),
    "a bias is missing": (change_tensors(cls__predictions__bias=None), "the first is cls.predictions.bias"),
    "a tensor is turned": (
        change_tensors(bert__encoder__layer__1__output__dense__weight=lambda tensor: tensor.T.contiguous()),
        "output.dense.weight has shape (12, 8), but config.json makes it (8, 12)",
    ),
    "a tensor is of integers": (change_tensors(**{QUERY: lambda tensor: tensor.to(torch.int8)}), "query.weight is I8"),
    "a tensor holds infinity": (change_tensors(**{QUERY: set_value(float("inf"))}), "no finite numbers"),
    "a tensor holds no number": (change_tensors(cls__predictions__bias=set_value(float("nan"))), "no finite numbers"),
    "an unknown tensor": (
        change_tensors(bert__encoder__layer__0__attention__self__distance_embedding__weight=torch.zeros(3, 4)),
        "distance_embedding",
    ),
    "another decoder": (
        change_tensors(cls__predictions__decoder__weight=torch.zeros(30, 8)),
        "cls.predictions.decoder.weight differs from bert.embeddings.word_embeddings.weight",
    ),
    "a decoder of another size": (change_tensors(cls__predictions__decoder__weight=torch.zeros(31, 8)), "(31, 8)"),
    "an id twice": (change_json(TOKEN_FILE, **{TOKENS[5]: 4}), "must give each id from 0 to 29"),
    "an id too many": (change_json(TOKEN_FILE, more=30), "has 31 tokens with 31 ids"),
    "an id is text": (change_json(TOKEN_FILE, **{TOKENS[5]: "5"}), "must give each id"),
    "an id is true": (change_json(TOKEN_FILE, **{TOKENS[1]: True}), "must give each id"),
    "no mask": (change_json(TOKEN_FILE, **{"<mask>": ..., "<eos>": 1}), "holds no <mask>"),
    "a median of zero": (change_json(MEDIAN_FILE, **{TOKENS[2]: 0}), "above zero"),
    "a median is text": (change_json(MEDIAN_FILE, **{TOKENS[2]: "1"}), "wanted a number"),
    "a median beyond numbers": (change_json(MEDIAN_FILE, **{TOKENS[2]: 10**400}), "wanted a number"),
    "a longest cell beyond the positions": (change_json("tokenization.json", max_length=11), "more than the 10"),
    "a longest cell of zero": (change_json("tokenization.json", max_length=0), "max_length is 0"),
}


def test_the_undamaged_folder_is_read(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    whole = from_huggingface(folder)
    assert whole.vocabulary == Vocabulary(TOKENS) and whole.max_length == 9 and whole.num_tokens == 30
    assert whole.medians is not None and dict(zip(whole.medians.genes, whole.medians.values, strict=True)) == {
        TOKENS[2]: 1.5,
        TOKENS[4]: 2.0,
    }
    expected = from_bert_tensors(whole.config, tensors)
    assert all(torch.equal(whole.parameters[name], expected[name]) for name in expected)
    assert whole.unused_tensors == ()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_in_one_sentence(folder: Path, fault: str) -> None:
    spoil, expected = FAULTS[fault]
    spoil(folder)
    with pytest.raises(InputError) as error:
        from_huggingface(folder)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nowhere", "config.json"])
def test_a_path_that_is_no_folder_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(InputError, match="is no folder"):
        from_huggingface(folder / name)


def test_a_pickle_beside_the_tensors_is_left_alone(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert from_huggingface(folder).num_tokens == 30


def test_tied_tensors_may_stand_under_either_name_or_both(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    wanted = from_huggingface(folder).parameters
    both = {
        "cls__predictions__decoder__weight": tensors["bert.embeddings.word_embeddings.weight"].clone(),
        "cls__predictions__decoder__bias": tensors["cls.predictions.bias"].clone(),
    }
    change_tensors(**both)(folder)
    found = from_huggingface(folder)
    assert all(torch.equal(found.parameters[name], wanted[name]) for name in wanted)
    change_tensors(cls__predictions__bias=None, bert__embeddings__word_embeddings__weight=None)(folder)
    found = from_huggingface(folder)
    assert all(torch.equal(found.parameters[name], wanted[name]) for name in wanted)
    assert found.unused_tensors == ()


def test_parts_of_bert_that_predict_no_genes_are_named(folder: Path) -> None:
    change_tensors(
        bert__pooler__dense__weight=torch.zeros(8, 8),
        bert__embeddings__position_ids=torch.arange(10)[None],
        cls__seq_relationship__bias=torch.zeros(2),
    )(folder)
    assert from_huggingface(folder).unused_tensors == (
        "bert.embeddings.position_ids",
        "bert.pooler.dense.weight",
        "cls.seq_relationship.bias",
    )


def test_half_precision_is_kept_as_it_is(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    change_tensors(**{name.replace(".", "__"): tensor.half() for name, tensor in tensors.items()})(folder)
    assert {tensor.dtype for tensor in from_huggingface(folder).parameters.values()} == {torch.float16}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", TOKEN_FILE, MEDIAN_FILE, "tokenization.json"])
@pytest.mark.parametrize("is_missing", [False, True], ids=["flipped", "missing"])
def test_damage_to_an_export_is_found(folder: Path, tmp_path: Path, name: str, is_missing: bool) -> None:
    read: WholeGeneformer = from_huggingface(folder)
    to_huggingface(read, tmp_path / "exported")
    path = tmp_path / "exported" / name
    if is_missing:
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
    with pytest.raises(InputError, match="is missing" if is_missing else "does not fit its checksum") as error:
        from_huggingface(tmp_path / "exported")
    assert str(path) in str(error.value)
