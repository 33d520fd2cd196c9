"""From checkpoints that megatron-core's own `BertModel` wrote in NeMo 2's layout to celltron and transformers."""

import gzip
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
import transformers.dynamic_module_utils
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from transformers import AutoModel, AutoModelForMaskedLM

from celltron.core import InputError, run_command, verify_artefact
from celltron.recipes import geneformer_import_nemo
from celltron.train.checkpoint import verify_checkpoint

PROGRAM = Path(__file__).with_name("write_nemo.py")
IN_FLOAT32 = ("joined_fused", "apart_exact")
IN_ALL = (*IN_FLOAT32, "joined_bf16")
NUM_TOKENS = 101


@pytest.fixture(scope="module")
def folder(warm_python: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the program wrote; it must have come to its end."""
    folder = tmp_path_factory.mktemp("nemo")
    ended = warm_python.run(PROGRAM, folder)
    assert ended.code == 0 and (folder / "done").is_file(), (ended.stdout + ended.stderr)[-4000:]
    return folder


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Load a folder with its own modelling file, whose copy transformers keeps elsewhere than at home."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))

    def load(folder: Path, auto_class: Any = AutoModelForMaskedLM) -> Any:
        return auto_class.from_pretrained(folder, trust_remote_code=True, local_files_only=True).eval()

    return load


@pytest.mark.parametrize("case", IN_ALL)
def test_celltron_gives_the_logits_of_bert_model(folder: Path, case: str) -> None:
    cells, logits = load_file(folder / "cells.safetensors"), load_file(folder / case / "logits.safetensors")
    is_token = ~cells["is_padding"].flatten()
    assert logits["bert"].dtype is torch.float64 and logits["bert"].std() > 1.0
    # Megatron's fused GELU has sqrt(2/pi) to eight digits.
    tolerance = 1e-10 if case == "apart_exact" else 1e-6
    torch.testing.assert_close(logits["ours"][is_token], logits["bert"][is_token], rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", IN_FLOAT32)
def test_transformers_gives_the_logits_of_bert_model(folder: Path, load: Callable[..., Any], case: str) -> None:
    cells, logits = load_file(folder / "cells.safetensors"), load_file(folder / case / "logits.safetensors")
    tokens_BS, is_token_BS = cells["tokens"], ~cells["is_padding"]
    model = load(folder / case / "huggingface")
    with torch.no_grad():
        output = model(input_ids=tokens_BS, attention_mask=is_token_BS.long(), output_hidden_states=True)
    is_token_M = is_token_BS.flatten()
    found_MV = output.logits.flatten(0, 1)
    assert found_MV.shape[1] == NUM_TOKENS
    torch.testing.assert_close(found_MV[is_token_M].double(), logits["bert"][is_token_M], rtol=0, atol=2e-5)
    encoder = load(folder / case / "huggingface", AutoModel)
    with torch.no_grad():
        hidden_BSD = encoder(input_ids=tokens_BS, attention_mask=is_token_BS.long()).last_hidden_state
    assert torch.equal(hidden_BSD, output.hidden_states[-1])


def test_the_wrong_gelu_would_be_seen(folder: Path, load: Callable[..., Any]) -> None:
    cells, logits = load_file(folder / "cells.safetensors"), load_file(folder / "joined_fused" / "logits.safetensors")
    model = load(folder / "joined_fused" / "huggingface")
    for layer in model.model.encoder.layers:
        layer.mlp.approximate = "none"
    with torch.no_grad():
        found = model(input_ids=cells["tokens"], attention_mask=(~cells["is_padding"]).long()).logits.flatten(0, 1)
    is_token = ~cells["is_padding"].flatten()
    assert (found - logits["bert"])[is_token].abs().max() > 1e-4


@pytest.mark.parametrize("case", IN_ALL)
def test_every_bit_of_every_weight_arrives(folder: Path, case: str) -> None:
    wanted = load_file(folder / case / "parameters.safetensors")
    found = load_file(folder / case / "huggingface" / "model.safetensors")
    names = {
        name: name.replace("lm_head.", "head.").replace(".layer_norm.", ".norm.")
        if name.startswith("lm_head.")
        else f"model.{name}"
        for name in wanted
    }
    names["output_layer.bias"] = "output_bias"
    assert found.keys() == set(names.values())
    for name, exported in names.items():
        cut = wanted[name][:NUM_TOKENS] if wanted[name].shape[0] == 112 else wanted[name]
        assert found[exported].dtype == cut.dtype and torch.equal(found[exported], cut), name


@pytest.mark.parametrize("case", IN_ALL)
def test_nothing_in_the_folder_was_unpickled(folder: Path, case: str) -> None:
    index = read_index(folder / case / "nemo")
    assert any("_extra_state" in name for name in index.state_dict_metadata)
    assert not (folder / case / "trace").exists()


def test_what_travels_with_the_model(folder: Path) -> None:
    case = folder / "joined_fused"
    verify_checkpoint(case / "checkpoint")
    verify_artefact(case / "huggingface")
    model = json.loads((case / "checkpoint" / "model.json").read_text())
    assert (model["num_tokens"], model["max_length"]) == (NUM_TOKENS, 16)
    assert model["config"]["variant"] == "pre_norm" and model["config"]["num_attention_heads"] == 4
    other = json.loads((folder / "apart_exact" / "checkpoint" / "model.json").read_text())
    assert other["config"]["variant"] == "pre_norm_erf"
    config = json.loads((case / "huggingface" / "config.json").read_text())
    assert config["vocab_size"] == NUM_TOKENS and config["pad_token_id"] == 2
    tokens = json.loads((case / "huggingface" / "token_dictionary.json").read_text())
    assert {token: tokens[token] for token in ("<cls>", "<mask>", "<pad>")} == {"<cls>": 0, "<mask>": 1, "<pad>": 2}
    assert tokens["ENSG00000000000"] == 5
    medians = json.loads((case / "huggingface" / "gene_median_dictionary.json").read_text())
    assert medians["ENSG00000000007"] == 1.5


def test_weights_without_a_context(folder: Path) -> None:
    case = folder / "joined_fused"
    for name in ("model.safetensors", "config.json", "token_dictionary.json"):
        assert (folder / "bare.hf" / name).read_bytes() == (case / "huggingface" / name).read_bytes(), name
    assert (folder / "bare" / "model.json").read_text() == (case / "checkpoint" / "model.json").read_text()
    assert not (folder / "bare.hf" / "gene_median_dictionary.json").exists()


def test_the_code_on_the_card_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the folder holds the medians, and where the card asks for them."""
    monkeypatch.chdir(tmp_path)
    genes = [f"ENSG{number:011d}" for number in range(12)]
    counts_CG = np.random.default_rng(1).poisson(1.5, size=(3, 12)).astype(np.float32)
    anndata.AnnData(counts_CG, var=pd.DataFrame(index=genes)).write_h5ad("cells.h5ad")
    shutil.copy(folder / "joined_fused" / "medians.json", "medians.json")
    values_CG = counts_CG / np.array([json.loads(Path("medians.json").read_text())[gene] for gene in genes])
    wanted = [[0, *(5 + gene for gene in np.argsort(-row) if row[gene] > 0)] for row in values_CG]
    for name in ("joined_fused/huggingface", "bare.hf"):
        _, code = re.findall(r"```python\n(.*?)```", (folder / name / "README.md").read_text(), re.DOTALL)
        found: dict[str, Any] = {}
        exec(code.replace("path/to/this/folder", str(folder / name)), found)
        assert found["tokens"].tolist() == [token for cell in wanted for token in cell], name
        assert found["lengths"].tolist() == [len(cell) for cell in wanted]
        shutil.rmtree("cells.store")


def test_no_run_is_resumed_from_an_import(
    folder: Path, celltron: Callable[..., Any], tiny_config: Path, tiny_h5ad: Path, tmp_path: Path
) -> None:
    arguments = ["--config", tiny_config, "--data", tiny_h5ad, "--out", tmp_path / "runs" / "first"]
    ended = celltron("train", *arguments, "--resume", folder / "joined_fused" / "checkpoint")
    assert ended.code == 2
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("celltron: error: ")]
    assert "checkpoint holds a model without an optimizer's state" in line and "give a checkpoint of a run" in line
    assert list(tmp_path.iterdir()) == [], "neither cells nor folders"


