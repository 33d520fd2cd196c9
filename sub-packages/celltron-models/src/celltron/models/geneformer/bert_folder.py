"""Reading the files of a Hugging Face folder, BERT or pre-norm. It may come from anywhere, so everything is checked."""

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from celltron.core import MANIFEST_NAME, InputError, MedianTable, Vocabulary, build_config
from celltron.models.geneformer import foreign_json, prenorm_folder
from celltron.models.geneformer.bert_tensors import TIED_TO, list_bert_shapes
from celltron.models.geneformer.config import GeneformerConfig
from celltron.models.geneformer.foreign_json import is_number, read_json
from celltron.models.geneformer.model import NUM_TOKEN_TYPES

HUGGINGFACE_FORMAT = "celltron-huggingface"
CONFIG_NAME = "config.json"
TENSORS_NAME = "model.safetensors"
TOKENS_NAME = "token_dictionary.json"
MEDIANS_NAME = "gene_median_dictionary.json"
TOKENIZATION_NAME = "tokenization.json"

# Geneformer's fields and BertConfig's.
SIZES = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "max_positions": "max_position_embeddings",
}
SETTINGS = {
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "norm_epsilon": "layer_norm_eps",
    "initial_standard_deviation": "initializer_range",
}
# What makes a BertConfig Geneformer's.
ARCHITECTURE: dict[str, Any] = {
    "model_type": "bert",
    "hidden_act": "relu",
    "type_vocab_size": NUM_TOKEN_TYPES,
    "tie_word_embeddings": True,
    "is_decoder": False,
    "add_cross_attention": False,
}
# What transformers takes where config.json says nothing.
_DEFAULTS: dict[str, Any] = {
    "hidden_act": "gelu",
    "type_vocab_size": 2,
    "tie_word_embeddings": True,
    "is_decoder": False,
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
}
_WITH_HEAD = ("BertForMaskedLM", "BertForPreTraining")
_FLOATS = ("F64", "F32", "BF16", "F16")
# Other parts of Hugging Face's BERT, with no meaning for masked genes; position_ids is 0, 1, 2, ...
_UNUSED = ("bert.pooler.", "cls.seq_relationship.", "bert.embeddings.position_ids", "bert.embeddings.token_type_ids")


def check_against_manifest(folder: Path) -> None:
    """Compare the files that are read here with the checksums of an export; a folder without is not checked.

    The model card is not compared: it is there to be completed by hand.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return
    manifest = read_json(path)
    files = manifest.get("files")
    if manifest.get("format") != HUGGINGFACE_FORMAT or not isinstance(files, dict):
        return
    for name in (CONFIG_NAME, TENSORS_NAME, TOKENS_NAME, MEDIANS_NAME, TOKENIZATION_NAME):
        wanted = files[name].get("sha256") if isinstance(files.get(name), dict) else None
        if wanted is None:
            continue
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is missing, although {MANIFEST_NAME} lists it; copy the folder again")
        with (folder / name).open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != wanted:
            raise InputError(
                f"{folder / name} does not fit its checksum; copy the folder again, or delete {MANIFEST_NAME} where "
                "the file was changed on purpose"
            )


def read_config(folder: Path, vocabulary_multiple: int) -> tuple[GeneformerConfig, int, int]:
    """The shape, the vocabulary's size and the id of `<pad>`; every architecture but Geneformer's is refused."""
    path = folder / CONFIG_NAME
    values = read_json(path)
    if values.get("model_type") == prenorm_folder.MODEL_TYPE:
        fields: dict[str, Any] = {"variant": prenorm_folder.read_variant(values, path)}
        with_head = prenorm_folder.WITH_HEAD
    else:
        values = _DEFAULTS | values
        _check_bert(values, path)
        fields, with_head = {"variant": "post_norm"}, _WITH_HEAD
    architectures = values.get("architectures")
    if isinstance(architectures, list) and not any(name in with_head for name in architectures):
        raise InputError(
            f"{path}: architectures is {architectures!r}, wanted {with_head[0]}; import the pretrained model, which "
            "has the head that predicts masked genes"
        )
    fields |= {ours: _whole_number(values, theirs, path) for ours, theirs in SIZES.items()}
    for ours, theirs in SETTINGS.items():
        value = values.get(theirs)
        if not is_number(value):
            raise InputError(f"{path}: {theirs} is {value!r:.60}, wanted a number; mend that value")
        fields[ours] = float(value)
    config = build_config(GeneformerConfig, {**fields, "vocabulary_multiple": vocabulary_multiple}, where=str(path))
    pad_id = values.get("pad_token_id")
    if type(pad_id) is not int:
        raise InputError(f"{path}: pad_token_id is {pad_id!r}, wanted the id of <pad>; mend that value")
    return config, _whole_number(values, "vocab_size", path), pad_id


def _check_bert(values: dict[str, Any], path: Path) -> None:
    for key, wanted in (ARCHITECTURE | {"position_embedding_type": "absolute"}).items():
        found = values.get(key)
        if type(found) is not type(wanted) or found != wanted:
            raise InputError(
                f"{path}: {key} is {found!r}, but the BERT of Geneformer has {wanted!r}; only that can be imported"
            )


def read_tensors(
    folder: Path, config: GeneformerConfig, num_tokens: int
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """The model's tensors, each checked, and the names of others that have no meaning here, such as a pooler's."""
    path = folder / TENSORS_NAME
    if not path.is_file():
        raise InputError(_explain_missing_tensors(folder))
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if config.num_layers > len(names):
                raise InputError(
                    f"{path} holds {len(names)} tensors, too few for the {config.num_layers} layers of {CONFIG_NAME}; "
                    "use an undamaged folder"
                )
            if config.is_pre_norm:
                shapes, tied = prenorm_folder.list_prenorm_shapes(config, num_tokens), {}
            else:
                shapes = list_bert_shapes(config, num_tokens)
                tied = {theirs: shapes[name] for theirs, name in TIED_TO.items() if theirs in names}
            # A file may hold a tied tensor under its second name only.
            needed = set(shapes) - {TIED_TO[name] for name in tied}
            unused = _check_names(path, names, needed=needed, known=set(shapes) | set(tied))
            shapes |= tied
            tensors = {name: _take(path, file, name, shapes[name]) for name in sorted(names & set(shapes))}
    except SafetensorError as error:
        raise InputError(f"{path} is not readable as safetensors ({error}); use an undamaged folder") from None
    for second, first in TIED_TO.items():
        if second in tensors:
            copy = tensors.pop(second)
            if not torch.equal(tensors.setdefault(first, copy), copy):
                raise InputError(
                    f"{path}: {second} differs from {first}, but Geneformer's head is tied to its embedding; such a "
                    "model cannot be imported"
                )
    return tensors, unused


def read_vocabulary(folder: Path, num_tokens: int) -> Vocabulary | None:
    """The tokens in the order of their ids; None without a token dictionary."""
    path = folder / TOKENS_NAME
    if not path.is_file():
        return None
    ids = read_json(path)
    by_id = {place: token for token, place in ids.items() if type(place) is int}
    if len(ids) != num_tokens or sorted(by_id) != list(range(num_tokens)):
        raise InputError(
            f"{path} must give each id from 0 to {num_tokens - 1} to one token, as vocab_size in {CONFIG_NAME} is "
            f"{num_tokens}, but has {len(ids)} tokens with {len(by_id)} ids; use the dictionary of this model"
        )
    try:
        return Vocabulary([by_id[place] for place in range(num_tokens)])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def read_medians(folder: Path) -> MedianTable | None:
    """The genes' medians; None without their file."""
    path = folder / MEDIANS_NAME
    return foreign_json.read_medians(path) if path.is_file() else None


