"""`celltron plan`: what it prints and refuses, and its estimates against published runs and the GPUs' peaks."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from celltron.cells import CellStore, RankTokenizer
from celltron.cli import plan
from celltron.cli.plan_geneformer import Task, estimate
from celltron.core import load_published_geneformer, run_command
from celltron.models.geneformer import GeneformerConfig
from celltron.models.geneformer.size import Recompute, Share, count_parameters
from celltron.train.parallel import ParallelConfig
from celltron.train.plan.gpus import GPUS, GpuName
from celltron.train.plan.layouts import Layout

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
M10, M106 = CONFIGS / "geneformer_10m.yaml", CONFIGS / "geneformer_106m.yaml"
SHAPES = {
    "10m": GeneformerConfig(),
    "106m": GeneformerConfig(num_layers=12, hidden_size=768, ffn_hidden_size=3072, num_attention_heads=12),
}
Plan = Callable[..., Any]


@pytest.fixture
def run_plan(capsys: pytest.CaptureFixture[str]) -> Plan:
    def run(*arguments: object) -> Any:
        plan.main([str(argument) for argument in arguments])
        printed = capsys.readouterr().out
        return json.loads(printed) if "--json" in arguments else printed

    return run


def make_task(shape: str, gpu: GpuName, *, predicted_share: float = 0.15, num_cells: int = 2048) -> Task:
    """Full-length cells in bfloat16."""
    return Task(
        model=SHAPES[shape],
        num_tokens=25_426,
        precision="bf16",
        lengths=np.full(num_cells, 2048),
        predicted_share=predicted_share,
        max_length=2048,
        packing=True,
        gpu=GPUS[gpu],
    )


@pytest.mark.parametrize(("shape", "micro_batch_size", "published"), [("10m", 120, 37e12), ("106m", 16, 103e12)])
def test_published_rates_of_an_a100(shape: str, micro_batch_size: int, published: float) -> None:
    """BioNeMo's chart for one A100, micro-batches as there, FLOP/s with its head on every place; see the model card."""
    one = estimate(
        make_task(shape, "a100", predicted_share=1.0), Layout(parallel=ParallelConfig(), data=1), micro_batch_size
    )
    assert one.fits
    assert 1 / 1.5 < one.flops_share * 312e12 / published < 1.5


@pytest.mark.parametrize(
    ("shape", "num_gpus", "steps", "hours"),
    [("10m", 64, 115_430, 44.3), ("10m", 64, 81_485, 104), ("106m", 128, 115_430, 90.9), ("106m", 128, 35_650, 8)],
)
def test_published_runs_were_slower_than_their_gpus(shape: str, num_gpus: int, steps: int, hours: float) -> None:
    """Global batches of 2,048 cells; the runs waited for data, so they bound the estimate from below only."""
    layout = Layout(parallel=ParallelConfig(), data=num_gpus)
    one = estimate(make_task(shape, "a100", predicted_share=1.0), layout, 16)
    assert one.cells_per_second > steps * 2048 / (hours * 3600)


@pytest.mark.parametrize(
    ("gpu", "config", "num_gpus"), [("a100", M106, 8), ("h100", M10, 1), ("h200", M106, 64), ("b200", M10, 8)]
)
def test_no_layout_beats_the_gpus(run_plan: Plan, gpu: GpuName, config: Path, num_gpus: int) -> None:
    found = run_plan("--config", config, "--gpus", num_gpus, "--gpu", gpu, "--json")
    peak = num_gpus * GPUS[gpu].bf16_flops
    for one in found["layouts"]:
        cells_per_second = one["cells_per_second"]
        share = found["flops_per_step"] / found["cells_per_step"] * cells_per_second / peak
        assert 0 < share == pytest.approx(one["model_flops_utilization"]) and share < 0.8
        assert one["tensor"] * one["pipeline"] * one["data"] == num_gpus
        assert sum(one["memory_bytes"].values()) == pytest.approx(2 * one["memory_bytes"]["total"])
    rates = [one["cells_per_second"] for one in found["layouts"] if one["fits"]]
    assert rates and rates == sorted(rates, reverse=True)
    assert len(found["layouts"]) > (num_gpus > 1) * 10


