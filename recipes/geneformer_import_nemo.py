"""Turn a Geneformer that BioNeMo saved with NeMo 2 into a celltron checkpoint; on one process.

    python recipes/geneformer_import_nemo.py --folder NEMO --out OUT --vocabulary geneformer.vocab --medians FILE
    python recipes/geneformer_export_hf.py --checkpoint OUT --out HUGGINGFACE

The second command makes a Hugging Face folder of it, which brings its own modelling file.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celltron.core import (
    InputError,
    MedianTable,
    Vocabulary,
    load_published_geneformer,
    load_vocabulary_table,
    parse_arguments,
    run_command,
)
from celltron.models.geneformer import (
    WholeGeneformer,
    from_nemo_tensors,
    read_medians,
    read_nemo_settings,
    read_nemo_shape,
    read_nemo_vocabulary,
    vocabulary_of_genes,
)
from celltron.recipes.shared.conversion import check_conversion, write_import
from celltron.train.foreign_tensors import ForeignTensors
from celltron.train.precision import Precision

WEIGHTS_NAME = "weights"
FLAGS = {
    "--folder": "folder",
    "--out": "out",
    "--vocabulary": "vocabulary",
    "--medians": "medians",
    "--heads": "num_attention_heads",
    "--dtype": "dtype",
    "--replace": "replace",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """An import."""

    folder: str = ""
    """The unpacked NeMo 2 checkpoint, which holds weights/ and perhaps context/."""
    out: str = ""
    """The checkpoint folder to make."""
    vocabulary: str = ""
    """What the tokens are: BioNeMo's geneformer.vocab, which starts with its five special tokens; a table with
    ensembl_id, token_id and median (.tsv, .tsv.gz) that starts with <cls>, <mask>, <pad>, <sep> and <unknown> for
    them; or `gc30M`: these and the genes of Geneformer's published table in its order."""
    medians: str = ""
    """BioNeMo's medians.json; empty takes those of the table, or none."""
    num_attention_heads: int = 0
    """Attention heads of the model; 0 takes what context/io.json says. Every published one has 64 values a head."""
    vocabulary_multiple: int = 128
    """What the vocabulary was padded to a multiple of."""
    dtype: Precision = "fp32"
    """Of the checkpoint's parameters; what the folder holds is rounded to it."""
    replace: bool = False
    """Whether `out` may be a checkpoint already."""

    def __post_init__(self) -> None:
        if not self.folder:
            raise ValueError("folder is empty; name an unpacked NeMo 2 checkpoint, such as --folder geneformer_10M")
        if not self.out:
            raise ValueError("out is empty; name a checkpoint folder to make, such as --out runs/imported")
        if not self.vocabulary:
            raise ValueError(
                "vocabulary is empty, but weights do not say which genes their tokens are; name geneformer.vocab, a "
                "table or gc30M with --vocabulary"
            )
        if self.num_attention_heads < 0:
            raise ValueError(f"num_attention_heads is {self.num_attention_heads}, but must not be negative")
        if self.vocabulary_multiple < 1:
            raise ValueError(f"vocabulary_multiple is {self.vocabulary_multiple}, but must be at least 1")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the import that the command line describes."""
    config = parse_arguments(Config, sys.argv[1:] if arguments is None else arguments, flags=FLAGS).config
    out = Path(config.out)
    check_conversion("import", out, replace=config.replace)
    whole = read_nemo(config)
    write_import(whole, out, config.dtype, replace=config.replace)
    without = "" if whole.medians is not None else "; it has no medians, which only --medians or a table gives"
    print(f"{out}: {config.folder} as a celltron checkpoint in {config.dtype}{without}", file=sys.stderr)


def read_nemo(config: Config) -> WholeGeneformer:
    """Read a NeMo 2 checkpoint, which may come from anywhere.

    Raises:
        InputError: names the first thing that is missing, damaged, or not BioNeMo's Geneformer.
    """
    folder = Path(config.folder)
    weights = folder / WEIGHTS_NAME
    if not weights.is_dir():
        raise InputError(f"{folder} holds no folder {WEIGHTS_NAME}; give an unpacked NeMo 2 checkpoint")
    settings = read_settings(config, folder)
    tensors = ForeignTensors(weights)
    nemo = read_nemo_shape(
        tensors.shapes, settings, vocabulary_multiple=config.vocabulary_multiple, where=str(weights)
    )
    vocabulary, medians = read_vocabulary(config)
    if nemo.config.padded_vocabulary(len(vocabulary)) != nemo.num_rows:
        raise InputError(
            f"vocabulary {config.vocabulary} has {len(vocabulary):,} tokens, but the model in {folder} "
            f"{nemo.num_rows:,} rows with padding; name the vocabulary that it was trained with"
        )
    return WholeGeneformer(
        config=nemo.config,
        num_tokens=len(vocabulary),
        parameters=from_nemo_tensors(nemo, tensors.read(nemo.shapes), len(vocabulary)),
        vocabulary=vocabulary,
        medians=medians,
        max_length=nemo.config.max_positions,
    )


def read_settings(config: Config, folder: Path) -> dict[str, Any]:
    """What the checkpoint's context and the command line say of the model and tensors cannot."""
    settings = read_nemo_settings(folder)
    has_config = bool(settings)
    heads = config.num_attention_heads
    found = settings.setdefault("num_attention_heads", heads)
    if heads and heads != found:
        raise InputError(f"--heads is {heads}, but the config in {folder} says {found!r:.20}; leave --heads out")
    if not found:
        raise InputError(
            f"nothing in {folder} says how many attention heads the model has; give --heads (published models have "
            "width / 64)"
        )
    if not has_config:
        print(f"{folder} has no config: dropout, epsilon and GELU are taken as BioNeMo trained with", file=sys.stderr)
    return settings


def read_vocabulary(config: Config) -> tuple[Vocabulary, MedianTable | None]:
    """The tokens that the command line names, and the medians where it tells them."""
    medians: MedianTable | None = None
    path = Path(config.vocabulary)
    if config.vocabulary == "gc30M":
        published, medians = load_published_geneformer("gc30M")
        vocabulary = vocabulary_of_genes(published.genes)
    elif path.name.endswith((".tsv", ".tsv.gz")):
        vocabulary, medians = load_vocabulary_table(path)
        check_specials(vocabulary, path)
    else:
        vocabulary = read_nemo_vocabulary(path)
    if config.medians:
        medians = read_medians(Path(config.medians))
    return vocabulary, medians


def check_specials(vocabulary: Vocabulary, path: Path) -> None:
    """Refuse a table with other special tokens: it may pad to as many rows, but every gene would have another's row."""
    nemo = vocabulary_of_genes(vocabulary.genes)
    if vocabulary != nemo:
        found, wanted = (", ".join(one.tokens[: one.first_gene_id]) for one in (vocabulary, nemo))
        raise InputError(
            f"{path} starts with {found}, wanted {wanted}; use a table of the tokens that BioNeMo trained with"
        )


if __name__ == "__main__":
    sys.exit(run_command(main))
