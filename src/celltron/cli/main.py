"""The `celltron` command."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from celltron.cells import DamageError, open_cells, verify_store
from celltron.cells.open_cells import format_of
from celltron.cells.store_manifest import FORMAT as STORE_FORMAT
from celltron.cli import cells, launch
from celltron.core import InputError, ProgressLine, __version__, read_manifest, run_command, verify_artefact

_PLAIN_FORMATS = ("celltron-huggingface", "celltron-tokens")
"""Folders that hold no more than their manifest says."""
Verb = Callable[[argparse.Namespace], None]


class _Parser(argparse.ArgumentParser):
    """An argument parser that reports like every other part of celltron."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `celltron` and return its exit code."""
    return run_command(_run, arguments)


def _run(arguments: Sequence[str]) -> None:
    # These read their own command line: config keys and overrides are no argparse flags.
    if arguments and arguments[0] in _WITH_CONFIG:
        _WITH_CONFIG[arguments[0]](arguments[1:])
        return
    options = _make_parser().parse_args(arguments)
    options.verb(options)


def _train(arguments: Sequence[str]) -> None:
    from celltron.recipes import geneformer_pretrain

    geneformer_pretrain.main(arguments)


def _export(arguments: Sequence[str]) -> None:
    from celltron.recipes import geneformer_export_hf

    geneformer_export_hf.main(arguments)


def _plan(arguments: Sequence[str]) -> None:
    from celltron.cli import plan

    plan.main(arguments)


_WITH_CONFIG: dict[str, Callable[[Sequence[str]], None]] = {"train": _train, "export": _export, "plan": _plan}


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="celltron", description="Train foundation models of cells.")
    parser.add_argument("--version", action="version", version=f"celltron {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    cells.add_verbs(verbs)
    _add_verb(verbs.add_parser("info", help="say what a store, tar shards or a checkpoint holds"), _info)
    verify = verbs.add_parser("verify", help="check every file against its checksum")
    verify.add_argument("--workers", type=int, help="threads for cells; one a processor otherwise")
    _add_verb(verify, _verify)
    verbs.add_parser("train", help="pretrain a model: celltron train --config FILE [section.key=value ...]")
    verbs.add_parser("export", help="turn a checkpoint into a Hugging Face folder")
    verbs.add_parser("plan", help="what layouts of a run cost: celltron plan --config FILE --gpus N [--gpu h200]")
    launch.add_verb(verbs)
    return parser


def _add_verb(parser: argparse.ArgumentParser, verb: Verb) -> None:
    parser.add_argument(
        "path",
        help="a store, tar shards, a collection, a cache, a checkpoint, or a run, whose newest checkpoint is taken",
    )
    parser.set_defaults(verb=verb)


def _info(options: argparse.Namespace) -> None:
    path = _newest_of_run(Path(options.path))
    if format_of(path) == "celltron-checkpoint":
        from celltron.train.checkpoint import describe_checkpoint

        print(describe_checkpoint(path))
    elif format_of(path) in _PLAIN_FORMATS:
        print(json.dumps(read_manifest(path, format=format_of(path), versions={1}), indent=1))
    else:
        print(open_cells(options.path).info())


def _verify(options: argparse.Namespace) -> None:
    path = _newest_of_run(Path(options.path))
    if format_of(path) == "celltron-checkpoint":
        from celltron.train.checkpoint import verify_checkpoint

        verify_checkpoint(path)
    elif format_of(path) in _PLAIN_FORMATS:
        verify_artefact(path)
    else:
        _verify_cells(path, options)
    print(f"{options.path}: every file is there and matches its checksum")


def _verify_cells(path: Path, options: argparse.Namespace) -> None:
    """Check cells; all the bad files of a store are listed, one a line, before the sentence that names the first."""
    progress = ProgressLine("verifying", "bytes")
    try:
        if format_of(path) == STORE_FORMAT:
            verify_store(path, workers=options.workers, progress=progress)
        else:
            open_cells(options.path).verify(progress, workers=options.workers)
    except DamageError as error:
        for file, problem in error.bad:
            print(InputError(f"{file}: {problem}"))  # without the terminal escapes that an untrusted name may hold
        raise


def _newest_of_run(path: Path) -> Path:
    """A run's newest checkpoint, given the run's folder; any other path is given back."""
    if not (path / "checkpoints" / "latest").is_file():
        return path
    from celltron.train.checkpoint import find_checkpoint

    return find_checkpoint(path)


if __name__ == "__main__":
    sys.exit(main())
