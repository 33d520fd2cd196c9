"""What a Hugging Face folder of the pre-norm Geneformer holds of its own: modelling file, config, names of tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from celltron.models.geneformer.config import GeneformerConfig

MODELING_NAME = "modeling_geneformer_prenorm.py"
MODEL_TYPE = "geneformer_prenorm"

_CLASSES = {
    "AutoConfig": "PreNormGeneformerConfig",
    "AutoModel": "PreNormGeneformerModel",
    "AutoModelForMaskedLM": "PreNormGeneformerForMaskedLM",
}
_HIDDEN_ACT = {"pre_norm": "gelu_pytorch_tanh", "pre_norm_erf": "gelu"}
_PADDED = ("embedding.word_embeddings.weight", "output_layer.bias")


def read_modeling_file() -> str:
    """The modelling file, which needs torch and transformers alone."""
    return Path(__file__).with_name(MODELING_NAME).read_text(encoding="utf-8")


def describe_architecture(config: GeneformerConfig) -> dict[str, Any]:
    """The entries of config.json by which `transformers` finds the classes, and the activation."""
    module = MODELING_NAME.removesuffix(".py")
    return {
        "architectures": [_CLASSES["AutoModelForMaskedLM"]],
        "auto_map": {auto: f"{module}.{name}" for auto, name in _CLASSES.items()},
        "model_type": MODEL_TYPE,
        "hidden_act": _HIDDEN_ACT[config.variant],
    }


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
    rows = {parameters[name].shape[0] for name in _PADDED}
    assert rows == {config.padded_vocabulary(num_tokens)}, (rows, num_tokens)
    return {
        _exported_name(name): (parameter[:num_tokens] if name in _PADDED else parameter).contiguous()
        for name, parameter in parameters.items()
    }


def _exported_name(name: str) -> str:
    if name == "output_layer.bias":
        return "output_bias"
    return name if name.startswith("head.") else f"model.{name}"
