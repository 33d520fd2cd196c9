"""Geneformer as a Hugging Face folder: export and import, exact to the bit.

    model.safetensors, config.json   what `transformers.AutoModelForMaskedLM` loads; no code of celltron is needed
    modeling_geneformer_prenorm.py   of a pre-norm model alone: its code for `transformers`
    token_dictionary.json            token to id
    gene_median_dictionary.json      gene to the median that its values are divided by
    tokenization.json                the longest cell, and how counts become tokens
    README.md                        the model card
    manifest.json                    checksums

The post-norm model is a stock `BertForMaskedLM`; the pre-norm one brings its own modelling file. The folder is JSON and
safetensors, so `transformers` itself is not needed here. Pickle (`pytorch_model.bin`) is never read, and no modelling
file ever run.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from celltron.core import CLS, EOS, InputError, Vocabulary, write_artefact
from celltron.models.geneformer import bert_folder, prenorm_folder
from celltron.models.geneformer.bert_tensors import from_bert_tensors, to_bert_tensors
from celltron.models.geneformer.config import GeneformerConfig
from celltron.models.geneformer.model_card import CARD_NAME, describe_model
from celltron.models.geneformer.whole import WholeGeneformer

HUGGINGFACE_VERSION = 1


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
    to_tensors = prenorm_folder.to_prenorm_tensors if whole.config.is_pre_norm else to_bert_tensors
    tensors = {
        name: tensor.to("cpu", dtype)
        for name, tensor in to_tensors(whole.config, whole.parameters, whole.num_tokens).items()
    }
    texts = _make_texts(whole, vocabulary, dtype)
    texts[CARD_NAME] = describe_model(
        whole.config,
        vocabulary,
        whole.medians,
        max_length=whole.max_length,
        num_parameters=sum(tensor.numel() for tensor in tensors.values()),
        facts=facts or {},
    )
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
    """Read a folder of Geneformer, a stock `BertForMaskedLM` or a pre-norm model; it may come from anywhere.

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
    from_tensors = prenorm_folder.from_prenorm_tensors if config.is_pre_norm else from_bert_tensors
    tensors, unused_tensors = bert_folder.read_tensors(folder, config, num_tokens)
    return WholeGeneformer(
        config=config,
        num_tokens=num_tokens,
        parameters=from_tensors(config, tensors),
        vocabulary=vocabulary,
        medians=bert_folder.read_medians(folder),
        max_length=bert_folder.read_max_length(folder, config.max_positions),
        unused_tensors=unused_tensors,
    )


def _make_texts(whole: WholeGeneformer, vocabulary: Vocabulary, dtype: torch.dtype) -> dict[str, str]:
    """Every file by name, but the tensors and the model card."""
    texts = {
        bert_folder.CONFIG_NAME: _to_json(_make_config(whole.config, vocabulary, dtype)),
        bert_folder.TOKENS_NAME: _to_json({token: place for place, token in enumerate(vocabulary.tokens)}),
        bert_folder.TOKENIZATION_NAME: _to_json(_describe_tokenization(vocabulary, whole.max_length)),
    }
    if whole.config.is_pre_norm:
        texts[prenorm_folder.MODELING_NAME] = prenorm_folder.read_modeling_file()
    if whole.medians is not None:
        medians = zip(whole.medians.genes, whole.medians.values.tolist(), strict=True)
        texts[bert_folder.MEDIANS_NAME] = _to_json(dict(medians))
    return texts


def _make_config(config: GeneformerConfig, vocabulary: Vocabulary, dtype: torch.dtype) -> dict[str, Any]:
    is_bert = {"architectures": ["BertForMaskedLM"], **bert_folder.ARCHITECTURE}
    return {
        **(prenorm_folder.describe_architecture(config) if config.is_pre_norm else is_bert),
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
        "first_token": None if vocabulary.cls_id is None else CLS,
        "last_token": None if vocabulary.eos_id is None else EOS,
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
