"""`model.json`, the file of a checkpoint that says which Geneformer its tensors belong to."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celltron.core import InputError, build_config, config_to_dict
from celltron.models.geneformer.config import GeneformerConfig

MODEL_FILE_NAME = "model.json"
_MODEL = "geneformer"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """What is needed to build a checkpoint's model."""

    config: GeneformerConfig
    """The model's shape."""
    num_tokens: int
    """Tokens of its vocabulary, padding rows not counted."""
    max_length: int
    """Longest cell it was trained on, in tokens."""

    def to_json(self) -> str:
        """The content of `model.json`."""
        values = {
            "model": _MODEL,
            "num_tokens": self.num_tokens,
            "max_length": self.max_length,
            "config": config_to_dict(self.config),
        }
        return json.dumps(values, indent=1)


def read_model_shape(folder: Path) -> ModelShape:
    """Read a checkpoint's `model.json`, which may come from anywhere.

    Raises:
        InputError: it is missing, no Geneformer's, or its values make no model.
    """
    path = folder / MODEL_FILE_NAME
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{folder} has no {MODEL_FILE_NAME}, so it is no model's checkpoint; check the path") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable as JSON ({error}); use another checkpoint") from None
    if not isinstance(values, dict) or values.get("model") != _MODEL or not isinstance(values.get("config"), dict):
        raise InputError(f"{path} describes no {_MODEL}; give a checkpoint that the Geneformer recipe wrote")
    config = build_config(GeneformerConfig, values["config"], where=str(path))
    num_tokens = _whole_number(values, "num_tokens", path)
    max_length = _whole_number(values, "max_length", path)
    if max_length > config.max_positions:
        raise InputError(
            f"{path}: max_length is {max_length}, more than the model's {config.max_positions} positions; use another "
            "checkpoint"
        )
    return ModelShape(config=config, num_tokens=num_tokens, max_length=max_length)


def _whole_number(values: dict[str, Any], key: str, path: Path) -> int:
    value = values.get(key)
    if type(value) is not int or value < 1:
        raise InputError(f"{path}: {key} is {value!r}, wanted a whole number above 0; use another checkpoint")
    return value
