"""Every command that README.md shows is the real one: it is run as written, on tiny cells and a tiny model."""

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import pytest
import yaml

from celltron.core.config_schema import list_keys
from celltron.recipes.geneformer_pretrain import Config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [line for block in re.findall(r"```\w*\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line]
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
PROGRAMS = {"celltron", "python", "torchrun", "make", "source"}
# What stands for a name of the reader's, and what the README leaves out with an ellipsis.
STANDS_FOR = {"STORE": "my_cells.store", "HF": "runs/first/huggingface", "CHECKPOINT": "imported", "NAME": "counts"}
STANDS_FOR |= {"64": "1"}  # GPUs: the desk's batches have one cell
LEFT_OUT = "tiny.yaml --data my_cells.store --out runs/several"


@pytest.fixture(scope="module")
def desk(
    tmp_path_factory: pytest.TempPathFactory, tiny_cells: anndata.AnnData, tiny_h5ad: Path, tiny_config: Path
) -> Path:
    """A folder with what the README's reader has: cells, and recipes whose model and batches are tiny."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copy(tiny_h5ad, folder / "my_cells.h5ad")
    tiny_cells[:20].write_h5ad(folder / "more_cells.h5ad")
    shutil.copy(tiny_config, folder / "tiny.yaml")
    (folder / "recipes" / "configs").mkdir(parents=True)
    for path in (ROOT / "recipes").glob("*.py"):
        (folder / "recipes" / path.name).symlink_to(path)
    for path in (ROOT / "recipes" / "configs").glob("*.yaml"):
        settings = yaml.safe_load(path.read_text())
        settings["data"]["max_length"] = 8
        settings["model"] |= {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1}
        settings["loop"] |= {"global_batch_size": 1, "micro_batch_size": 1}
        (folder / "recipes" / "configs" / path.name).write_text(yaml.safe_dump(settings))
    return folder


def run_command(line: str, desk: Path, warm_python: Any) -> None:
    """Run one command of the README; it must be one that this test knows, and end well."""
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        assert_target(words)
    elif words[0] == "source":
        assert words == ["source", ".venv/bin/activate"]
    else:
        program = {"celltron": ["-m", "celltron.cli.main"], "torchrun": ["-m", "torch.distributed.run"], "python": []}
        ended = warm_python.run(*program[words[0]], *words[1:], cwd=desk)
        assert ended.code == 0, (line, ended.stderr)


def assert_target(words: list[str]) -> None:
    """The Makefile has the target and knows the variables."""
    makefile = (ROOT / "Makefile").read_text()
    for word in words[1:]:
        name, equals, _ = word.partition("=")
        pattern = rf"^{name} \?=" if equals else rf"^([\w ]+ )?{name}( [\w ]+)?:( |$)"
        assert re.search(pattern, makefile, re.MULTILINE), f"the Makefile has no {word}"


@pytest.fixture(scope="module")
def used_desk(desk: Path, warm_python: Any) -> Path:
    """The desk after all blocks were run, from top to bottom."""
    for line in BLOCKS:
        run_command(line, desk, warm_python)
    return desk


def test_blocks_run_as_written(used_desk: Path) -> None:
    assert {line.split()[0] for line in BLOCKS} <= PROGRAMS
    verbs = [line.split()[1] for line in BLOCKS if line.startswith("celltron ")]
    assert verbs == ["convert", "info", "train", "verify", "export"]
    assert {line for line in BLOCKS if line.startswith("make ")} == {"make quickstart", "make test"}
    assert (used_desk / "runs" / "first" / "huggingface" / "model.safetensors").is_file()


def inline_commands() -> list[str]:
    return [text for text in INLINE if text.split()[0] in PROGRAMS and " " in text]


@pytest.mark.slow
def test_inline_commands_run(used_desk: Path, warm_python: Any) -> None:
    assert any(text.startswith("torchrun ") for text in inline_commands())
    for text in inline_commands():
        # Two processes, not four, for a machine of two cores.
        line = text.replace("…", LEFT_OUT).replace("--nproc-per-node 4", "--nproc-per-node 2")
        line = " ".join(STANDS_FOR.get(word, word) for word in line.split())
        bare_verb = line.startswith("celltron ") and len(line.split()) == 2
        run_command(f"{line} --help" if bare_verb else line, used_desk, warm_python)
    assert (used_desk / "runs" / "several" / "checkpoints" / "latest").is_file()
    assert (used_desk / "medians.json").is_file() and (used_desk / "imported" / "manifest.json").is_file()


@pytest.mark.parametrize("text", [text for text in INLINE if text.startswith("--")])
def test_inline_flags_are_known(text: str, celltron: Callable[..., Any]) -> None:
    flag, *value = text.split()
    helps = [celltron(verb, "--help").stdout for verb in ("convert", "train", "plan")]
    known_to = [printed for printed in helps if re.search(rf"^ +{flag}\b", printed, re.MULTILINE)]
    assert known_to
    assert not value or value[0] in STANDS_FOR or any(value[0] in printed for printed in known_to)


def test_inline_settings_are_known() -> None:
    settings = [word for text in INLINE for word in text.split() if re.fullmatch(r"[a-z_]+\.[a-z_.]+=\S+", word)]
    assert len(settings) >= 2
    assert [word for word in settings if word.partition("=")[0] not in list_keys(Config) | {"section.key": None}] == []


def test_named_places_exist() -> None:
    places = [text for text in INLINE if re.fullmatch(r"[\w.-]+/[\w./-]*", text)]
    assert len(places) >= 5
    assert [text for text in places if not (ROOT / text).exists() and not text.startswith("quickstart")] == []
