"""A run that was killed or stopped, and continued, is the run that was not; on the same processes bit for bit."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anndata
import pytest
import torch

from celltron.cells import convert
from celltron.cells.corpus import DataConfig
from celltron.core import InputError
from celltron.recipes.benchmarks.compare_runs import read_metrics, read_tensors
from celltron.recipes.shared.pretrain_config import Config
from celltron.recipes.shared.pretrain_resume import claim_folder, note_origin
from celltron.train.launch import Launch, start_process_group

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

PROGRAM = Path(__file__).with_name("run_recipe.py")
RANKS = Path(__file__).parents[1] / "equivalence" / "ranks.py"
# 35 of the 41 cells train, four a step: an epoch ends inside a batch, and step 20 lies inside the third epoch.
NUM_CELLS = 41
MAX_STEPS = 40
SETTINGS = [
    "--global-batch-size=4",
    f"--max-steps={MAX_STEPS}",
    "loop.validate_every=15",
    "loop.save_every=10",
    "loop.keep_checkpoints=0",
]


@dataclass(frozen=True)
class Layout:
    world_size: int
    flags: tuple[str, ...] = ()


ONE = Layout(1)
DP2 = Layout(2)
DP2_ZERO = Layout(2, ("--distributed-optimizer",))
TP2 = Layout(2, ("--tensor-parallel=2",))
TP2_ZERO = Layout(2, ("--tensor-parallel=2", "--distributed-optimizer"))
PP2 = Layout(2, ("--pipeline-parallel=2",))
CP2 = Layout(2, ("--context-parallel=2",))
CP2_ZERO = Layout(2, ("--context-parallel=2", "--distributed-optimizer"))
TP2_DP2 = Layout(4, ("--tensor-parallel=2",))
FSDP2 = Layout(2, ("--fsdp",))
# Two token types leave one of three processes none.
FSDP3 = Layout(3, ("--fsdp",))

Train = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_cells: anndata.AnnData) -> Path:
    """Where this file's runs lie, with their store."""
    path = tmp_path_factory.mktemp("resume")
    tiny_cells[:NUM_CELLS].write_h5ad(path / "cells.h5ad")
    convert([path / "cells.h5ad"], path / "cells.store")
    return path


@pytest.fixture(scope="module")
def train(folder: Path, tiny_config: Path, warm_python: Any) -> Train:
    """Runs the recipe with this file's settings, stopped at a moment or not."""

    def run(out: Path, layout: Layout, *arguments: object, moment: str = "-", record: object = "-") -> Any:
        (folder / "rendezvous").unlink(missing_ok=True)
        launcher = [] if layout.world_size == 1 else [RANKS, layout.world_size, folder / "rendezvous"]
        store = folder / "cells.store"
        settings = ["--config", tiny_config, "--data", store, *SETTINGS, "--out", out, *layout.flags, *arguments]
        return warm_python.run(*launcher, PROGRAM, record, moment, *settings)

    return run


@pytest.fixture(scope="module")
def whole(folder: Path, train: Train) -> Path:
    """The run of one process that nothing disturbed."""
    ended = train(folder / "whole", ONE, record=folder / "whole.batches")
    assert ended.code == 0, ended.stderr
    return folder / "whole"


def checkpoint_names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.name.startswith("step_"))


def assert_same_so_far(run: Path, whole: Path) -> None:
    """The run's metrics are the beginning of the whole run's, and its common checkpoints hold the same bits."""
    metrics = read_metrics(run)
    assert metrics == read_metrics(whole)[: len(metrics)]
    for name in set(checkpoint_names(run)) & set(checkpoint_names(whole)):
        tensors, others = read_tensors(run / "checkpoints" / name), read_tensors(whole / "checkpoints" / name)
        assert tensors.keys() == others.keys() > {"output_layer.bias", "optimizer.state.exp_avg_sq.output_layer.bias"}
        assert [key for key in tensors if not torch.equal(tensors[key], others[key])] == []


def test_a_run_goes_through_several_epochs_and_ends_inside_one(whole: Path) -> None:
    batches = read_batches(whole.with_name("whole.batches"), ONE)
    assert [len(batch["cells"]) for batch in batches] == [4] * MAX_STEPS
    assert len(set(batches[17]["epochs"])) > 1 and batches[20]["epochs"] == [2] * 4
    state = json.loads((whole / "checkpoints" / "step_00000020" / "run.json").read_text())
    assert state["loader"].pop("next_cells") in range(1, 2**32)
    assert state["loader"] == {"seed": 0, "epoch": 2, "position": 10}


