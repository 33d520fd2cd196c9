"""The JSON files beside NeMo 2's `weights/`: the config in `context/io.json`, and BioNeMo's vocabulary.

`io.json` is Fiddle's: an object is a list of items, each the text of a path element (`Attr(name='num_layers')`) and a
value; a plain value is `{"type": "leaf", "value": ...}`, a function `{"type": "pyref", "module": ..., "name": ...}`.
NeMo records the arguments that the config was made with, and leaves out those that had their defaults. The files may
come from anywhere, so all that is read is checked; no class that they name is loaded.
"""

import re
from pathlib import Path
from typing import Any

from celltron.core import CLS, MASK, PAD, InputError, Vocabulary
from celltron.models.geneformer.foreign_json import read_json

CONTEXT_NAME = "context/io.json"
# BioNeMo's special tokens in the order of their ids, and ours.
SPECIALS = {"[CLS]": CLS, "[MASK]": MASK, "[PAD]": PAD, "[SEP]": "<sep>", "[UKW]": "<unknown>"}

# NeMo's settings and ours.
_TAKEN = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "seq_length": "max_positions",
    "hidden_dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "layernorm_epsilon": "norm_epsilon",
    "init_method_std": "initial_standard_deviation",
}
# What makes a config Geneformer's; a function is told by its name.
_ARCHITECTURE: dict[str, Any] = {
    "activation_func": "gelu",
    "position_embedding_type": "learned_absolute",
    "share_embeddings_and_output_weights": True,
    "apply_residual_connection_post_layernorm": False,
    "qk_layernorm": False,
    "layernorm_zero_centered_gamma": False,
    "gated_linear_unit": False,
    "add_bias_linear": True,
    "normalization": "LayerNorm",
}
# By these a model's config is told from the other objects.
_OF_A_MODEL = {"num_layers", "hidden_size", "num_attention_heads", "activation_func"}
_ATTRIBUTE = re.compile(r"name='(\w+)'")


def read_nemo_settings(folder: Path) -> dict[str, Any]:
    """The settings that `context/io.json` gives, under the names of `GeneformerConfig`; empty without the file.

    Args:
        folder: The checkpoint: what holds `context/`.

    Raises:
        InputError: the file is damaged, holds several configs that differ, or describes another architecture.
    """
    path = folder / CONTEXT_NAME
    if not path.is_file():
        return {}
    objects = read_json(path).get("objects")
    if not isinstance(objects, dict):
        raise InputError(f"{path} holds no objects, as NeMo's do; use an undamaged checkpoint")
    configs = [items for items in map(_list_items, objects.values()) if items.keys() & _OF_A_MODEL]
    if not configs:
        return {}
    config = configs[0]
    known = _TAKEN.keys() | _ARCHITECTURE.keys() | {"bias_activation_fusion"}
    for other in configs[1:]:
        different = sorted(name for name in known if other.get(name) != config.get(name))
        if different:
            raise InputError(f"{path} holds two models that differ in {different[0]}; use a checkpoint of one model")
    for name, wanted in _ARCHITECTURE.items():
        found = config.get(name, wanted)
        if type(found) is not type(wanted) or found != wanted:
            raise InputError(
                f"{path}: {name} is {found!r:.60}, but BioNeMo's Geneformer has {wanted!r}; only that can be imported"
            )
    settings = {ours: config[theirs] for theirs, ours in _TAKEN.items() if theirs in config}
    is_fused = config.get("bias_activation_fusion", True)
    if not isinstance(is_fused, bool):
        raise InputError(f"{path}: bias_activation_fusion is {is_fused!r:.60}, wanted true or false; mend that value")
    return settings | {"variant": "pre_norm" if is_fused else "pre_norm_erf"}


def _list_items(entry: object) -> dict[str, Any]:
    """Attribute to value of one of Fiddle's objects: plain values, and the names of functions; others are left out."""
    found: dict[str, Any] = {}
    items = entry.get("items") if isinstance(entry, dict) else None
    for item in items if isinstance(items, list) else ():
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], dict)):
            continue
        name, value = _ATTRIBUTE.search(item[0]), item[1]
        if name and value.get("type") == "leaf":
            found[name[1]] = value.get("value")
        elif name and value.get("type") == "pyref":
            found[name[1]] = value.get("name")
    return found


def vocabulary_of_genes(genes: tuple[str, ...]) -> Vocabulary:
    """BioNeMo's vocabulary for genes in the order of its medians: five special tokens, then the genes."""
    return Vocabulary([*SPECIALS.values(), *genes])


def read_nemo_vocabulary(path: Path) -> Vocabulary:
    """Read BioNeMo's `geneformer.vocab`: JSON with `vocab`, token to id.

    Raises:
        InputError: the ids are not 0, 1, 2, ..., or the first five tokens are not BioNeMo's.
    """
    ids = read_json(path).get("vocab")
    if not isinstance(ids, dict):
        raise InputError(f"{path} holds no 'vocab', as BioNeMo's vocabulary does; use another file")
    by_id = {place: token for token, place in ids.items() if type(place) is int}
    if sorted(by_id) != list(range(len(ids))):
        raise InputError(f"{path} must give each id from 0 to {len(ids) - 1} to one token; use an undamaged file")
    tokens = [by_id[place] for place in range(len(ids))]
    if tokens[: len(SPECIALS)] != list(SPECIALS):
        raise InputError(
            f"{path} starts with {', '.join(map(repr, tokens[: len(SPECIALS)]))}, wanted {', '.join(SPECIALS)}; use "
            "the vocabulary of a BioNeMo Geneformer"
        )
    try:
        return vocabulary_of_genes(tuple(tokens[len(SPECIALS) :]))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
