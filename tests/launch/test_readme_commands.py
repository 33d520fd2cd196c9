"""The commands of README.md that a cluster or a container engine would run: their files, variables and images exist.

Those of `celltron` itself are run by tests/recipes/test_readme.py.
"""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("\n## On a cluster\n")[2].partition("\n## ")[0]
WORDS = [shlex.split(text) for text in re.findall(r"`([^`\n]+)`", SECTION)]


def commands(program: str) -> list[list[str]]:
    """The section's commands that start a program, with the variables before it."""
    return [words for words in WORDS if program in words]


def test_section_names_every_way_to_start() -> None:
    assert {"celltron", "docker", "kubectl", "pip", "sbatch"} <= {word for words in WORDS for word in words}
    scripts = {path.name for path in ROOT.glob("scripts/slurm/*.sbatch")}
    assert scripts <= {Path(word).name for words in WORDS for word in words}
    assert len(commands("docker")) == 2


def test_batch_script_reads_the_variables_that_are_set_for_it() -> None:
    ((*settings, program, script),) = commands("sbatch")
    assert program == "sbatch" and settings
    text = (ROOT / script).read_text()
    for setting in settings:
        name = setting.partition("=")[0]
        assert f"{name}=${{{name}:-" in text, name


def test_manifest_is_there() -> None:
    (words,) = commands("kubectl")
    assert words[:3] == ["kubectl", "apply", "--filename"] and (ROOT / words[3]).is_file() and len(words) == 4


@pytest.mark.parametrize("words", commands("docker"), ids=" ".join)
def test_image_is_built_from_the_repository_as_its_dockerfile_says(words: list[str]) -> None:
    assert words[:2] == ["docker", "build"] and words[-1] == "."
    file = words[words.index("--file") + 1] if "--file" in words else "Dockerfile"
    assert f"#   {' '.join(words)}\n" in (ROOT / file).read_text()


def test_extra_is_there() -> None:
    ((*words, requirement),) = commands("pip")
    assert words == ["pip", "install", "-e"]
    (extra,) = re.findall(r"\.\[(\w+)\]", requirement)
    assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
