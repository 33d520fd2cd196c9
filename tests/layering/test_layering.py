"""The rules of the house, held against every Python file: who imports whom, what a part ships, how long things are."""

import ast
import os
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = tomllib.loads(Path(__file__).with_name("table.toml").read_text(encoding="utf-8"))

GENERATED_FOLDERS = {"build", "dist", "__pycache__"}
DYNAMIC_IMPORTS = {"__import__", "import_module", "importorskip"}
TOP_PARTS = {"recipes", "cli"}  # nothing but the command line and the tests at the root may import these
MAX_FUNCTION_LINES = 60
MAX_LOOP_LINES = 100  # the training loop is read in one place, from top to bottom
MAX_FILE_LINES = 400
MAX_SCRIPT_LINES = 50


@dataclass(frozen=True)
class SourceFile:
    """A Python file, its place in the house, and its syntax tree."""

    name: str  # from the root, with slashes
    part: str | None  # as in celltron.<part>; None in tests, scripts and strays
    part_folder: str | None
    is_test: bool
    num_lines: int
    tree: ast.Module

    @property
    def name_in_part(self) -> str:
        return self.name.removeprefix(f"{self.part_folder}/")

    @property
    def owner(self) -> str | None:
        """The part whose row says which parts may be imported here: tests of a sub-package keep its row too."""
        names = self.name.split("/")
        return names[1].removeprefix("celltron-") if self.is_test and names[0] == "sub-packages" else self.part

    @property
    def package(self) -> list[str]:
        """The package that relative imports start from."""
        if self.part is None:
            return self.name.split("/")[:-1]
        return ["celltron", self.part, *self.name_in_part.split("/")[:-1]]


def read_file(root: Path, path: Path) -> SourceFile:
    name = path.relative_to(root).as_posix()
    folders = name.split("/")[:-1]
    text = path.read_text(encoding="utf-8")
    part_folder = None
    if folders[:1] == ["recipes"]:
        part_folder = "recipes"
    elif "src" in folders:
        start = folders.index("src")
        if folders[start + 1 : start + 2] == ["celltron"] and len(folders) > start + 2:
            part_folder = "/".join(folders[: start + 3])
    return SourceFile(
        name=name,
        part=part_folder.rsplit("/", 1)[-1] if part_folder else None,
        part_folder=part_folder,
        is_test="tests" in folders,
        num_lines=len(text.splitlines()),
        tree=ast.parse(text, filename=name),
    )