def random_delay(name: str, most_seconds: float) -> str:
    """The same at every call."""
    return f"{random.Random(name).uniform(0.0, most_seconds):.4f}"


# In this order, each continued from what the one before it left. A step takes 10 ms or more, a checkpoint 50 ms, beside
# the next steps.
KILLS = [
    (f"KILL@{random.Random(40).randint(21, 26)}+{random_delay('step', 0.02)}", -9, None),
    (f"KILL@save 30+{random_delay('save', 0.05)}", -9, None),
    ("KILL@finish 30", -9, "step_00000020"),
    ("KILL@latest 30", -9, "step_00000030"),
    ("TERM@33", 143, None),
    ("INT@37", 130, None),
]


@pytest.mark.parametrize(
    ("layout", "stops"),
    [(ONE, KILLS), (DP2, KILLS[4:5]), (DP2_ZERO, [*KILLS[:1], *KILLS[4:5]])],
    ids=["one", "dp2", "dp2_zero"],
)
def test_stopped_and_continued_equals_undisturbed(
    train: Train, whole: Path, request: pytest.FixtureRequest, layout: Layout, stops: list[tuple[str, int, str | None]]
) -> None:
    run = whole.with_name(request.node.callspec.id)
    undisturbed = whole if layout is ONE else run.with_name(f"{run.name} undisturbed")
    if layout is not ONE:
        assert train(undisturbed, layout).code == 0
    assert [record["step"] for record in read_metrics(undisturbed) if "loss" in record] == list(range(1, MAX_STEPS + 1))
    for moment, code, newest in stops:
        ended = train(run, layout, "--resume=auto", moment=moment)
        assert ended.code == code, ended.stderr
        assert_same_so_far(run, undisturbed)
        assert len(read_metrics(run)) < len(read_metrics(undisturbed))
        if newest:
            assert checkpoint_names(run)[-1] == newest
        if code > 0:
            assert "continue with --resume auto" in ended.stderr
            stopped_at = read_metrics(run)[-1]["step"]
            assert checkpoint_names(run)[-1] == f"step_{stopped_at:08d}"
    ended = train(run, layout, "--resume=auto")
    assert ended.code == 0, ended.stderr
    assert f"continuing with step {int(checkpoint_names(run)[-2][5:]) + 1}" in ended.stderr
    assert_same_so_far(run, undisturbed)
    assert read_metrics(run)[-1] == read_metrics(undisturbed)[-1]
    assert set(checkpoint_names(undisturbed)) <= set(checkpoint_names(run))
    assert not [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


def read_batches(record: Path, layout: Layout) -> list[dict[str, list[Any]]]:
    """The global batches: the data-parallel ranks' parts one after the other."""
    lines = [
        [json.loads(line) for line in record.with_name(f"{record.name}.{rank}").read_text().splitlines()]
        for rank in range(layout.world_size)
    ]
    if layout.flags and layout.flags[0] not in ("--distributed-optimizer", "--fsdp"):
        # Two ranks that share a replica of the model must have seen the same cells and masks.
        assert lines[::2] == lines[1::2]
        lines = lines[::2]
    return [{key: [x for part in parts for x in part[key]] for key in parts[0]} for parts in zip(*lines, strict=True)]


def assert_close_to(run: Path, fixed: Path, first_step: int, tolerance: float) -> None:
    """Losses, gradient norms and final tensors agree."""
    metrics = [record for record in read_metrics(fixed) if record["step"] >= first_step]
    assert len(read_metrics(run)) == len(metrics) > 0
    for record, wanted in zip(read_metrics(run), metrics, strict=True):
        # Megatron takes the norm itself in float32.
        assert record.pop("grad_norm", 0.0) == pytest.approx(wanted.pop("grad_norm", 0.0), rel=1e-6)
        assert record == pytest.approx(wanted, rel=0, abs=tolerance)
    name = f"step_{MAX_STEPS:08d}"
    tensors, others = read_tensors(run / "checkpoints" / name), read_tensors(fixed / "checkpoints" / name)
    assert tensors.keys() == others.keys()
    for key, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[key], rtol=0, atol=tolerance, msg=key)


