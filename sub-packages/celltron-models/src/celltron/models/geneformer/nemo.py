"""BioNeMo's pre-norm Geneformer: its parameters under the names and in the shapes of NeMo 2's `weights/`, exactly.

NeMo keeps the model in an attribute `module` and writes megatron-core's sharded state: the layers of the stack joined
on a first axis L (`module.encoder.layers.self_attention.linear_qkv.weight`, [L, 3D, D]), or one by one where Megatron
was told so (`module.encoder.layers.0.self_attention...`). The norm before a linear has that linear's name, as
Transformer Engine holds both in one module. The decoder is the token embedding, so it is there once.

Axes: L layers, R rows of the padded vocabulary, P positions, D width, F feed-forward width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from celltron.core import InputError, build_config
from celltron.models.geneformer.config import GeneformerConfig
from celltron.models.geneformer.model import PADDING_ROW_BIAS

PREFIX = "module."
_STACK = "encoder.layers."
_WORDS = "embedding.word_embeddings.weight"
_POSITIONS = "embedding.position_embeddings.weight"
_OUTPUT_BIAS = "output_layer.bias"
# What Transformer Engine keeps for low precision: pickled objects, which are never read.
_EXTRA_STATE = "._extra_state"
# What BioNeMo trained with, which NeMo does not record.
_DEFAULTS: dict[str, Any] = {
    "variant": "pre_norm",
    "hidden_dropout": 0.02,
    "attention_dropout": 0.1,
    "norm_epsilon": 1e-12,
    "initial_standard_deviation": 0.02,
}
# Our name to NeMo's, of modules outside the layers that have another there.
_OUTSIDE = {"head.dense": "lm_head.dense", "head.norm": "lm_head.layer_norm"}
# Of one layer: our name to NeMo's.
_IN_LAYER = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "input_layernorm.bias": "self_attention.linear_qkv.layer_norm_bias",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "pre_mlp_layernorm.bias": "mlp.linear_fc1.layer_norm_bias",
    **{
        f"{linear}.{kind}": f"{linear}.{kind}"
        for linear in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
        for kind in ("weight", "bias")
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class NemoModel:
    """What a `weights/` folder holds of the model."""

    config: GeneformerConfig
    """The model's shape."""
    num_rows: int
    """R, the vocabulary with its padding."""
    shapes: dict[str, tuple[int, ...]]
    """Every tensor of the model in the folder."""


def read_nemo_shape(
    shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], *, vocabulary_multiple: int, where: str
) -> NemoModel:
    """Tell the model's shape from its tensors' shapes, each of which is checked.

    Args:
        shapes: Every tensor of the folder; those of an optimizer are passed over.
        settings: What only the config knows, such as `num_attention_heads`, and sizes to compare; see
            `read_nemo_settings`.
        vocabulary_multiple: What the vocabulary was padded to.
        where: The folder, for messages.

    Raises:
        InputError: tensors are missing, of other shapes, or of another architecture.
    """
    own = {name: shape for name, shape in shapes.items() if name.startswith(PREFIX) and _EXTRA_STATE not in name}
    is_joined = f"{PREFIX}{_STACK}mlp.linear_fc1.weight" in own
    sizes = _read_sizes(own, is_joined=is_joined, where=where)
    num_rows = sizes.pop("num_rows")
    for name, size in sizes.items():
        if settings.get(name, size) != size:
            raise InputError(
                f"{where}: the tensors have {name} {size}, but the config beside them {settings[name]}; use a folder "
                "whose files belong together"
            )
    if num_rows % vocabulary_multiple:
        raise InputError(
            f"{where}: {PREFIX}{_WORDS} has {num_rows} rows, no multiple of {vocabulary_multiple}; give the multiple "
            "that the vocabulary was padded to"
        )
    values = {**_DEFAULTS, **settings, **sizes, "vocabulary_multiple": vocabulary_multiple}
    config = build_config(GeneformerConfig, values, where=where)
    wanted = list_nemo_shapes(config, num_rows, is_joined=is_joined)
    _check_shapes(own, wanted, where=where)
    return NemoModel(config=config, num_rows=num_rows, shapes=wanted)