def test_communication_can_hide_only_where_there_is_some() -> None:
    alone, replicas = (Layout(parallel=ParallelConfig(), data=data) for data in (1, 64))
    plain = make_task("106m", "h100")
    overlapped = replace(plain, overlap=True)
    assert estimate(plain, alone, 16).seconds == estimate(overlapped, alone, 16).seconds
    assert estimate(overlapped, replicas, 16).seconds["data"] == 0 < estimate(plain, replicas, 16).seconds["data"]


def test_sharing_cells_spares_memory_and_takes_communication() -> None:
    """Cells of 2,048 tokens by two processes each, against whole ones on half as many replicas' worth of GPUs."""
    task = make_task("106m", "h100", num_cells=64)
    whole, shared = Layout(parallel=ParallelConfig(), data=8), Layout(parallel=ParallelConfig(context=2), data=4)
    alone, together = estimate(task, whole, 1), estimate(task, shared, 1)
    assert alone.seconds["context"] == 0 < together.seconds["context"]
    assert together.memory.activations < 0.8 * alone.memory.activations
    assert together.memory.parameters == alone.memory.parameters
    assert together.num_micro_batches == 2 * alone.num_micro_batches
    assert together.cells_per_second < alone.cells_per_second


def test_layouts_share_cells_as_configured(run_plan: Plan) -> None:
    found = run_plan("--config", M106, "--gpus", 8, "--context-parallel", 2, "--json")
    assert {one["context"] for one in [found["configured"], *found["layouts"]]} == {2}
    assert all(one["tensor"] * one["pipeline"] * one["data"] == 4 for one in found["layouts"])
    assert found["configured"]["sent_bytes"]["context"].keys() == {"all_gather", "reduce_scatter"}


@pytest.mark.parametrize(("more", "contexts"), [([], {1, 2, 4}), (["--context-parallel", 2], {2})])
def test_long_cells_may_be_shared(run_plan: Plan, more: list[object], contexts: set[int]) -> None:
    long = ["data.max_length=8192", "model.max_positions=8192", "loop.global_batch_size=16", *more]
    found = run_plan("--config", M10, "--gpus", 16, "--json", *long)
    assert {one["context"] for one in found["layouts"]} == contexts
    assert found["configured"]["context"] == min(contexts)


def test_fsdp_is_among_the_layouts(run_plan: Plan) -> None:
    """Without stages, and not with the distributed optimizer; but not of runs that cannot have it."""
    found = run_plan("--config", M106, "--gpus", 8, "--fsdp", "--json")
    assert found["configured"]["fsdp"]
    for one in found["layouts"]:
        assert one["fsdp"] + one["distributed_optimizer"] < 2 and (one["pipeline"] == 1 or not one["fsdp"])
    degrees = [(one["tensor"], one["sequence_parallel"]) for one in found["layouts"] if one["fsdp"]]
    assert sorted(degrees) == [(1, False), (2, False), (2, True), (4, False), (4, True)]  # 12 heads; 8 leave one copy
    narrow = run_plan("--config", M106, "--gpus", 2, "--json", "engine.fp8=tensorwise")
    assert narrow["layouts"] and not any(one["fsdp"] for one in narrow["layouts"])


def test_fsdp_spares_memory_and_takes_communication() -> None:
    task = make_task("106m", "h100")
    split, cut = (
        estimate(task, Layout(parallel=ParallelConfig(distributed_optimizer=not fsdp, fsdp=fsdp), data=8), 16)
        for fsdp in (False, True)
    )
    num_parameters = 106_810_496
    assert split.memory.gathered == 0 < cut.memory.gathered
    parts = [cut.memory.parameters, cut.memory.gradients, cut.memory.optimizer]
    assert parts == pytest.approx([num_parameters * size / 8 for size in (4, 4, 8)])
    assert sum(parts) + cut.memory.gathered < split.memory.parameters + split.memory.gradients + split.memory.optimizer
    # Twice gathered in 2 bytes and once scattered in 4, in every one of 16 micro-batches.
    sent = {"all_gather": 16 * 2 * 2, "reduce_scatter": 16 * 4}
    assert cut.sent_bytes["data"] == {kind: pytest.approx(7 / 8 * num_parameters * size) for kind, size in sent.items()}


