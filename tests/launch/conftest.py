"""What the tests of launch files share: every command in them must be one that the real parsers understand."""

import contextlib
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from celltron.cli import main as command_line
from celltron.core import parse_arguments
from celltron.recipes import geneformer_pretrain, quickstart

ROOT = Path(__file__).parents[2]
IMAGE_ROOT = "/opt/celltron/"


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def check_command() -> Callable[[list[str]], Any]:
    """`check_command(words)` fails on a command that would not start; gives the config of a `celltron train`.

    Paths below /opt/celltron, where the images keep this repository, must exist in it.
    """

    def check(words: list[str]) -> Any:
        words = [word.replace(IMAGE_ROOT, f"{ROOT}/") for word in words]
        for word in words:
            path = word.rpartition("=")[2]
            assert not path.startswith(str(ROOT)) or Path(path).exists(), path
        program, *arguments = words
        if program == "torchrun":
            options = get_args_parser().parse_args(arguments)
            assert options.module
            assert importlib.util.find_spec(options.training_script), options.training_script
            assert options.training_script == "celltron.cli.main"
            return check(["celltron", *options.training_script_args])
        if program == "python":
            assert arguments[0] == f"{ROOT}/recipes/quickstart.py"
            flags = {"--out": "out", "--device": "device"}
            return parse_arguments(quickstart.Config, arguments[1:], flags=flags).config
        assert program == "celltron"
        if arguments[0] == "train":
            return parse_arguments(geneformer_pretrain.Config, arguments[1:], flags=geneformer_pretrain.FLAGS).config
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                return command_line._make_parser().parse_args(arguments)
            except SystemExit as end:  # --version and --help
                assert not end.code, arguments
                return None

    return check
