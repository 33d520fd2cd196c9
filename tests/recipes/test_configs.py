"""Shipped configs load, every field is read by something, and `--help` tells of every key."""

import ast
import dataclasses
import importlib
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from celltron.core import load_config
from celltron.core.config_schema import list_keys
from celltron.recipes.geneformer_pretrain import FLAGS
from celltron.recipes.geneformer_pretrain import Config as PretrainConfig

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.py") if '__name__ == "__main__"' in path.read_text())
GIVEN = ["data.paths=a.store", "out=a"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config_loads(path: Path) -> None:
    config = load_config(PretrainConfig, path, GIVEN)
    config.loop.check_batches(1)
    assert config.schedule.warmup_steps < config.loop.max_steps
    (head,) = re.findall(r"\A(?:#.*\n)+", path.read_text())
    assert "--data and --out" in head, "its head says what must be given"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("geneformer_10m", (6, 256, 512, 4)),
        ("geneformer_106m", (12, 768, 3072, 12)),
        ("geneformer_1b", (48, 1280, 5120, 20)),
    ],
)
def test_published_shapes(name: str, shape: tuple[int, ...]) -> None:
    model = load_config(PretrainConfig, ROOT / "recipes" / "configs" / f"{name}.yaml", GIVEN).model
    assert (model.num_layers, model.hidden_size, model.ffn_hidden_size, model.num_attention_heads) == shape


def test_every_recipe_is_seen() -> None:
    assert {path.stem for path in RECIPES} >= {
        "geneformer_pretrain",
        "geneformer_export_hf",
        "geneformer_import_hf",
        "geneformer_import_nemo",
        "quickstart",
    }
    names = "geneformer_tiny geneformer_10m geneformer_10m_bionemo geneformer_106m geneformer_1b"
    assert {path.stem for path in SHIPPED} >= set(names.split())


def config_of(recipe: Path) -> Any:
    return importlib.import_module(f"celltron.recipes.{recipe.stem}").Config


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_help_tells_of_every_key(recipe: Path, warm_python: Any) -> None:
    ended = warm_python.run(recipe, "--help")
    assert ended.code == 0 and ended.stderr == ""
    lines = ended.stdout.splitlines()
    for key in list_keys(config_of(recipe)).values():
        assert key.doc, f"{key.name} of {recipe.name} has no sentence under it"
        assert any(line.strip().startswith((f"{key.name}  ", f"{key.name}:")) for line in lines), key.name
        assert " ".join(key.doc.split()) in " ".join(ended.stdout.split()), key.name


def test_flags_of_the_pretraining() -> None:
    batches = "--micro-batch-size --global-batch-size --seq-length --max-steps --lr --precision --out --resume --data"
    parallel = "--tensor-parallel --pipeline-parallel --context-parallel --sequence-parallel"
    assert {*batches.split(), *parallel.split()} <= set(FLAGS)


def sections(cls: Any) -> Iterator[Any]:
    """A config class and the classes of its sections."""
    yield cls
    for annotation in typing.get_type_hints(cls).values():
        if dataclasses.is_dataclass(annotation):
            yield from sections(annotation)


def names_read(tree: ast.AST) -> Iterator[str]:
    """Attributes that code reads, but not where a class checks itself."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.FunctionDef) and child.name == "__post_init__":
            continue
        if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Load):
            yield child.attr
        yield from names_read(child)


def fields_nobody_reads(config_classes: list[Any], sources: list[str]) -> list[str]:
    read = {name for source in sources for name in names_read(ast.parse(source))}
    classes = {section for config_class in config_classes for section in sections(config_class)}
    fields = {f"{cls.__name__}.{field.name}" for cls in classes for field in dataclasses.fields(cls)}
    return sorted(field for field in fields if field.rpartition(".")[2] not in read)


def test_every_field_is_read() -> None:
    files = [*RECIPES, *ROOT.glob("src/**/*.py"), *ROOT.glob("sub-packages/*/src/**/*.py")]
    assert fields_nobody_reads([config_of(recipe) for recipe in RECIPES], [file.read_text() for file in files]) == []


@dataclasses.dataclass(frozen=True)
class Section:
    used: int = 1
    only_checked: int = 2

    def __post_init__(self) -> None:
        if self.only_checked < 0:
            raise ValueError


@dataclasses.dataclass(frozen=True)
class Example:
    section: Section = dataclasses.field(default_factory=Section)
    forgotten: int = 3


def test_a_field_that_nobody_reads_is_found() -> None:
    source = "config.section.used; config.forgotten = 1\nclass A:\n def __post_init__(self): self.only_checked"
    assert fields_nobody_reads([Example], [source]) == ["Example.forgotten", "Section.only_checked"]