def list_nemo_shapes(config: GeneformerConfig, num_rows: int, *, is_joined: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model in `weights/` and its shape.

    Args:
        config: The model's shape.
        num_rows: R.
        is_joined: Whether the layers are joined on a first axis.
    """
    D, F = config.hidden_size, config.ffn_hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        _WORDS: (num_rows, D),
        _POSITIONS: (config.max_positions, D),
        "encoder.final_layernorm.weight": (D,),
        "encoder.final_layernorm.bias": (D,),
        "lm_head.dense.weight": (D, D),
        "lm_head.dense.bias": (D,),
        "lm_head.layer_norm.weight": (D,),
        "lm_head.layer_norm.bias": (D,),
        _OUTPUT_BIAS: (num_rows,),
    }
    weights = {
        "self_attention.linear_qkv": (3 * D, D),
        "self_attention.linear_proj": (D, D),
        "mlp.linear_fc1": (F, D),
        "mlp.linear_fc2": (D, F),
    }
    for theirs in _IN_LAYER.values():
        linear, _, kind = theirs.rpartition(".")
        in_layer = {"weight": weights[linear], "bias": weights[linear][:1]}.get(kind, (D,))
        if is_joined:
            shapes[_STACK + theirs] = (config.num_layers, *in_layer)
        else:
            shapes |= {f"{_STACK}{layer}.{theirs}": in_layer for layer in range(config.num_layers)}
    return {PREFIX + name: shape for name, shape in shapes.items()}


def from_nemo_tensors(
    model: NemoModel, tensors: Mapping[str, torch.Tensor], num_tokens: int
) -> dict[str, torch.Tensor]:
    """Rename the tensors, and part those that hold all layers.

    Rows that pad the vocabulary become 0 with an output bias that leaves them out of every probability, as in a model
    that celltron built; all other values are the same bits.

    Args:
        model: What the folder holds.
        tensors: All that `model.shapes` lists; they are left as they are.
        num_tokens: The true vocabulary.

    Returns:
        By the names that parameters have in `Geneformer` on one process.
    """
    ours_of = {theirs: ours for ours, theirs in _OUTSIDE.items()}
    parameters = {}
    for key, tensor in tensors.items():
        module, _, kind = key.removeprefix(PREFIX).rpartition(".")
        if not module.startswith(_STACK):
            parameters[f"{ours_of.get(module, module)}.{kind}"] = tensor
    for ours, theirs in _IN_LAYER.items():
        joined = tensors.get(f"{PREFIX}{_STACK}{theirs}")
        for layer in range(model.config.num_layers):
            parameters[f"{_STACK}{layer}.{ours}"] = (
                tensors[f"{PREFIX}{_STACK}{layer}.{theirs}"] if joined is None else joined[layer].clone()
            )
    for name, value in ((_WORDS, 0.0), (_OUTPUT_BIAS, PADDING_ROW_BIAS)):
        parameters[name] = parameters[name].clone()
        parameters[name][num_tokens:] = value
    return parameters


def _read_sizes(shapes: Mapping[str, tuple[int, ...]], *, is_joined: bool, where: str) -> dict[str, int]:
    """The sizes that make all shapes."""
    stack = PREFIX + _STACK
    first_ffn = f"{stack}{'' if is_joined else '0.'}mlp.linear_fc1.weight"
    found = {}
    for name, num_axes in ((PREFIX + _WORDS, 2), (PREFIX + _POSITIONS, 2), (first_ffn, 3 if is_joined else 2)):
        if name not in shapes:
            raise InputError(
                f"{where} lacks the tensor {name}, so it holds no Geneformer that BioNeMo wrote; use another checkpoint"
            )
        found[name] = shapes[name]
        if len(found[name]) != num_axes:
            raise InputError(f"{where}: {name} has shape {found[name]}, wanted {num_axes} axes; use another checkpoint")
    num_rows, width = found[PREFIX + _WORDS]
    layers = {name.removeprefix(stack).partition(".")[0] for name in shapes if name.startswith(stack)}
    return {
        "num_rows": num_rows,
        "hidden_size": width,
        "max_positions": found[PREFIX + _POSITIONS][0],
        "ffn_hidden_size": found[first_ffn][-2],
        "num_layers": found[first_ffn][0] if is_joined else len(layers),
    }


def _check_shapes(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], *, where: str
) -> None:
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise InputError(
            f"{where} lacks {len(missing)} tensors of the model, the first is {missing[0]}; use an undamaged checkpoint"
        )
    strange = sorted(found.keys() - wanted.keys())
    if strange:
        raise InputError(
            f"{where} holds {len(strange)} tensors that BioNeMo's Geneformer does not have, the first is {strange[0]}; "
            "only that model can be imported"
        )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise InputError(
                f"{where}: {name} has shape {found[name]}, but the other tensors make it {shape}; use an undamaged "
                "checkpoint"
            )
