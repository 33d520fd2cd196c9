"""The `celltron` command."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from celltron.cells import CellStore, compute_medians, convert
from celltron.core import InputError, ProgressLine, __version__, run_command, verify_artefact

Verb = Callable[[argparse.Namespace], None]


class _Parser(argparse.ArgumentParser):
    """An argument parser that reports like every other part of celltron."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `celltron` and return its exit code."""
    return run_command(_run, arguments)


def _run(arguments: Sequence[str]) -> None:
    # A recipe reads its own command line: config keys and overrides are no argparse flags.
    if arguments and arguments[0] in _RECIPES:
        _RECIPES[arguments[0]](arguments[1:])
        return
    options = _make_parser().parse_args(arguments)
    options.verb(options)


def _train(arguments: Sequence[str]) -> None:
    from celltron.recipes import geneformer_pretrain

    geneformer_pretrain.main(arguments)


def _export(arguments: Sequence[str]) -> None:
    from celltron.recipes import geneformer_export_hf

    geneformer_export_hf.main(arguments)


_RECIPES: dict[str, Callable[[Sequence[str]], None]] = {"train": _train, "export": _export}


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="celltron", description="Train foundation models of cells.")
    parser.add_argument("--version", action="version", version=f"celltron {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_convert(verbs.add_parser("convert", help="turn .h5ad files into a store"))
    _add_verb(verbs.add_parser("info", help="say what a store or checkpoint holds"), _info)
    _add_verb(verbs.add_parser("verify", help="check every file against its checksum"), _verify)
    medians = verbs.add_parser("medians", help="compute every gene's non-zero median over a store")
    _add_verb(medians, _medians)
    medians.add_argument("--out", type=Path, required=True, help="JSON file to write")
    verbs.add_parser("train", help="pretrain a model: celltron train --config FILE [section.key=value ...]")
    verbs.add_parser("export", help="turn a checkpoint into a Hugging Face folder")
    return parser


def _add_verb(parser: argparse.ArgumentParser, verb: Verb) -> None:
    parser.add_argument("path", type=Path, help="a store, a checkpoint, or a run, whose newest checkpoint is taken")
    parser.set_defaults(verb=verb)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", metavar="SRC", help=".h5ad files")
    parser.add_argument("--out", type=Path, required=True, help="store folder to make")
    parser.add_argument("--layer", help="layer that holds the counts; X otherwise")
    parser.add_argument("--use-raw", action="store_true", help="read `raw` and its genes")
    parser.add_argument("--species", choices=["human", "mouse"], default="human", help="whose genes the names are")
    parser.add_argument("--gene-id-column", help="column of var with Ensembl ids or symbols; found otherwise")
    parser.add_argument("--obs-columns", nargs="*", help="columns of obs to keep; all otherwise")
    parser.add_argument("--allow-floats", action="store_true", help="store values that are no whole numbers as float32")
    parser.add_argument("--keep-unmapped", action="store_true", help="keep genes that have no Ensembl id")
    parser.add_argument("--shard-cells", type=int, default=65_536, help="cells in a shard")
    parser.add_argument("--replace", action="store_true", help="replace a store at --out once the new one is complete")
    parser.set_defaults(verb=_convert)


def _convert(options: argparse.Namespace) -> None:
    report = convert(
        options.sources,
        options.out,
        layer=options.layer,
        use_raw=options.use_raw,
        species=options.species,
        gene_id_column=options.gene_id_column,
        obs_columns=options.obs_columns,
        allow_floats=options.allow_floats,
        keep_unmapped=options.keep_unmapped,
        shard_cells=options.shard_cells,
        replace=options.replace,
        progress=ProgressLine("converting", "cells"),
    )
    print(report)


def _info(options: argparse.Namespace) -> None:
    options.path = _newest_of_run(options.path)
    if _format_of(options.path) == "celltron-checkpoint":
        from celltron.train.checkpoint import describe_checkpoint

        print(describe_checkpoint(options.path))
    else:
        print(CellStore.open(options.path).info())


def _verify(options: argparse.Namespace) -> None:
    options.path = _newest_of_run(options.path)
    if _format_of(options.path) == "celltron-checkpoint":
        from celltron.train.checkpoint import verify_checkpoint

        verify_checkpoint(options.path)
    elif _format_of(options.path) == "celltron-huggingface":
        verify_artefact(options.path)
    else:
        CellStore.open(options.path).verify(ProgressLine("verifying", "bytes"))
    print(f"{options.path}: every file is there and matches its checksum")


def _medians(options: argparse.Namespace) -> None:
    store = CellStore.open(options.path)
    medians = compute_medians(store, progress=ProgressLine("medians", "cells"))
    medians.to_json(options.out)
    print(f"{options.out}: non-zero medians of {len(medians):,} genes over {len(store):,} cells")


def _newest_of_run(path: Path) -> Path:
    """A run's newest checkpoint, given the run's folder; any other path is given back."""
    if not (path / "checkpoints" / "latest").is_file():
        return path
    from celltron.train.checkpoint import find_checkpoint

    return find_checkpoint(path)


def _format_of(path: Path) -> str:
    """The format that a folder's manifest names, unchecked; empty where there is none, which the opener reports."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(manifest.get("format", "")) if isinstance(manifest, dict) else ""


if __name__ == "__main__":
    sys.exit(main())