def read_max_length(folder: Path, max_positions: int) -> int:
    """The longest cell, in tokens; all positions where the folder does not say."""
    path = folder / TOKENIZATION_NAME
    if not path.is_file():
        return max_positions
    max_length = _whole_number(read_json(path), "max_length", path)
    if max_length > max_positions:
        raise InputError(f"{path}: max_length is {max_length}, more than the {max_positions} positions; lower it")
    return max_length


def _whole_number(values: dict[str, Any], key: str, path: Path) -> int:
    value = values.get(key)
    if type(value) is not int or value < 1:
        raise InputError(f"{path}: {key} is {value!r}, wanted a whole number above 0; mend that value")
    return value


def _explain_missing_tensors(folder: Path) -> str:
    if (folder / f"{TENSORS_NAME}.index.json").is_file():
        return (
            f"{folder} splits its tensors over several files; join them: load it with transformers and call "
            "save_pretrained(OTHER_FOLDER, max_shard_size='1TB')"
        )
    if list(folder.glob("*.bin")):
        return (
            f"{folder} holds its tensors as pickle (.bin), which can run code and is not read here; where you trust it "
            "convert it, with transformers.BertForMaskedLM.from_pretrained(FOLDER).save_pretrained(OTHER_FOLDER)"
        )
    return f"{folder / TENSORS_NAME} is missing; give a folder that transformers wrote with save_pretrained"


def _check_names(
    path: Path, names: Collection[str], *, needed: Collection[str], known: Collection[str]
) -> tuple[str, ...]:
    """Names that have no meaning here; what is missing or of another architecture is refused."""
    missing = sorted(set(needed) - set(names))
    if missing:
        raise InputError(
            f"{path} lacks {len(missing)} tensors of the model, the first is {missing[0]}; use an undamaged folder of "
            "a model with the head that predicts masked genes"
        )
    others = sorted(set(names) - set(known))
    strange = [name for name in others if not name.startswith(_UNUSED)]
    if strange:
        raise InputError(
            f"{path} holds {len(strange)} tensors that the model of {CONFIG_NAME} does not have, the first is "
            f"{strange[0]}; use a folder whose files belong together"
        )
    return tuple(others)


def _take(path: Path, file: Any, name: str, wanted: tuple[int, ...]) -> torch.Tensor:
    """One tensor, once its shape and dtype are checked; its values must be finite."""
    entry = file.get_slice(name)
    shape, dtype = tuple(entry.get_shape()), entry.get_dtype()
    if shape != wanted:
        raise InputError(
            f"{path}: {name} has shape {shape}, but {CONFIG_NAME} makes it {wanted}; use files that belong together"
        )
    if dtype not in _FLOATS:
        raise InputError(f"{path}: {name} is {dtype}, wanted one of {', '.join(_FLOATS)}; import the model unquantised")
    tensor: torch.Tensor = file.get_tensor(name)
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{path}: {name} holds values that are no finite numbers; use another model")
    return tensor