# Without clipping, since a norm in float32 would scale the gradients of two layouts differently.
EXACT_NUMBERS = [
    "--precision=fp64",
    "model.hidden_dropout=0",
    "model.attention_dropout=0",
    "optimizer.clip_gradient_norm=0",
]


@pytest.mark.parametrize(
    ("before", "after", "tolerance"),
    # In float64 only the order of sums differs; but a distributed optimizer is written in float32.
    [(DP2, [TP2, PP2, ONE], 1e-9), (DP2_ZERO, [TP2_ZERO, CP2_ZERO], 1e-6)],
    ids=["dp2", "dp2_zero"],
)
def test_another_layout_goes_on_with_the_same_cells_and_masks(
    train: Train, before: Layout, after: list[Layout], tolerance: float, whole: Path, request: pytest.FixtureRequest
) -> None:
    fixed = whole.with_name(f"{request.node.callspec.id} in float64")
    fixed_record = fixed.with_name(f"{fixed.name}.batches")
    assert train(fixed, before, *EXACT_NUMBERS, record=fixed_record).code == 0
    batches = read_batches(fixed_record, before)
    assert batches == read_batches(whole.with_name("whole.batches"), ONE)
    start_from = fixed / "checkpoints" / "step_00000020"
    for place, layout in enumerate(after):
        run = fixed.with_name(f"{fixed.name} then {place}")
        record = fixed.with_name(f"{run.name}.batches")
        ended = train(run, layout, *EXACT_NUMBERS, f"--resume={start_from}", record=record)
        assert ended.code == 0, ended.stderr
        assert read_batches(record, layout) == batches[20:]
        assert_close_to(run, fixed, first_step=21, tolerance=tolerance)


def test_a_run_that_began_from_another_goes_on_from_there_until_it_has_saved(
    train: Train, whole: Path, process_group: None
) -> None:
    start_from, run = whole / "checkpoints" / "step_00000020", whole.with_name("branch")
    ended = train(run, ONE, f"--resume={start_from}", moment="KILL@finish 30")
    assert ended.code == -9 and checkpoint_names(run) == []
    ended = train(run, ONE, "--resume=auto", moment="KILL@latest 40")
    assert ended.code == -9 and checkpoint_names(run) == ["step_00000030", "step_00000040"], ended.stderr
    assert f"begins again with {start_from}" in ended.stderr and "continuing with step 21" in ended.stderr
    tensors, others = (read_tensors(one / "checkpoints" / "step_00000040") for one in (run, whole))
    assert [key for key in tensors if not torch.equal(tensors[key], others[key])] == []
    # A launcher that starts it again says the same words; a person is told.
    config = Config(data=DataConfig(paths="unused"), out=str(run), resume=str(start_from))
    assert claim_folder(config, Launch(is_restart=True)) == run / "checkpoints" / "step_00000030"
    with pytest.raises(InputError, match="holds a run already; continue it with --resume auto"):
        claim_folder(config, Launch())


def test_a_run_told_to_go_back_does_so_once(finished: Path, process_group: None) -> None:
    checkpoints = finished / "checkpoints"
    resume = str(checkpoints / "step_00000010")
    config = Config(data=DataConfig(paths="unused"), out=str(finished), resume=resume)
    assert claim_folder(config, Launch(is_restart=True)) == checkpoints / "step_00000010"
    note_origin(config, checkpoints / "step_00000010")
    for words in (resume, "auto"):
        assert claim_folder(replace(config, resume=words), Launch(is_restart=True)) == checkpoints / "step_00000010"
    (checkpoints / "latest").write_text("step_00000020\n")  # saved since
    assert claim_folder(config, Launch(is_restart=True)) == checkpoints / "step_00000020"
    assert claim_folder(config, Launch()) == checkpoints / "step_00000010"
    (finished / "resumed_from").write_text("")
    with pytest.raises(InputError, match="resumed_from holds '', no checkpoint's path; remove it"):
        claim_folder(config, Launch())