def test_what_fsdp_exchanges_of_layers_hides_behind_computing() -> None:
    near, far = (Layout(parallel=ParallelConfig(fsdp=True), data=data) for data in (8, 16))
    task = make_task("106m", "h100")
    seconds = estimate(task, near, 16).seconds
    assert seconds["data"] < 0.01 * seconds["compute"]
    slow = replace(task, gpu=replace(task.gpu, network_bytes_per_second=1e9))
    found = estimate(slow, far, 16)
    # Eight adapters a machine, at 80 % of their peak.
    in_all = sum(found.sent_bytes["data"].values()) / (0.8 * 8e9)
    assert found.seconds["data"] + found.seconds["compute"] == pytest.approx(in_all, rel=0.01)
    assert found.seconds["data"] > 0


def test_fsdp_has_all_parameters_once_at_the_start() -> None:
    wide = replace(SHAPES["106m"], num_layers=48, hidden_size=5120, ffn_hidden_size=20480, num_attention_heads=40)
    task = replace(make_task("106m", "h100"), model=wide)
    memory = estimate(task, Layout(parallel=ParallelConfig(fsdp=True), data=64), 1).memory
    num_parameters = count_parameters(wide, task.num_tokens, Share())
    assert memory.total == pytest.approx(4 * num_parameters) and memory.gathered > 4 * memory.optimizer


def test_recomputing_takes_time_and_spares_memory() -> None:
    task, layout = make_task("106m", "h100"), Layout(parallel=ParallelConfig(), data=8)
    tasks = [replace(task, recompute=how) for how in get_args(Recompute)]
    found = [estimate(one, layout, 16) for one in tasks]
    kept = [one.memory.activations for one in found]
    assert kept[0] > kept[1] > 4 * kept[2]
    seconds = [one.seconds["compute"] for one in found]
    assert seconds[0] < seconds[1] < seconds[2] < 4 / 3 * seconds[0]


def test_the_table(run_plan: Plan) -> None:
    printed = run_plan("--config", M106, "--gpus", 64, "--gpu", "h200", "--rows", 3, "--fsdp")
    lines = printed.splitlines()
    assert "106,810,496 parameters, bf16; 64 x H200 SXM (141 GB, 989 TFLOP/s)" in lines[0]
    assert "2,048 tokens on average (taken to be alike; give --data STORE or --mean-length)" in lines[1]
    rows = lines[6:10]
    assert all(row[:3].strip().isdecimal() for row in rows) and not lines[10][:3].strip().isdecimal()
    assert rows[0].endswith("as configured") and rows[0].split()[4:7] == ["-", "-", "x"]
    assert "slower ones; --rows 0 prints all" in printed and "does not fit" not in printed
    assert max(map(len, lines)) <= 170


def test_a_layout_that_does_not_fit_is_named(run_plan: Plan) -> None:
    wide = ["model.num_layers=48", "model.hidden_size=2560", "model.ffn_hidden_size=10240"]
    wide += ["model.num_attention_heads=40", "loop.micro_batch_size=1"]
    printed = run_plan("--config", M106, "--gpus", 2, *wide)
    assert "tensor 1 x pipeline 1 x context 1 x data 2 does not fit: " in printed
    (configured,) = (line for line in printed.splitlines() if line.endswith("as configured"))
    assert " ! " in configured
    found = run_plan("--config", M106, "--gpus", 2, *wide, "--json")
    assert not found["configured"]["fits"] and found["layouts"][0]["fits"]
    state = [found["configured"]["memory_bytes"][part] for part in ("parameters", "gradients", "optimizer")]
    assert sum(state) == 18 * found["parameters"] > 69e9


