"""Checkpoints of several layouts, exported by the recipe, against `transformers` and against each other."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, BertForMaskedLM

from celltron.core import run_command, verify_artefact
from celltron.recipes import geneformer_export_hf, geneformer_import_hf
from celltron.train.checkpoint import read_run_state, verify_checkpoint

PROGRAM = Path(__file__).with_name("export_layouts.py")
NUM_RANKS = 4
IN_FLOAT32 = ("tp2_pp2", "tp2_sp_pp2", "tp2_fsdp2", "one")


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("export_layouts", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(run_ranks: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the program wrote; every rank must have come to its end."""
    folder = tmp_path_factory.mktemp("layouts")
    run_ranks(PROGRAM, folder, world_size=NUM_RANKS)
    ranks = [json.loads((folder / f"rank.{rank}.json").read_text())["launch"]["rank"] for rank in range(NUM_RANKS)]
    assert ranks == list(range(NUM_RANKS))
    return folder


def load_tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.hf" / "model.safetensors")


@torch.no_grad()
def reference_logits(folder: Path, program: ModuleType) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of transformers, for every micro-batch, with where there is padding; both over [B x S]."""
    model = AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    assert type(model) is BertForMaskedLM
    return [
        (model(input_ids=tokens, attention_mask=(~is_padding).long()).logits.flatten(0, 1), is_padding.flatten())
        for tokens, is_padding in program.draw_cells()
    ]


@pytest.mark.parametrize("layout", IN_FLOAT32)
def test_transformers_gives_the_logits_of_the_layout(folder: Path, program: ModuleType, layout: str) -> None:
    ours = load_file(folder / f"{layout}.safetensors")
    assert len(ours) == 2
    for place, (theirs, is_padding) in enumerate(reference_logits(folder / f"{layout}.hf", program)):
        assert theirs.abs().max() > 1.0 and theirs.shape == ours[str(place)].shape
        difference = (ours[str(place)] - theirs)[~is_padding].abs().max().item()
        assert difference <= 1e-5, (place, difference)


def test_every_layout_exports_the_same_bits(folder: Path) -> None:
    first, *others = (load_tensors(folder, name) for name in IN_FLOAT32)
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[name], first[name]) for name in first)
    verify_artefact(folder / "tp2_pp2.hf")


def test_a_bfloat16_checkpoint_exports_its_very_values(folder: Path) -> None:
    exact, rounded = load_tensors(folder, "one"), load_tensors(folder, "one_bf16")
    for name, tensor in rounded.items():
        assert tensor.dtype is torch.float32 and torch.equal(tensor, tensor.bfloat16().float())
        # Drawn and scrambled in bfloat16: each of the two sums is rounded by at most one part in 256.
        torch.testing.assert_close(tensor, exact[name], rtol=2 / 256, atol=2e-3)


def test_an_import_and_its_export_give_the_same_bits(folder: Path, program: ModuleType) -> None:
    first, second = load_tensors(folder, "one"), load_tensors(folder, "imported")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    for name in ("config.json", "token_dictionary.json", "gene_median_dictionary.json", "tokenization.json"):
        assert (folder / "one.hf" / name).read_text() == (folder / "imported.hf" / name).read_text()
    rounded = load_tensors(folder, "imported_bf16")
    assert all(torch.equal(first[name].bfloat16(), rounded[name]) for name in first)


def test_an_import_is_a_checkpoint_of_its_own(folder: Path) -> None:
    verify_checkpoint(folder / "imported")
    state = read_run_state(folder / "imported")
    assert (state.step, state.has_optimizer, state.dtype) == (0, False, "float32")
    refused = json.loads((folder / "rank.0.json").read_text())["refused"]["resume from an import"]
    assert "without an optimizer's state" in refused
    # Nothing but the checkpoint's folder itself was written.
    assert not (folder / "latest").exists() and not list(folder.glob(".*"))


def test_the_card_says_what_the_run_tells(folder: Path) -> None:
    card = (folder / "one.hf" / "README.md").read_text()
    for fact in (
        "| training steps | 7 |",
        "| training cells | 1,234 |",
        "| validation cells | 56, set aside by donor |",
        "| validation loss, nats a masked gene | 4.5000 |",
        "| longest cell, in tokens | 20 |",
    ):
        assert fact in card
    assert "validation loss" not in (folder / "tp2_pp2.hf" / "README.md").read_text()
    assert "imported into celltron" in (folder / "imported.hf" / "README.md").read_text()
    assert str(folder) not in card


def find_shard(run: Path) -> Path:
    return next(run.glob("checkpoints/*/state/*.distcp"))


def spoil_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


SPOILERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte": (lambda run: spoil_byte(find_shard(run)), "does not fit its checksum"),
    "missing shard": (lambda run: find_shard(run).unlink(), "missing"),
    "no manifest": (lambda run: next(run.glob("checkpoints/*/manifest.json")).unlink(), "manifest.json"),
    "strange latest": (lambda run: (run / "checkpoints" / "latest").write_text("../elsewhere"), "no checkpoint's name"),
    "no checkpoint": (lambda run: shutil.rmtree(run / "checkpoints"), "it has no manifest.json"),
    "no run": (shutil.rmtree, "is no checkpoint folder"),
    "folder in use": (lambda run: shutil.copytree(run, run.parent / "hf"), "exists already"),
}


@pytest.mark.parametrize("fault", SPOILERS)
def test_an_export_that_cannot_be_made_is_refused_and_leaves_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    run, out = tmp_path / "run", tmp_path / "hf"
    shutil.copytree(folder / "one", run)
    spoil, expected = SPOILERS[fault]
    spoil(run)
    before = sorted(tmp_path.rglob("*"))
    assert run_command(geneformer_export_hf.main, ["--checkpoint", str(run), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--out", "a"], "folder is empty"),
        (["--folder", "a"], "out is empty"),
        (["--folder", "{hf}", "--out", "{out}", "--vocabulary", "gc30M"], "has 25,426 tokens, but the model in"),
        (["--folder", "{hf}", "--out", "{out}", "--seq-length", "25"], "max_length is 25, but the model in"),
        (["--folder", "{bare}", "--out", "{out}"], "name them with --vocabulary: gc30M (25,426 tokens)"),
        (["--folder", "{hf}", "--out", "{out}", "--vocabluary", "gc30M"], "did you mean --vocabulary"),
        (["--folder", "{hf}", "--out", "{bare}"], "exists already"),
    ],
)
def test_an_import_that_cannot_be_made_is_refused_and_leaves_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / "one.hf" / name, bare)
    places = {"hf": folder / "one.hf", "out": tmp_path / "out", "bare": bare}
    words = [word.format(**places) for word in arguments]
    assert run_command(geneformer_import_hf.main, words) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]