@pytest.mark.parametrize("suffix", [".tsv", ".tsv.gz"])
def test_a_table_must_have_the_special_tokens_of_bionemo(tmp_path: Path, suffix: str) -> None:
    config = geneformer_import_nemo.Config(folder="a", out="b", vocabulary=str(tmp_path / f"table{suffix}"))
    write_table(config.vocabulary, ["<cls>", "<mask>", "<pad>", "<sep>", "<unknown>", "ENSG2", "ENSG1"])
    vocabulary, medians = geneformer_import_nemo.read_vocabulary(config)
    assert vocabulary.genes == ("ENSG2", "ENSG1") and vocabulary.first_gene_id == 5
    assert medians is not None and dict(zip(medians.genes, medians.values, strict=True)) == {"ENSG2": 1.5, "ENSG1": 1.5}
    for specials in (
        ["<pad>", "<mask>"],
        ["<pad>", "<mask>", "<cls>", "<sep>", "<unknown>"],
        ["<cls>", "<mask>", "<pad>", "<sep>", "<unknown>", "<eos>"],
    ):
        write_table(config.vocabulary, [*specials, "ENSG2", "ENSG1"])
        with pytest.raises(InputError, match=r"^[^\n]+$") as error:
            geneformer_import_nemo.read_vocabulary(config)
        expected = f"starts with {', '.join(specials)}, wanted <cls>, <mask>, <pad>, <sep>, <unknown>; use a table"
        assert expected in str(error.value)


