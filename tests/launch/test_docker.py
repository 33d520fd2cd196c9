"""The Dockerfiles and the smoke script, without an engine: all paths and commands, and what hadolint asks for."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILES = {"cuda": ROOT / "Dockerfile", "cpu": ROOT / "docker" / "cpu.Dockerfile"}
BASES = {"cuda": r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", "cpu": r"python:3\.11-slim"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PARTS = sorted(path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("sub-packages/*/pyproject.toml"))
BUILT_IN = {"ENTRYPOINT", "CMD", "FROM", "LABEL", "RUN", "WORKDIR", "COPY", "USER", "ENV"}


@dataclass(frozen=True)
class Instruction:
    """A line of a Dockerfile, continued lines joined."""

    name: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def parse(path: Path) -> list[Instruction]:
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def shell_commands(instruction: Instruction) -> list[list[str]]:
    """The commands of a RUN."""
    return [shlex.split(command) for command in instruction.text.split(" && ")]


def is_ignored(name: str) -> bool:
    """Whether .dockerignore keeps a file from the builder: the last line that matches it or a folder above decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").removeprefix("**/")
        anywhere = "**/" in line
        parts = name.split("/")
        above = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
        if any(fnmatch(part if anywhere else path, pattern) for part, path in zip(parts, above, strict=True)):
            ignored = not line.startswith("!")
    return ignored