def test_lengths_are_those_of_the_data(run_plan: Plan, tiny_store: Path, tiny_config: Path) -> None:
    found = run_plan(
        "--config", tiny_config, "--data", tiny_store, "--gpus", 2, "--json", "loop.global_batch_size=97",
        "data.vocabulary=gc30M",
    )  # fmt: skip
    store = CellStore.open(tiny_store)
    tokenizer = RankTokenizer(*load_published_geneformer("gc30M"), store.gene_ids, max_length=32)
    lengths = tokenizer.tokenize(store, np.arange(97))[1].astype(float)
    assert found["mean_length"] == pytest.approx(lengths.mean()) and 20 < lengths.mean() < 32
    assert found["mean_square_length"] == pytest.approx((lengths**2).mean())
    of_store = run_plan("--config", tiny_config, "--data", tiny_store, "--gpus", 2, "--json")
    assert of_store["parameters"] < found["parameters"]


def test_short_cells_are_faster_and_packs_are_fewer(run_plan: Plan, tiny_store: Path, tiny_config: Path) -> None:
    full, short = (run_plan("--config", M10, "--gpus", 1, "--json", *more) for more in ([], ["--mean-length", 900]))
    assert short["configured"]["cells_per_second"] > 2048 / 900 * full["configured"]["cells_per_second"]
    arguments = ["--config", tiny_config, "--data", tiny_store, "--gpus", 1, "--json", "loop.global_batch_size=64"]
    packed, padded = (run_plan(*arguments, f"loop.packing={how}")["configured"] for how in ("true", "false"))
    assert packed["num_micro_batches"] < padded["num_micro_batches"] == 32


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "gpus is 0, but must be at least 1"),
        (["--gpus", "8", "--gpu", "v100"], "wanted one of h100, h200, a100, b200"),
        (["--gpus", "many"], "gpus"),
        (["--gpus", "6", "--tensor-parallel", "3"], "num_attention_heads is 4, which parallel.tensor (3) does not"),
        (["--gpus", "8", "--pipeline-parallel", "4"], "num_layers is 6, which parallel.pipeline (4) does not divide"),
        (["--gpus", "7", "--tensor-parallel", "2"], "does not divide the number of processes, 7"),
        (["--gpus", "8", "--fsdp", "--distributed-optimizer"], "parallel.fsdp and parallel.distributed_optimizer are"),
        (["--gpus", "4096"], "global_batch_size 2048 is less than the 4096"),
        (["--gpus", "8", "--precision", "fp64"], "precision is fp64"),
        (["--gpus", "8", "--mean-length", "4000"], "mean_length is 4000"),
        (["--gpus", "8", "--rows", "-1"], "rows is -1"),
        (["--gpus", "8", "data.vocabulary=store"], "there is no store; give --data STORE"),
        (["--gpus", "8", "data.vocabulary=no.tsv"], "neither store, gc30M, gc95M nor a table's path"),
        (["--gpus", "8", "--data", "no.h5ad"], "no.h5ad is no store; make one with celltron convert"),
        (["--gpus", "8", "model.widht=3"], "model.widht"),
        (["--gpus", "8", "--config", "no.yaml"], "no.yaml: there is no such config file"),
    ],
)
def test_wrong_input_is_one_sentence(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert run_command(plan.main, ["--config", str(M10), *arguments]) == 2
    caught = capsys.readouterr()
    assert caught.out == "" and caught.err.count("\n") == 1 and said in caught.err, caught.err


def test_a_length_and_data_contradict(capsys: pytest.CaptureFixture[str], tiny_store: Path, tiny_config: Path) -> None:
    arguments = ["--config", str(tiny_config), "--gpus", "1", "--data", str(tiny_store), "--mean-length", "9"]
    assert run_command(plan.main, arguments) == 2
    assert "--mean-length is given with --data" in capsys.readouterr().err