def write_table(path: str, tokens: list[str]) -> None:
    rows = [f"{token}\t{place}\t{'' if token[0] == '<' else 1.5}" for place, token in enumerate(tokens)]
    content = "\n".join(["ensembl_id\ttoken_id\tmedian", *rows, ""]).encode()
    Path(path).write_bytes(gzip.compress(content) if path.endswith(".gz") else content)


def read_index(nemo: Path) -> Metadata:
    with (nemo / "weights" / ".metadata").open("rb") as stream:
        index = pickle.load(stream)
    assert isinstance(index, Metadata)
    return index


def change_index(nemo: Path, change: Callable[[Metadata], Any]) -> None:
    index = read_index(nemo)
    changed = change(index)
    (nemo / "weights" / ".metadata").write_bytes(pickle.dumps(index if changed is None else changed))


def change_context(nemo: Path, name: str, value: object) -> None:
    path = nemo / "context" / "io.json"
    content = json.loads(path.read_text())
    items = content["objects"]["geneformer_config_1"]["items"]
    items[:] = [item for item in items if item[0] != f"Attr(name='{name}')"]
    items.append([f"Attr(name='{name}')", {"type": "leaf", "value": value}])
    path.write_text(json.dumps(content))


def copy_entry(index: Metadata, name: str, other: str) -> None:
    index.state_dict_metadata[other] = index.state_dict_metadata[name]


def resize(index: Metadata, name: str, *shape: int) -> None:
    entry = index.state_dict_metadata[name]
    assert isinstance(entry, TensorStorageMetadata)
    entry.size = torch.Size(shape)


def spoil_shard(nemo: Path) -> None:
    for path in (nemo / "weights").glob("*.distcp"):
        path.write_bytes(bytes(path.stat().st_size))


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch trace",)


