"""Geneformer as a stock Hugging Face `BertForMaskedLM` folder: export and import, exact to the bit.

    model.safetensors, config.json   what `transformers.AutoModelForMaskedLM` loads; no code of celltron is needed
    token_dictionary.json            token to id
    gene_median_dictionary.json      gene to the median that its values are divided by
    tokenization.json                the longest cell, and how counts become tokens
    README.md                        the model card
    manifest.json                    checksums

The folder is JSON and safetensors, so `transformers` itself is not needed here. Pickle (`pytorch_model.bin`) is never
read.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from celltron.core import InputError, MedianTable, Vocabulary, write_artefact
from celltron.models.geneformer import bert_folder
from celltron.models.geneformer.bert_tensors import from_bert_tensors, to_bert_tensors
from celltron.models.geneformer.config import GeneformerConfig
from celltron.models.geneformer.model import Geneformer
from celltron.models.geneformer.model_card import CARD_NAME, describe_model

HUGGINGFACE_VERSION = 1


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


def to_huggingface(
    whole: WholeGeneformer,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    facts: Mapping[str, object] | None = None,
    replace: bool = False,
) -> None:
    """Write a Hugging Face folder, complete or not at all.

    Args:
        whole: The model; its vocabulary must be known.
        folder: Where to.
        dtype: Of the tensors in the file.
        facts: What the model card says of the training run: name to value.
        replace: Whether `folder` may be such a folder already.

    Raises:
        InputError: the folder is in use, or vocabulary and model do not fit.
        OSError: the folder cannot be written; nothing is left of it.
    """
    vocabulary = whole.vocabulary
    if vocabulary is None:
        raise InputError(f"the model for {folder} comes without a vocabulary, which an export must hold; give it one")
    if len(vocabulary) != whole.num_tokens:
        raise InputError(
            f"the vocabulary for {folder} has {len(vocabulary)} tokens, but the model {whole.num_tokens}; give the "
            "vocabulary that the model was trained with"
        )
    tensors = {
        name: tensor.to("cpu", dtype)
        for name, tensor in to_bert_tensors(whole.config, whole.parameters, whole.num_tokens).items()
    }
    texts = {
        bert_folder.CONFIG_NAME: _to_json(_make_bert_config(whole.config, vocabulary, dtype)),
        bert_folder.TOKENS_NAME: _to_json({token: place for place, token in enumerate(vocabulary.tokens)}),
        bert_folder.TOKENIZATION_NAME: _to_json(_describe_tokenization(vocabulary, whole.max_length)),
        CARD_NAME: describe_model(
            whole.config,
            vocabulary,
            whole.medians,
            max_length=whole.max_length,
            num_parameters=sum(tensor.numel() for tensor in tensors.values()),
            facts=facts or {},
        ),
    }
    if whole.medians is not None:
        medians = zip(whole.medians.genes, whole.medians.values.tolist(), strict=True)
        texts[bert_folder.MEDIANS_NAME] = _to_json(dict(medians))
    with write_artefact(
        folder, format=bert_folder.HUGGINGFACE_FORMAT, version=HUGGINGFACE_VERSION, replace=replace
    ) as writer:
        for name, text in texts.items():
            (writer.folder / name).write_text(text, encoding="utf-8")
        path = writer.folder / bert_folder.TENSORS_NAME
        _write_tensors(path, tensors)
        # safetensors makes files that only their owner may read.
        shutil.copymode(writer.folder / bert_folder.CONFIG_NAME, path)


def from_huggingface(
    folder: Path, *, vocabulary_multiple: int = GeneformerConfig().vocabulary_multiple
) -> WholeGeneformer:
    """Read a stock `BertForMaskedLM` folder of Geneformer's architecture; it may come from anywhere.

    Vocabulary, medians and longest cell are read where the folder holds them as an export does. A folder without them
    gives neither vocabulary nor medians, and its longest cell is all its positions.

    Args:
        folder: The folder.
        vocabulary_multiple: What to pad the vocabulary to; see `GeneformerConfig`.

    Raises:
        InputError: names the first thing that is missing, damaged, or not Geneformer's.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give one that holds {bert_folder.CONFIG_NAME}")
    bert_folder.check_against_manifest(folder)
    config, num_tokens, pad_id = bert_folder.read_config(folder, vocabulary_multiple)
    vocabulary = bert_folder.read_vocabulary(folder, num_tokens)
    if vocabulary is not None and pad_id != vocabulary.pad_id:
        raise InputError(
            f"{folder}: pad_token_id in {bert_folder.CONFIG_NAME} is {pad_id}, but {bert_folder.TOKENS_NAME} gives "
            f"<pad> the id {vocabulary.pad_id}; mend the one that is wrong"
        )
    tensors, unused_tensors = bert_folder.read_tensors(folder, config, num_tokens)
    return WholeGeneformer(
        config=config,
        num_tokens=num_tokens,
        parameters=from_bert_tensors(config, tensors),
        vocabulary=vocabulary,
        medians=bert_folder.read_medians(folder),
        max_length=bert_folder.read_max_length(folder, config.max_positions),
        unused_tensors=unused_tensors,
    )


def _make_bert_config(config: GeneformerConfig, vocabulary: Vocabulary, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "architectures": ["BertForMaskedLM"],
        **bert_folder.ARCHITECTURE,
        "dtype": str(dtype).removeprefix("torch."),
        "pad_token_id": vocabulary.pad_id,
        "vocab_size": len(vocabulary),
        **{theirs: getattr(config, ours) for ours, theirs in (bert_folder.SIZES | bert_folder.SETTINGS).items()},
    }


def _describe_tokenization(vocabulary: Vocabulary, max_length: int) -> dict[str, Any]:
    return {
        "method": "rank value encoding",
        "value": "count / sum of the cell's counts * 10000 / median of the gene",
        "order": "descending by value, ties ascending by token id; genes without token or median are left out",
        "max_length": max_length,
        "framed_by_cls_and_eos": vocabulary.cls_id is not None and vocabulary.eos_id is not None,
    }


def _to_json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, allow_nan=False) + "\n"


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    try:
        # transformers refuses a file whose header does not name the framework.
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # The library hides the number by which the operating system says, for example, that the disk is full.
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error
