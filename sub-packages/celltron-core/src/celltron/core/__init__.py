"""Config, errors, artefact folders, vocabulary, gene names and keyed permutations: what every part stands on."""

from celltron.core.artefact import (
    MANIFEST_NAME,
    ArtefactWriter,
    begin_artefact,
    discard_artefact,
    finish_artefact,
    read_manifest,
    verify_artefact,
    write_artefact,
    write_atomically,
)
from celltron.core.config import (
    ParsedArguments,
    build_config,
    config_to_dict,
    config_to_yaml,
    load_config,
    parse_arguments,
)
from celltron.core.errors import BeingWrittenError, InputError, run_command
from celltron.core.genes import GeneNames
from celltron.core.output import tell
from celltron.core.permutation import KeyedPermutation, key_from, keys_from, mix64, uniform_bits
from celltron.core.progress import ProgressLine, describe_seconds
from celltron.core.version import __version__
from celltron.core.vocabulary import (
    CLS,
    EOS,
    MASK,
    PAD,
    MedianTable,
    Vocabulary,
    load_published_geneformer,
    load_vocabulary_table,
)

__all__ = [
    "CLS",
    "EOS",
    "MANIFEST_NAME",
    "MASK",
    "PAD",
    "ArtefactWriter",
    "BeingWrittenError",
    "GeneNames",
    "InputError",
    "KeyedPermutation",
    "MedianTable",
    "ParsedArguments",
    "ProgressLine",
    "Vocabulary",
    "__version__",
    "begin_artefact",
    "build_config",
    "config_to_dict",
    "config_to_yaml",
    "describe_seconds",
    "discard_artefact",
    "finish_artefact",
    "key_from",
    "keys_from",
    "load_config",
    "load_published_geneformer",
    "load_vocabulary_table",
    "mix64",
    "parse_arguments",
    "read_manifest",
    "run_command",
    "tell",
    "uniform_bits",
    "verify_artefact",
    "write_artefact",
    "write_atomically",
]