def test_the_world_grows_and_shrinks(train: Train, whole: Path) -> None:
    """1, 2, 3, 4, 2 processes and 1 again, another layout each time, in one folder: told to stop, and continued."""
    fixed, run = whole.with_name("fixed in float64"), whole.with_name("elastic")
    assert train(fixed, ONE, *EXACT_NUMBERS).code == 0
    batches: list[dict[str, list[Any]]] = []
    layouts = [(ONE, 8), (CP2, 16), (FSDP3, 21), (TP2_DP2, 26), (FSDP2, 32), (ONE, None)]
    for layout, last_step in layouts:
        moment, code = ("-", 0) if last_step is None else (f"TERM@{last_step}", 143)
        record = run.with_name(f"elastic from {len(batches)}")
        ended = train(run, layout, *EXACT_NUMBERS, "--resume=auto", moment=moment, record=record)
        assert ended.code == code, ended.stderr
        batches += read_batches(record, layout)
        assert read_metrics(run)[-1]["step"] == len(batches)
    assert batches == read_batches(whole.with_name("whole.batches"), ONE)
    assert_close_to(run, fixed, first_step=1, tolerance=1e-9)


@pytest.fixture
def process_group() -> Iterator[None]:
    """Of this process alone."""
    start_process_group(Launch(), torch.device("cpu"))
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    """A copy of the undisturbed run, which the test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def flip_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(finished: Path, train: Train, whole: Path) -> None:
    damaged = max((finished / "checkpoints" / "step_00000040" / "state").glob("*.distcp"))
    flip_byte(damaged, damaged.stat().st_size // 2)
    ended = train(finished, ONE, "--resume=auto")
    assert ended.code == 0, ended.stderr
    (sentence,) = [line for line in ended.stderr.splitlines() if str(damaged) in line]
    assert "using the older step_00000030 instead" in sentence
    assert_same_so_far(finished, whole)
    assert read_metrics(finished) == read_metrics(whole)


def test_a_run_without_an_undamaged_checkpoint_is_refused(finished: Path, train: Train) -> None:
    for state in (finished / "checkpoints").glob("step_*/state"):
        (state / ".metadata").unlink()
    assert_refused(train, finished, "no checkpoint in", ".metadata")


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(train: Train, run: Path, *words: str, arguments: tuple[object, ...] = ()) -> None:
    """One sentence, and the run is left as it was."""
    before = listing(run)
    ended = train(run, ONE, "--resume=auto", *arguments)
    assert ended.code == 2, ended.stderr
    (sentence,) = [line for line in ended.stderr.splitlines() if "celltron: error: " in line]
    assert ended.stderr.endswith(f"{sentence}\n") and sentence.startswith("celltron: error: ")
    assert all(word in sentence for word in words), sentence
    assert "Traceback" not in ended.stderr
    assert listing(run) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seed=1"], ["loop.seed", "1", "0", "step_00000040"]),
        (["--max-steps=50", "--precision=bf16"], ["precision", "bfloat16", "float32", "step_00000040"]),
        ([], ["loop.max_steps", "40"]),
        (["--max-steps=50", "model.hidden_size=32"], ["model.hidden_size is 32", "16", "step_00000040"]),
        (["--max-steps=50", "--seq-length=16"], ["data.max_length is 16", "32", "step_00000040"]),
        (["--max-steps=50", "data.masking.random_share=0.2"], ["data.masking", "step_00000040"]),
        (["--max-steps=50", "data.validation_by=donor"], ["data.validation_by", "donor", "step_00000040"]),
    ],
    ids=["seed", "precision", "nothing left", "model", "length", "masks", "split"],
)
def test_continuing_another_run_is_refused(
    finished: Path, train: Train, arguments: list[str], words: list[str]
) -> None:
    assert_refused(train, finished, *words, arguments=tuple(arguments))


def test_continuing_on_other_cells_is_refused(
    finished: Path, train: Train, tiny_cells: anndata.AnnData, tmp_path: Path
) -> None:
    tiny_cells[1 : NUM_CELLS + 1].write_h5ad(tmp_path / "others.h5ad")
    convert([tmp_path / "others.h5ad"], tmp_path / "others.store")
    arguments = ("--max-steps=50", "--data", tmp_path / "others.store")
    assert_refused(train, finished, "another store", "others.store", arguments=arguments)


def test_no_process_outlives_a_killed_run(folder: Path, train: Train) -> None:
    ended = train(folder / "killed", ONE, "loop.save_every=5", moment="KILL@12")
    assert ended.code == -9
    assert not ended.left_running
