"""Turn a Hugging Face Geneformer (`BertForMaskedLM` or pre-norm) into a celltron checkpoint; on one process."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from celltron.core import (
    InputError,
    load_published_geneformer,
    load_vocabulary_table,
    parse_arguments,
    run_command,
)
from celltron.models.geneformer import WholeGeneformer, from_huggingface
from celltron.recipes.shared.conversion import check_conversion, write_import
from celltron.train.precision import Precision

PUBLISHED: tuple[Literal["gc30M", "gc95M"], ...] = ("gc30M", "gc95M")
FLAGS = {
    "--folder": "folder",
    "--out": "out",
    "--vocabulary": "vocabulary",
    "--seq-length": "max_length",
    "--dtype": "dtype",
    "--replace": "replace",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """An import."""

    folder: str = ""
    """The Hugging Face folder: config.json and model.safetensors, perhaps token_dictionary.json and medians."""
    out: str = ""
    """The checkpoint folder to make."""
    vocabulary: str = ""
    """Tokens and medians: empty takes the folder's own; `gc30M` and `gc95M` are Geneformer's published ones; else the
    path of a table with ensembl_id, token_id and median."""
    max_length: int = 0
    """Longest cell in tokens; 0 takes what the folder says, which is all its positions where it says nothing."""
    vocabulary_multiple: int = 128
    """The vocabulary is padded to a multiple of this; every later tensor-parallel size must divide it."""
    dtype: Precision = "fp32"
    """Of the checkpoint's parameters; what the folder holds is rounded to it."""
    replace: bool = False
    """Whether `out` may be a checkpoint already."""

    def __post_init__(self) -> None:
        if not self.folder:
            raise ValueError("folder is empty; name a Hugging Face folder, such as --folder Geneformer-V2-104M")
        if not self.out:
            raise ValueError("out is empty; name a checkpoint folder to make, such as --out runs/imported")
        if self.max_length < 0:
            raise ValueError(f"max_length is {self.max_length}, but must not be negative")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the import that the command line describes."""
    config = parse_arguments(Config, sys.argv[1:] if arguments is None else arguments, flags=FLAGS).config
    out = Path(config.out)
    check_conversion("import", out, replace=config.replace)
    whole = from_huggingface(Path(config.folder), vocabulary_multiple=config.vocabulary_multiple)
    if whole.unused_tensors:
        names = ", ".join(whole.unused_tensors)
        print(f"left out {names}: parts of BERT that predict no masked genes", file=sys.stderr)
    write_import(complete(config, whole), out, config.dtype, replace=config.replace)
    print(f"{out}: {config.folder} as a celltron checkpoint in {config.dtype}", file=sys.stderr)


def complete(config: Config, whole: WholeGeneformer) -> WholeGeneformer:
    """Give the model the vocabulary, medians and longest cell that the command line names."""
    vocabulary, medians = whole.vocabulary, whole.medians
    published = next((name for name in PUBLISHED if name == config.vocabulary), None)
    if published:
        vocabulary, medians = load_published_geneformer(published)
    elif config.vocabulary:
        vocabulary, medians = load_vocabulary_table(Path(config.vocabulary))
    if vocabulary is None:
        raise InputError(
            f"{config.folder} does not say which genes its {whole.num_tokens:,} tokens are; name them with "
            "--vocabulary: gc30M (25,426 tokens), gc95M (20,275 tokens) or a table"
        )
    if len(vocabulary) != whole.num_tokens:
        raise InputError(
            f"vocabulary {config.vocabulary} has {len(vocabulary):,} tokens, but the model in {config.folder} "
            f"{whole.num_tokens:,}; name the vocabulary that it was trained with"
        )
    max_length = config.max_length or whole.max_length
    if max_length > whole.config.max_positions:
        raise InputError(
            f"max_length is {max_length}, but the model in {config.folder} has {whole.config.max_positions} positions; "
            "lower it"
        )
    return replace(whole, vocabulary=vocabulary, medians=medians, max_length=max_length)


if __name__ == "__main__":
    sys.exit(run_command(main))