def find_files(root: Path) -> list[SourceFile]:
    """Every Python file below the root, except in hidden and generated folders."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in GENERATED_FOLDERS and not name.startswith("."))
        found += [read_file(root, Path(folder, name)) for name in sorted(names) if name.endswith(".py")]
    return found


def resolve(file: SourceFile, level: int, name: str) -> str:
    """The absolute name of an import with `level` leading dots; empty when it climbs above the top."""
    if level == 0:
        return name
    base = file.package[: len(file.package) - level + 1]
    return ".".join([*base, name]).rstrip(".") if base else ""


def find_imports(file: SourceFile) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import, wherever it stands; `from a import b` counts as `a.b`."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = ".".join(part for part in (node.module, alias.name) if part and part != "*")
                yield node.lineno, resolve(file, node.level, name)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in DYNAMIC_IMPORTS and isinstance(node.args[0].value, str):
                name = node.args[0].value.lstrip(".")
                yield node.lineno, resolve(file, len(node.args[0].value) - len(name), name)


def refuse_part(file: SourceFile, name: str) -> str | None:
    """Why this file may not import celltron.<name>, or None when it may."""
    target = name.partition(".")[0]
    if file.is_test and file.owner is None:
        return None
    if file.part == "recipes" and target == "recipes":
        # A benchmark measures what a recipe runs.
        is_free = file.name.startswith("recipes/benchmarks/") or name.startswith("recipes.shared.")
        return None if is_free else "recipes do not import each other"
    if target == file.owner:
        return None
    if target in TOP_PARTS and file.part != "cli":
        return "nothing imports it but the command line and the tests at the root"
    allowed = TABLE[file.owner]["parts"] if file.owner else ["*"]
    if "*" in allowed or target in allowed:
        return None
    return f"{file.owner} may import of celltron only {', '.join(allowed) or 'itself'}"


def refuse_outside(file: SourceFile, name: str) -> str | None:
    """Why this file may not import this name of another project, or None when it may."""
    if file.part is None or file.is_test:
        return None
    row = TABLE[file.part]
    for package, patterns in row.get("only_in", {}).items():
        if f"{name}.".startswith(f"{package}."):
            if any(fnmatch(file.name_in_part, pattern) for pattern in patterns):
                return None
            return f"in {file.part} only {', '.join(patterns)} may import {package}"
    if any(f"{name}.".startswith(f"{package}.") for package in row["outside"]):
        return None
    return f"it is not in the row of {file.part} in tests/layering/table.toml"


def check_imports(root: Path) -> list[str]:
    """Every import obeys the table."""
    faults = []
    for file in find_files(root):
        if file.owner is not None and file.owner not in TABLE:
            faults.append(f"{file.name}: the part {file.owner} has no row in tests/layering/table.toml")
            continue
        for line, name in find_imports(file):
            top, _, rest = name.partition(".")
            if top == "":
                reason: str | None = "it climbs above the top of the package"
            elif top == "celltron":
                reason = refuse_part(file, rest) if rest else None
            else:
                reason = None if top in sys.stdlib_module_names else refuse_outside(file, name)
            if reason:
                faults.append(f"{file.name}:{line}: imports {name}: {reason}")
    return faults


def check_places(root: Path) -> list[str]:
    """Sources lie in src/celltron/<part>/ of their own distribution, so nothing stands in the namespace itself."""
    faults = []
    for file in find_files(root):
        folders = file.name.split("/")[:-1]
        if file.name.endswith("src/celltron/__init__.py"):
            faults.append(f"{file.name}: hides the other distributions of the namespace; delete it")
        elif "src" in folders and file.part is None:
            faults.append(f"{file.name}: belongs to no part; sources lie in src/celltron/<part>/")
        elif folders[:1] == ["sub-packages"] and file.part and folders[1] != f"celltron-{file.part}":
            faults.append(f"{file.name}: the part {file.part} belongs in sub-packages/celltron-{file.part}")
    return faults


def check_markers(root: Path) -> list[str]:
    """Every part ships py.typed."""
    folders = sorted({file.part_folder for file in find_files(root) if file.part_folder})
    return [f"{folder}/py.typed: is missing" for folder in folders if not (root / folder / "py.typed").is_file()]


def check_function_lengths(root: Path) -> list[str]:
    """A function fits on a page."""
    faults = []
    for file in find_files(root):
        limit = MAX_LOOP_LINES if (file.part, file.name_in_part) == ("train", "loop.py") else MAX_FUNCTION_LINES
        for node in ast.walk(file.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None, node.name
                num_lines = node.end_lineno - node.lineno + 1
                if num_lines > limit:
                    faults.append(f"{file.name}:{node.lineno}: {node.name} has {num_lines} lines, of at most {limit}")
    return faults


def check_file_lengths(root: Path) -> list[str]:
    """A file of a part has at most 400 lines, a script 50."""
    faults = []
    for file in find_files(root):
        limit = MAX_SCRIPT_LINES if file.name.startswith("scripts/") else MAX_FILE_LINES
        if (file.part or file.name.startswith("scripts/")) and file.num_lines > limit:
            faults.append(f"{file.name}: has {file.num_lines} lines, of at most {limit}")
    return faults


RULES = [check_imports, check_places, check_markers, check_function_lengths, check_file_lengths]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_tree_keeps_the_rule(rule) -> None:
    assert rule(ROOT) == []


def test_tree_is_seen() -> None:
    files = find_files(ROOT)
    assert {file.part for file in files} >= {"core", "cells", "models", "train", "recipes", "cli", None}
    assert sum(1 for file in files for _ in find_imports(file)) > 200


CORE = "sub-packages/celltron-core/src/celltron/core"
CELLS = "sub-packages/celltron-cells/src/celltron/cells"
MODELS = "sub-packages/celltron-models/src/celltron/models"
TRAIN = "sub-packages/celltron-train/src/celltron/train"

BAD_IMPORTS = {
    f"{CORE}/a.py": "import torch",
    f"{CORE}/b.py": "def f():\n    from celltron.cells import CellStore",
    f"{CORE}/c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import celltron.models.geneformer.config",
    f"{CORE}/d.py": "from .. import models",
    f"{CORE}/e.py": "from celltron import train",
    f"{CORE}/f.py": "import importlib\nimportlib.import_module('torch.nn')",
    f"{CORE}/g.py": "from .... import anything",
    f"{CORE}/deep/h.py": "from ...cells.store import CellStore",
    f"{CELLS}/store.py": "from torch import Tensor",
    f"{CELLS}/readers/loader.py": "import torch",
    f"{CELLS}/i.py": "from celltron.models import geneformer",
    f"{MODELS}/geneformer/model.py": "def f():\n    import transformers",
    f"{MODELS}/huggingface.py": "import transformers",
    f"{MODELS}/j.py": "import megatron.training",
    f"{MODELS}/k.py": "from celltron.train.loop import fit",
    f"{TRAIN}/l.py": "try:\n    from celltron.models.geneformer import model\nexcept ImportError:\n    pass",
    f"{TRAIN}/m.py": "from celltron.recipes.geneformer_pretrain import main",
    f"{TRAIN}/n.py": "import celltron.cli.main",
    "sub-packages/celltron-train/tests/test_o.py": "from celltron.models.geneformer import model",
    "sub-packages/celltron-cells/tests/test_p.py": "from celltron.recipes import geneformer_pretrain",
    "recipes/q.py": "from celltron.recipes.geneformer_pretrain import main",
    "recipes/r.py": "from . import geneformer_pretrain",
    "recipes/s.py": "import geneformer_pretrain",
    "recipes/shared/w.py": "from celltron.recipes.geneformer_pretrain import main",
    "recipes/t.py": "from transformers import AutoModel",
    "recipes/configs/u.py": "from ..geneformer_pretrain import main",
    "scripts/v.py": "import celltron.recipes.geneformer_pretrain",
    "sub-packages/celltron-new/src/celltron/new/w.py": "import os",
}

GOOD_IMPORTS = {
    "recipes/benchmarks/train.py": "from celltron.recipes.geneformer_pretrain import main",
    "recipes/x.py": "from celltron.recipes.shared.pretrain_config import Config",
    f"{CORE}/a.py": "from __future__ import annotations\nimport json, numpy as np\nfrom .errors import InputError",
    f"{CELLS}/torch_dataset.py": "import torch.utils.data\nfrom celltron.core import errors, genes",
    f"{MODELS}/geneformer/huggingface.py": "import transformers\nfrom ..layers import norm\nfrom . import config",
    f"{TRAIN}/b.py": "from megatron import core\nimport megatron.core.optimizer",
    "sub-packages/celltron-models/tests/test_c.py": "import transformers\nimport celltron.models, celltron.core",
    "recipes/geneformer_pretrain.py": "import torch\nimport celltron.cells, celltron.models, celltron.train",
    "src/celltron/cli/train.py": "from celltron.recipes.geneformer_pretrain import main\nimport celltron.cells",
    "tests/recipes/test_d.py": "import celltron.recipes.geneformer_pretrain, celltron.cli.main, transformers",
    "scripts/e.py": "import anndata, celltron.cells",
}


def plant(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name", BAD_IMPORTS)
def test_a_bad_import_is_found(tmp_path: Path, name: str) -> None:
    plant(tmp_path, name, BAD_IMPORTS[name])
    (fault,) = check_imports(tmp_path)
    assert fault.startswith(f"{name}:")


@pytest.mark.parametrize("name", GOOD_IMPORTS)
def test_a_good_import_is_let_through(tmp_path: Path, name: str) -> None:
    plant(tmp_path, name, GOOD_IMPORTS[name])
    assert check_imports(tmp_path) == []


@pytest.mark.parametrize(
    ("rule", "name", "text"),
    [
        (check_places, "src/celltron/__init__.py", ""),
        (check_places, "sub-packages/celltron-core/src/celltron/__init__.py", ""),
        (check_places, "src/celltron/stray.py", ""),
        (check_places, "src/stray.py", ""),
        (check_places, "sub-packages/celltron-core/src/celltron/cells/store.py", ""),
        (check_markers, f"{CORE}/__init__.py", ""),
        (check_markers, "recipes/__init__.py", ""),
        (check_function_lengths, "recipes/a.py", "def f():\n" + "    pass\n" * 60),
        (check_function_lengths, f"{CORE}/a.py", "class A:\n    async def f(self):\n" + "        pass\n" * 60),
        (check_function_lengths, f"{TRAIN}/loop.py", "def f():\n" + "    pass\n" * 100),
        (check_file_lengths, "recipes/a.py", "x = 1\n" * 401),
        (check_file_lengths, f"{CORE}/a.py", "x = 1\n" * 401),
        (check_file_lengths, "scripts/a.py", "x = 1\n" * 51),
    ],
)
def test_a_broken_rule_is_found(tmp_path: Path, rule, name: str, text: str) -> None:
    plant(tmp_path, name, text)
    (fault,) = rule(tmp_path)
    assert name.rsplit("/", 1)[0] in fault


def test_lengths_at_the_limit_are_let_through(tmp_path: Path) -> None:
    plant(tmp_path, "recipes/a.py", "def f():\n" + "    pass\n" * 59)
    plant(tmp_path, "recipes/b.py", "x = 1\n" * 400)
    plant(tmp_path, f"{TRAIN}/loop.py", "def f():\n" + "    pass\n" * 99)
    plant(tmp_path, "tests/golden/test_long_files_are_allowed_here.py", "x = 1\n" * 401)
    assert check_function_lengths(tmp_path) == check_file_lengths(tmp_path) == []


def test_generated_and_hidden_folders_are_passed_over(tmp_path: Path) -> None:
    plant(tmp_path, f"build/lib/{CORE}/a.py", "import torch")
    plant(tmp_path, ".venv/lib/src/celltron/__init__.py", "import torch")
    assert find_files(tmp_path) == []