@pytest.fixture(params=DOCKERFILES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def instructions(kind: str) -> list[Instruction]:
    return parse(DOCKERFILES[kind])


def test_base_has_a_fixed_tag(kind: str, instructions: list[Instruction]) -> None:
    assert [instruction.name for instruction in instructions].count("FROM") == 1
    assert re.fullmatch(BASES[kind], instructions[0].text)
    assert {instruction.name for instruction in instructions} <= BUILT_IN, "no ADD among them"


def test_user_is_not_root(instructions: list[Instruction]) -> None:
    last = max(place for place, instruction in enumerate(instructions) if instruction.name == "USER")
    (made,) = (one.words for one in instructions[:last] if one.text.startswith("useradd"))
    assert made[-1] == "celltron"
    # By number, which Kubernetes can tell from root's.
    assert instructions[last].text == made[made.index("--uid") + 1] == "1001"
    after = [instruction for instruction in instructions[last:] if instruction.name in ("RUN", "COPY")]
    assert [instruction.text for instruction in after] == ["celltron --version"]


def test_labels_say_what_it_is(instructions: list[Instruction]) -> None:
    (label,) = (instruction for instruction in instructions if instruction.name == "LABEL")
    labels = dict(word.removeprefix("org.opencontainers.image.").split("=", 1) for word in label.words)
    assert labels["title"] == PROJECT["name"]
    assert labels["version"] == PROJECT["version"]
    assert labels["licenses"] == PROJECT["license"]
    assert labels["base.name"].endswith(instructions[0].text)
    assert labels["description"]


def test_starts_celltron(instructions: list[Instruction], check_command: Callable[[list[str]], Any]) -> None:
    starts = {one.name: json.loads(one.text) for one in instructions if one.name in ("ENTRYPOINT", "CMD")}
    assert starts["ENTRYPOINT"] == ["celltron"] and "celltron" in PROJECT["scripts"]
    check_command(starts["ENTRYPOINT"] + starts["CMD"])
    check_command(["celltron", "--version"])


def test_copied_files_are_there_and_reach_the_builder(instructions: list[Instruction]) -> None:
    for instruction in instructions:
        if instruction.name != "COPY":
            continue
        *sources, target = [word for word in instruction.words if not word.startswith("--")]
        for source in sources:
            assert (ROOT / source).exists(), source
            assert not is_ignored(source), source
            assert target in ("./", source, f"{Path(source).parent}/"), "the image has the places of the repository"


def test_builder_gets_no_more_than_it_needs() -> None:
    for name in (".git/config", ".venv/bin/python", "runs/a/config.yaml", "cells.store/manifest.json", "tests/x.py"):
        assert is_ignored(name), name
    for name in ("src/celltron/cli/__pycache__/a.pyc", f"{PARTS[0]}/tests/test_a.py", "recipes/celltron.egg-info/x"):
        assert is_ignored(name), name
    assert not is_ignored("recipes/data/pbmc_citeseq/pbmc_citeseq.h5ad")
    assert not is_ignored(f"{PARTS[0]}/src/celltron/cells/store.py")


def test_dependencies_come_before_the_code(instructions: list[Instruction]) -> None:
    copies = [(place, one.words) for place, one in enumerate(instructions) if one.name == "COPY"]
    installs = [place for place, one in enumerate(instructions) if "-r docker/requirements.txt" in one.text]
    code = [place for place, words in copies if {"src", "recipes", "sub-packages"} & set(words)]
    assert len(installs) == 1 and len(code) == 3 and max(installs) < min(code)
    early = {word for place, words in copies if place < installs[0] for word in words}
    assert {f"{part}/pyproject.toml" for part in PARTS} | {"pyproject.toml"} <= early, "a new part is to be copied too"


def test_pip_is_constrained_and_leaves_no_cache(kind: str, instructions: list[Instruction]) -> None:
    written, installed = {"constraints.txt"} if kind == "cpu" else set(), []
    for instruction in instructions:
        for words in shell_commands(instruction) if instruction.name == "RUN" else []:
            assert words[0] not in ("apt-get", "apt", "sudo", "cd", "curl", "wget"), "would need cleaning or checking"
            if words[:2] == ["pip", "install"]:
                assert "--no-cache-dir" in words
                assert words[words.index("-c") + 1] in written, words
                installed += words[2:]
            if ">" in words:
                written.add(words[words.index(">") + 1])
    if kind == "cuda":
        assert "docker/installed.txt" in written and "torch" not in installed, "the image's own PyTorch stays"
    else:
        assert "https://download.pytorch.org/whl/cpu" in installed
    editable = [installed[place + 1] for place, word in enumerate(installed) if word == "-e"]
    assert sorted(editable) == [".", *PARTS]


def test_requirements_are_those_of_the_packages(kind: str, instructions: list[Instruction]) -> None:
    (run,) = (one for one in instructions if "list_requirements.py" in one.text and one.name == "RUN")
    (words,) = (words for words in shell_commands(run) if "docker/list_requirements.py" in words)
    words = words[: words.index(">")]
    assert words[0] == "python"
    printed = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = printed.stdout.splitlines()
    expected = set()
    for part in PARTS:
        project = tomllib.loads((ROOT / part / "pyproject.toml").read_text())["project"]
        expected |= {line for line in project["dependencies"] if not line.startswith("celltron")}
    assert expected <= set(lines) and lines == sorted(set(lines))
    assert {"setuptools>=77", "transformers>=5", "s3fs>=2024.6", "aiohttp>=3.9"} <= set(lines)
    # Beside CUDA versions are the image's, which these might not fit.
    assert ({"wandb>=0.31,<1", "tensorboard>=2.21"} <= set(lines)) is (kind == "cpu")
    assert not any(line.startswith("celltron") for line in lines)


def test_examples_in_comments_are_understood(kind: str, check_command: Callable[[list[str]], Any]) -> None:
    comments = re.findall(r"^#(.*)$", DOCKERFILES[kind].read_text(), re.MULTILINE)
    examples = re.findall(rf"celltron:{kind} (?!\.$)(.*)", "\n".join(comments), re.MULTILINE)
    assert examples
    for example in examples:
        words = example.split()
        if words[-1] == "...":
            words = ["torchrun", *words[:-1], "--help"]
            with pytest.raises(SystemExit):  # celltron train's help
                check_command(words)
        else:
            check_command(["celltron", *words])


ENGINE = r"""#!/bin/bash
printf '%s\0' "$@" >>"$FAKE/calls"
printf '\n' >>"$FAKE/calls"
for word in "$@"; do
    folder=${word%:/data}/quickstart
    if [[ "$word" == *:/data ]]; then mkdir -p "$folder" && echo {} >"$folder/summary.json"; fi
done
"""


def run_smoke(folder: Path, engine: str, *arguments: str) -> tuple[str, list[list[str]]]:
    """What the smoke script prints, and how it calls the container engine."""
    (folder / engine).write_text(ENGINE)
    (folder / engine).chmod(0o755)
    for name in ("bash", "dirname", "basename", "mktemp", "rm", "id", "mkdir"):
        found = subprocess.run(["bash", "-c", f"command -v {name}"], capture_output=True, text=True, check=True)
        (folder / name).symlink_to(found.stdout.strip())
    command = ["bash", str(ROOT / "docker" / "smoke.sh"), *arguments]
    environment = {"PATH": str(folder), "FAKE": str(folder), "TMPDIR": str(folder)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return ended.stdout, [line.split("\0")[:-1] for line in (folder / "calls").read_text().splitlines()]


def test_smoke_script_builds_and_runs_commands_that_are_understood(
    tmp_path: Path, check_command: Callable[[list[str]], Any]
) -> None:
    printed, (build, *runs) = run_smoke(tmp_path, "docker")
    assert build == ["build", "--file", "docker/cpu.Dockerfile", "--tag", "celltron:smoke", "."]
    assert printed == "celltron:smoke works\n" and len(runs) == 4
    for words in runs:
        assert words[0] == "run" and "--rm" in words and "--user" in words
        options, command = words[: words.index("celltron:smoke")], words[words.index("celltron:smoke") + 1 :]
        program = options[options.index("--entrypoint") + 1] if "--entrypoint" in options else "celltron"
        check_command([program, *command])
    assert not list(tmp_path.glob("tmp.*")), "nothing is left behind"


def test_smoke_script_tries_a_built_image_with_podman(tmp_path: Path) -> None:
    printed, runs = run_smoke(tmp_path, "podman", "celltron:cuda")
    assert printed == "celltron:cuda works\n"
    assert len(runs) == 4 and all("--userns=keep-id" in words and "celltron:cuda" in words for words in runs)


def test_smoke_script_says_when_there_is_no_engine(tmp_path: Path) -> None:
    (tmp_path / "dirname").symlink_to("/usr/bin/dirname")
    command = ["/bin/bash", str(ROOT / "docker" / "smoke.sh")]
    ended = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and "neither docker nor podman" in ended.stderr
