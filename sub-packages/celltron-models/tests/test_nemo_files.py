"""The JSON files beside NeMo's weights."""

import json
from pathlib import Path

import pytest

from celltron.core import InputError
from celltron.models.geneformer import read_nemo_settings, read_nemo_vocabulary, vocabulary_of_genes

GELU = {"type": "pyref", "module": "torch._C._nn", "name": "gelu"}


def leaf(value: object) -> dict[str, object]:
    return {"type": "leaf", "value": value, "paths": ["<root>.model.config"]}


def config_of(**values: object) -> dict[str, object]:
    items = [
        [f"Attr(name='{name}')", value if isinstance(value, dict) else leaf(value)] for name, value in values.items()
    ]
    return {"type": {"type": "pyref", "module": "bionemo.geneformer.api", "name": "GeneformerConfig"}, "items": items}


def write_context(folder: Path, content: object) -> Path:
    (folder / "context").mkdir(exist_ok=True)
    (folder / "context" / "io.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_settings_are_read(tmp_path: Path) -> None:
    config = config_of(
        num_layers=6,
        hidden_size=256,
        num_attention_heads=4,
        seq_length=2048,
        attention_dropout=0.1,
        layernorm_epsilon=1e-12,
        bias_activation_fusion=False,
        activation_func=GELU,
        biobert_spec_option={"type": "ref", "key": "option_1"},
    )
    tokenizer = {"items": [["Attr(name='vocab')", {"type": "ref", "key": "dict_1"}]]}
    others = {"tokenizer_1": tokenizer, "list_1": [], "x": 3}
    context = {"root": {"type": "ref", "key": "trainer_context_1"}, "objects": {"config_1": config, **others}}
    assert read_nemo_settings(write_context(tmp_path, context)) == {
        "num_layers": 6,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "max_positions": 2048,
        "attention_dropout": 0.1,
        "norm_epsilon": 1e-12,
        "variant": "pre_norm_erf",
    }


def test_what_nemo_leaves_out_has_bionemo_s_default(tmp_path: Path) -> None:
    settings = read_nemo_settings(write_context(tmp_path, {"objects": {"a": config_of(num_attention_heads=12)}}))
    assert settings == {"num_attention_heads": 12, "variant": "pre_norm"}


def test_no_context_or_no_config_in_it_says_nothing(tmp_path: Path) -> None:
    assert read_nemo_settings(tmp_path) == {}
    assert read_nemo_settings(write_context(tmp_path, {"objects": {"a": config_of(lr=1e-4)}})) == {}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ([], "holds no JSON object"),
        ({"objects": 3}, "holds no objects"),
        (
            {"objects": {"a": config_of(num_attention_heads=4), "b": config_of(num_attention_heads=8)}},
            "holds two models that differ in num_attention_heads",
        ),
        (
            {"objects": {"a": config_of(activation_func=GELU | {"name": "relu"})}},
            "activation_func is 'relu', but BioNeMo's Geneformer has 'gelu'",
        ),
        (
            {"objects": {"a": config_of(num_attention_heads=4, qk_layernorm=True)}},
            "qk_layernorm is True, but BioNeMo's Geneformer has False",
        ),
        (
            {"objects": {"a": config_of(num_attention_heads=4, qk_layernorm=0)}},
            "qk_layernorm is 0, but BioNeMo's Geneformer has False",
        ),
        (
            {"objects": {"a": config_of(num_attention_heads=4, bias_activation_fusion="no")}},
            "bias_activation_fusion is 'no', wanted true or false",
        ),
    ],
)
def test_a_context_that_is_wrong_is_refused(tmp_path: Path, content: object, expected: str) -> None:
    with pytest.raises(InputError, match=r"^[^\n]+$") as error:
        read_nemo_settings(write_context(tmp_path, content))
    assert expected in str(error.value)


def test_vocabulary(tmp_path: Path) -> None:
    names = ["[CLS]", "[MASK]", "[PAD]", "[SEP]", "[UKW]", "ENSG2", "ENSG1"]
    path = tmp_path / "geneformer.vocab"
    path.write_text(json.dumps({"vocab": {name: place for place, name in enumerate(names)}, "gene_to_ens": {}}))
    vocabulary = read_nemo_vocabulary(path)
    assert vocabulary.tokens == ("<cls>", "<mask>", "<pad>", "<sep>", "<unknown>", "ENSG2", "ENSG1")
    assert (vocabulary.cls_id, vocabulary.mask_id, vocabulary.pad_id, vocabulary.eos_id) == (0, 1, 2, None)
    assert vocabulary == vocabulary_of_genes(("ENSG2", "ENSG1"))


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (None, "holds no 'vocab'"),
        ({"[CLS]": 0, "[MASK]": 2}, "must give each id from 0 to 1 to one token"),
        ({"[CLS]": 0, "[MASK]": True}, "must give each id from 0 to 1 to one token"),
        ({"<pad>": 0, "<mask>": 1, "ENSG1": 2}, "wanted [CLS], [MASK], [PAD], [SEP], [UKW]"),
        ({"[CLS]": 0, "[MASK]": 1, "[PAD]": 2, "[SEP]": 3, "[UKW]": 4}, "holds no gene"),
    ],
)
def test_a_vocabulary_that_is_wrong_is_refused(tmp_path: Path, ids: object, expected: str) -> None:
    path = tmp_path / "geneformer.vocab"
    path.write_text(json.dumps({} if ids is None else {"vocab": ids}))
    with pytest.raises(InputError) as error:
        read_nemo_vocabulary(path)
    assert expected in str(error.value)
