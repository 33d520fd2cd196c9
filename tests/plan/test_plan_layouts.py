"""The plan's formulas against what two ranks of a small Geneformer measure: memory, and bytes communicated."""

import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from celltron.cli.plan_geneformer import Cut, Memory, Task, estimate_memory, make_stage, sum_sent
from celltron.models.geneformer.size import Share, count_parameters, layer_bytes
from celltron.train.plan.communication import list_exchanges
from celltron.train.plan.gpus import GPUS
from celltron.train.plan.layouts import Layout
from celltron.train.plan.state import value_bytes

PROGRAM = Path(__file__).with_name("measure_layouts.py")
TWO = [
    "tp2",
    "tp2_full",
    "tp2_sp",
    "tp2_sp_full",
    "pp2",
    "cp2",
    "cp2_zero_selective",
    "dp2",
    "dp2_zero",
    "dp2_bf16",
    "dp2_zero_bf16",
    "pp2_pre_norm",
    "tp2_sp_pre_norm",
    "fsdp2",
    "fsdp2_bf16",
    "cp2_fsdp_full",
]
MEASURED = [*((name, rank) for name in TWO for rank in (0, 1)), ("one", 0)]
# A tenth would do. Not counted are alignment in Megatron's buffers, and that packs are not all as full as the
# fullest.
TOLERANCE = 0.04
GROUPS = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tensor",
    "CONTEXT_PARALLEL_GROUP": "context",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pipeline",
    "DATA_PARALLEL_GROUP": "data",
    "DATA_PARALLEL_GROUP_WITH_CP": "data",
    "EMBEDDING_GROUP": "embedding",
}


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure_layouts", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(run_ranks: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    run_ranks(PROGRAM, folder, world_size=2)
    return folder


@pytest.fixture
def facts(folder: Path, name: str, rank: int) -> dict[str, Any]:
    """What a rank measured; a rank that wrote nothing fails here."""
    found: dict[str, Any] = json.loads((folder / f"{name}.{rank}.json").read_text())
    return found


@pytest.fixture
def planned(program: ModuleType, name: str, facts: dict[str, Any]) -> tuple[Task, Layout, Cut, Share]:
    parallel, precision, recompute = (program.ON_TWO_RANKS | program.ALONE)[name]
    data = 1 if name == "one" else parallel.data(2)
    task = Task(
        model=program.model_of(name),
        num_tokens=program.NUM_TOKENS,
        precision=precision,
        lengths=np.tile(program.LENGTHS, data).astype(np.int64),
        predicted_share=1 / program.PREDICTED_EVERY,
        max_length=64,
        packing=True,
        gpu=GPUS["h100"],
        mask_bytes=value_bytes(precision),
        recompute=recompute,
    )
    share = Share(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        stage=facts["stage"],
        context=parallel.context,
        sequence_parallel=parallel.sequence_parallel,
    )
    layout = Layout(parallel=parallel, data=data)
    return task, layout, task.cut(data, program.MICRO_BATCH_SIZE, context=parallel.context), share


@pytest.fixture
def memory(planned: tuple[Task, Layout, Cut, Share]) -> Memory:
    return estimate_memory(*planned)


def test_packs_are_several_and_stages_differ(folder: Path, program: ModuleType) -> None:
    assert 3 <= program.LENGTHS.sum() / (4 * 64) <= 6
    stages = [json.loads((folder / f"pp2.{rank}.json").read_text())["stage"] for rank in (0, 1)]
    assert stages == [0, 1]


@pytest.mark.parametrize(("name", "rank"), MEASURED)
def test_parameters_gradients_and_optimizer(
    facts: dict[str, Any], memory: Memory, planned: tuple[Task, Layout, Cut, Share]
) -> None:
    task, _, _, share = planned
    assert facts["num_parameters"] == count_parameters(task.model, task.num_tokens, share)
    assert facts["parameters"] == pytest.approx(memory.parameters, rel=TOLERANCE)
    assert facts["gradients"] == pytest.approx(memory.gradients, rel=TOLERANCE)
    assert facts["optimizer"] == pytest.approx(memory.optimizer, rel=TOLERANCE)


@pytest.mark.parametrize(("name", "rank"), [(name, rank) for name, rank in MEASURED if "bf16" not in name])
def test_what_is_kept_for_backward(
    facts: dict[str, Any], memory: Memory, planned: tuple[Task, Layout, Cut, Share]
) -> None:
    """In bfloat16 a CPU without its instructions keeps float32 copies, so those layouts are left out."""
    task, _, cut, share = planned
    kept = memory.activations + memory.logits
    if task.recompute == "full":
        # The last layer is computed anew when the head is done. Attention alone is so only when its feed-forward branch
        # is done as well, which kept more.
        b, layer = value_bytes(task.precision), partial(layer_bytes, task.model, share, mask_bytes=task.mask_bytes)
        again = layer(value_bytes=b) - layer(value_bytes=b, recompute=task.recompute)
        kept = max(kept, memory.activations + cut.largest.computed * again)
    assert facts["kept_at_the_end"] == 0
    assert facts["kept"] == pytest.approx(kept, rel=TOLERANCE)


@pytest.mark.parametrize(("name", "rank"), [(name, rank) for name, rank in MEASURED if "fsdp" in name])
def test_what_fsdp_has_whole(facts: dict[str, Any], memory: Memory) -> None:
    """Not there yet, where the formula has all of the root unit's gradients, are those of the embedding's places."""
    assert facts["whole"] == pytest.approx(memory.gathered, rel=TOLERANCE)


@pytest.mark.parametrize(("name", "rank"), MEASURED)
def test_bytes_sent(facts: dict[str, Any], planned: tuple[Task, Layout, Cut, Share]) -> None:
    task, layout, cut, share = planned
    expected = sum_sent(list_exchanges(make_stage(task, layout, cut, share), layout), layout)
    found: dict[str, dict[str, float]] = {}
    for kind, group, calls, sent in facts["traffic"]:
        # Others are scalars: norms, counts, flags.
        if sent / calls > 64 or kind == "send":
            kinds = found.setdefault(GROUPS[group], {})
            kinds[kind] = kinds.get(kind, 0.0) + sent
    assert {group: set(kinds) for group, kinds in found.items()} == {g: set(k) for g, k in expected.items()}
    for group, kinds in expected.items():
        assert found[group] == pytest.approx(kinds, rel=TOLERANCE), group
    assert bool(expected) == (layout.num_gpus > 1)