FC1 = "module.encoder.layers.mlp.linear_fc1.weight"
DENSE_BIAS = "module.lm_head.dense.bias"
POSITIONS = "module.embedding.position_embeddings.weight"
TOKEN_TYPES = "module.embedding.tokentype_embeddings.weight"
SIX_TOKENS = {"[CLS]": 0, "[MASK]": 1, "[PAD]": 2, "[SEP]": 3, "[UKW]": 4, "ENSG1": 5}
SPOILERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda nemo: shutil.rmtree(nemo / "weights"), "holds no folder weights"),
    "no index": (lambda nemo: (nemo / "weights" / ".metadata").unlink(), "has no .metadata"),
    "no format": (lambda nemo: (nemo / "weights" / "metadata.json").unlink(), "has no metadata.json"),
    "zarr": (
        lambda nemo: (nemo / "weights" / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
        "sharded_backend is 'zarr', wanted 'torch_dist'",
    ),
    "missing key": (
        lambda nemo: change_index(nemo, lambda index: index.state_dict_metadata.pop(FC1) and None),
        "lacks the tensor module.encoder.layers.0.mlp.linear_fc1.weight",
    ),
    "another missing key": (
        lambda nemo: change_index(nemo, lambda index: index.state_dict_metadata.pop(DENSE_BIAS) and None),
        "lacks 1 tensors of the model, the first is module.lm_head.dense.bias",
    ),
    "strange key": (
        lambda nemo: change_index(nemo, lambda index: copy_entry(index, DENSE_BIAS, TOKEN_TYPES)),
        "the first is module.embedding.tokentype_embeddings.weight; only that model can be imported",
    ),
    "wrong shape": (
        lambda nemo: change_index(nemo, lambda index: resize(index, DENSE_BIAS, 25)),
        "module.lm_head.dense.bias has shape (25,), but the other tensors make it (24,)",
    ),
    "enormous": (
        lambda nemo: change_index(nemo, lambda index: resize(index, POSITIONS, 10**12, 24)),
        "the tensors have max_positions 1000000000000, but the config beside them 16",
    ),
    "foreign class": (lambda nemo: change_index(nemo, lambda index: RunsCode()), "it names posix.system"),
    "foreign class inside": (
        lambda nemo: change_index(nemo, lambda index: setattr(index, "planner_data", RunsCode())),
        "it names posix.system",
    ),
    "shards of zeros": (spoil_shard, "holds damaged shards"),
    "other activation": (
        lambda nemo: change_context(nemo, "activation_func", "relu"),
        "activation_func is 'relu', but BioNeMo's Geneformer has 'gelu'",
    ),
    "rotary": (
        lambda nemo: change_context(nemo, "position_embedding_type", "rope"),
        "position_embedding_type is 'rope', but BioNeMo's Geneformer has 'learned_absolute'",
    ),
    "other layers": (
        lambda nemo: change_context(nemo, "num_layers", 4),
        "the tensors have num_layers 3, but the config beside them 4",
    ),
    "no heads": (lambda nemo: shutil.rmtree(nemo / "context"), "how many attention heads the model has; give --heads"),
    "context no JSON": (lambda nemo: (nemo / "context" / "io.json").write_text("{"), "not readable as JSON"),
    "other vocabulary": (
        lambda nemo: (nemo.parent / "vocab").write_text(json.dumps({"vocab": SIX_TOKENS})),
        "has 6 tokens, but the model in",
    ),
}


@pytest.mark.parametrize("fault", SPOILERS)
def test_a_checkpoint_that_is_wrong_or_damaged_is_refused_and_leaves_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "joined_fused" / "nemo", tmp_path / "nemo")
    shutil.copy(folder / "joined_fused" / "geneformer.vocab", tmp_path / "vocab")
    spoil, expected = SPOILERS[fault]
    spoil(tmp_path / "nemo")
    before = sorted(tmp_path.rglob("*"))
    words = ["--folder", "nemo", "--out", "out", "--vocabulary", "vocab", "vocabulary_multiple=16"]
    assert run_command(geneformer_import_nemo.main, words) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1, error
    assert sorted(tmp_path.rglob("*")) == before, "neither an output nor the trace of code that ran"


IMPORT = ["--folder", "{nemo}", "--out", "b", "--vocabulary", "{vocab}"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--folder", "a"], "out is empty"),
        (["--out", "a"], "folder is empty"),
        (["--folder", "a", "--out", "b"], "vocabulary is empty"),
        ([*IMPORT, "--heads", "3"], "--heads is 3, but the config"),
        (IMPORT, "has 112 rows, no multiple of 128"),
        (
            ["--folder", "{nemo}", "--out", "b", "--vocabulary", "gc30M", "vocabulary_multiple=16"],
            "vocabulary gc30M has 25,429 tokens, but the model in",
        ),
        (["--folder", "{nemo}", "--out", "{nemo}", "--vocabulary", "{vocab}"], "exists already; choose another --out"),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"nemo": folder / "joined_fused" / "nemo", "vocab": folder / "joined_fused" / "geneformer.vocab"}
    assert run_command(geneformer_import_nemo.main, [word.format(**places) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1, error
    assert not any(tmp_path.iterdir())
