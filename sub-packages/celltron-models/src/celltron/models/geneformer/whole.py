"""A Geneformer that one process holds whole."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from celltron.core import MedianTable, Vocabulary
from celltron.models.geneformer.config import GeneformerConfig
from celltron.models.geneformer.model import Geneformer
from celltron.models.geneformer.model_file import MODEL_FILE_NAME, ModelShape

VOCABULARY_NAME = "vocabulary.json"
MEDIANS_NAME = "medians.json"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WholeGeneformer:
    """A Geneformer that is not cut for any layout, with what its tokens mean."""

    config: GeneformerConfig
    """The model's shape."""
    num_tokens: int
    """Tokens of its vocabulary, padding rows not counted."""
    parameters: dict[str, torch.Tensor]
    """By the names that they have in `Geneformer` on one process."""
    vocabulary: Vocabulary | None = None
    """The tokens; None where the source does not tell them."""
    medians: MedianTable | None = None
    """The genes' medians; None where the source does not tell them."""
    max_length: int
    """Longest cell, in tokens."""
    unused_tensors: tuple[str, ...] = ()
    """What the source holds besides and has no place here, such as a pooler."""

    def travelling_files(self) -> dict[str, str]:
        """What explains a checkpoint of the model, by name: its shape, vocabulary, and medians where they are known."""
        shape = ModelShape(config=self.config, num_tokens=self.num_tokens, max_length=self.max_length)
        files = {MODEL_FILE_NAME: shape.to_json()}
        tables = {VOCABULARY_NAME: self.vocabulary, MEDIANS_NAME: self.medians}
        with tempfile.TemporaryDirectory() as folder:
            for name, table in tables.items():
                if table is not None:
                    table.to_json(Path(folder) / name)
                    files[name] = (Path(folder) / name).read_text(encoding="utf-8")
        return files


def take_parameters(model: Geneformer) -> dict[str, torch.Tensor]:
    """The parameters of a model that one process holds whole, by name; they share its memory."""
    num_parts = model.config.tensor_model_parallel_size * model.config.pipeline_model_parallel_size
    assert num_parts == 1, f"the model is cut into {num_parts} parts, wanted 1"
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@torch.no_grad()
def put_parameters(model: Geneformer, parameters: Mapping[str, torch.Tensor]) -> None:
    """Copy parameters into a model that one process holds whole, rounding them to its dtype."""
    own = take_parameters(model)
    assert own.keys() == parameters.keys(), sorted(own.keys() ^ parameters.keys())
    for name, parameter in own.items():
        assert parameter.shape == parameters[name].shape, (name, parameter.shape, parameters[name].shape)
        parameter.copy_(parameters[name])
