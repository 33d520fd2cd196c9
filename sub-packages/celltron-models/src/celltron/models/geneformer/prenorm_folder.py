"""What a Hugging Face folder of the pre-norm Geneformer holds of its own: modelling file, config, names of tensors.

Axes: V vocabulary, R its rows with padding, D width, F feed-forward width.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from celltron.core import InputError
from celltron.models.geneformer.bert_tensors import PADDED, pad_rows
from celltron.models.geneformer.config import GeneformerConfig

MODELING_NAME = "modeling_geneformer_prenorm.py"
MODEL_TYPE = "geneformer_prenorm"

_CLASSES = {
    "AutoConfig": "PreNormGeneformerConfig",
    "AutoModel": "PreNormGeneformerModel",
    "AutoModelForMaskedLM": "PreNormGeneformerForMaskedLM",
}
WITH_HEAD: tuple[str, ...] = (_CLASSES["AutoModelForMaskedLM"],)
_HIDDEN_ACT = {"pre_norm": "gelu_pytorch_tanh", "pre_norm_erf": "gelu"}


def read_modeling_file() -> str:
    """The modelling file, which needs torch and transformers alone."""
    return Path(__file__).with_name(MODELING_NAME).read_text(encoding="utf-8")


def describe_architecture(config: GeneformerConfig) -> dict[str, Any]:
    """The entries of config.json by which `transformers` finds the classes, and the activation."""
    module = MODELING_NAME.removesuffix(".py")
    return {
        "architectures": [*WITH_HEAD],
        "auto_map": {auto: f"{module}.{name}" for auto, name in _CLASSES.items()},
        "model_type": MODEL_TYPE,
        "hidden_act": _HIDDEN_ACT[config.variant],
    }


def read_variant(values: Mapping[str, Any], path: Path) -> str:
    """Undo `describe_architecture` for the contents of a config.json.

    Raises:
        InputError: the activation is none of this model's.
    """
    for variant, hidden_act in _HIDDEN_ACT.items():
        if values.get("hidden_act") == hidden_act:
            return variant
    raise InputError(
        f"{path}: hidden_act is {values.get('hidden_act')!r:.60}, but a pre-norm Geneformer has "
        f"{' or '.join(_HIDDEN_ACT.values())}; only that can be imported"
    )


def list_prenorm_shapes(config: GeneformerConfig, num_tokens: int) -> dict[str, tuple[int, ...]]:
    """Every tensor that such a folder must hold, and its shape; `num_tokens` is V."""
    D, F = config.hidden_size, config.ffn_hidden_size
    layers = [f"encoder.layers.{layer}" for layer in range(config.num_layers)]
    linears = {
        "self_attention.linear_qkv": (3 * D, D),
        "self_attention.linear_proj": (D, D),
        "mlp.linear_fc1": (F, D),
        "mlp.linear_fc2": (D, F),
    }
    weights: dict[str, tuple[int, ...]] = {"head.dense": (D, D), "head.norm": (D,), "encoder.final_layernorm": (D,)}
    for layer in layers:
        weights |= {f"{layer}.{name}": shape for name, shape in linears.items()}
        weights |= {f"{layer}.{name}": (D,) for name in ("input_layernorm", "pre_mlp_layernorm")}
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (num_tokens, D),
        "embedding.position_embeddings.weight": (config.max_positions, D),
        "output_layer.bias": (num_tokens,),
    }
    for name, shape in weights.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {_exported_name(name): shape for name, shape in shapes.items()}


def to_prenorm_tensors(
    config: GeneformerConfig, parameters: Mapping[str, torch.Tensor], num_tokens: int
) -> dict[str, torch.Tensor]:
    """Rename for the modelling file, and cut the rows that only pad the vocabulary.

    Args:
        config: The model's shape.
        parameters: Of a whole model, one process's, by name.
        num_tokens: The true vocabulary.

    Returns:
        Tensors by the modelling file's names, contiguous; they may share memory with `parameters`.
    """
    rows = {parameters[name].shape[0] for name in PADDED}
    assert rows == {config.padded_vocabulary(num_tokens)}, (rows, num_tokens)
    return {
        _exported_name(name): (parameter[:num_tokens] if name in PADDED else parameter).contiguous()
        for name, parameter in parameters.items()
    }


def from_prenorm_tensors(config: GeneformerConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Undo `to_prenorm_tensors`; rows that pad the vocabulary become 0, with an output bias that leaves them out."""
    named = {_own_name(name): tensor for name, tensor in tensors.items()}
    return {name: pad_rows(config, name, tensor) for name, tensor in named.items()}


def _exported_name(name: str) -> str:
    if name == "output_layer.bias":
        return "output_bias"
    return name if name.startswith("head.") else f"model.{name}"


def _own_name(name: str) -> str:
    return "output_layer.bias" if name == "output_bias" else name.removeprefix("model.")
