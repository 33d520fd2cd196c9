"""Bytes and seconds of exchanges, against what the papers give; `tests/plan` holds them against counted bytes."""

from dataclasses import replace

import pytest

from celltron.train.parallel import ParallelConfig
from celltron.train.plan.communication import LINK_SHARE, NETWORK_SECONDS, Exchange, Stage, list_exchanges
from celltron.train.plan.gpus import GPUS
from celltron.train.plan.layouts import Layout

HIDDEN = 1000.0
MIDDLE = Stage(
    is_first=False,
    is_last=False,
    num_layers=3,
    num_recomputed_layers=0,
    num_parameters=50.0,
    num_split_parameters=0.0,
    num_embedding_parameters=0.0,
    value_bytes=2,
    gradient_bytes=4,
    num_micro_batches=5,
    hidden_bytes=HIDDEN,
    predicted_bytes=0.0,
    num_predicted=0.0,
)


def sent(stage: Stage, layout: Layout) -> dict[tuple[str, str], float]:
    return {(one.group, one.kind): one.sent_bytes(layout) for one in list_exchanges(stage, layout)}


def test_sequence_parallelism_sends_as_much_and_what_it_gathers_again() -> None:
    """Korthikanti et al. 2022, section 4.2.2: a reduce-scatter and an all-gather are an all-reduce."""
    plain = Layout(parallel=ParallelConfig(tensor=4), data=1)
    cut = Layout(parallel=ParallelConfig(tensor=4, sequence_parallel=True), data=1)
    of_sum = 2 * 3 / 4 * HIDDEN
    assert sent(MIDDLE, plain) == {("tensor", "all_reduce"): 3 * 4 * of_sum}
    gathered_again = 3 * 2 * of_sum / 2
    assert sum(sent(MIDDLE, cut).values()) == 3 * 4 * of_sum + gathered_again


def test_full_recomputation_repeats_the_forward_sums() -> None:
    layout = Layout(parallel=ParallelConfig(tensor=2), data=1)
    again = sent(replace(MIDDLE, num_recomputed_layers=3), layout)
    assert again["tensor", "all_reduce"] == pytest.approx(6 / 4 * sent(MIDDLE, layout)["tensor", "all_reduce"])


def test_keys_and_values_of_whole_rows_are_gathered_and_their_gradients_scattered() -> None:
    """Of a row of four times the hidden states, each value and key 1/2 as wide; backward once more where recomputed."""
    layout = Layout(parallel=ParallelConfig(tensor=2, context=4), data=1)
    of_row = 3 / 4 * 4 * 2 * HIDDEN / 2
    found = sent(MIDDLE, layout)
    assert found["context", "all_gather"] == found["context", "reduce_scatter"] == 3 * of_row
    again = sent(replace(MIDDLE, num_reattended_layers=3), layout)
    assert again["context", "all_gather"] == 2 * 3 * of_row == 2 * again["context", "reduce_scatter"]
    # Gradients are summed over those that share cells as over replicas.
    assert found["data", "all_reduce"] == 2 * 3 / 4 * 50 * 4


def test_the_distributed_optimizer_sends_gradients_once_and_narrow_parameters() -> None:
    """Rajbhandari et al. 2020, section 7.1: an all-reduce is a reduce-scatter and an all-gather, here in two types."""
    whole, split = (
        Layout(parallel=ParallelConfig(distributed_optimizer=is_split), data=5) for is_split in (False, True)
    )
    assert sent(MIDDLE, whole) == {("data", "all_reduce"): 2 * 4 / 5 * 50 * 4}
    assert sent(MIDDLE, split) == {("data", "reduce_scatter"): 4 / 5 * 50 * 4, ("data", "all_gather"): 4 / 5 * 50 * 2}


@pytest.mark.parametrize(("context", "data"), [(1, 5), (5, 1)])
def test_fsdp_gathers_twice_and_scatters_once_a_micro_batch(context: int, data: int) -> None:
    """Zhao et al. 2023, section 3.2.1: 1.5 times what is communicated without it, were both in one type."""
    layout = Layout(parallel=ParallelConfig(context=context, fsdp=True), data=data)
    found = [one for one in list_exchanges(replace(MIDDLE, num_layer_parameters=12.0), layout) if one.group == "data"]
    in_all = {"all_gather": 5 * 2 * 4 / 5 * 50 * 2, "reduce_scatter": 5 * 4 / 5 * 50 * 4}
    for kind, expected in in_all.items():
        assert sum(one.sent_bytes(layout) for one in found if one.kind == kind) == expected
    # Three layers beside computing, the other 14 parameters not.
    calls = {(one.kind, one.is_beside_computing): (one.calls, one.tensor_bytes) for one in found}
    assert calls == {
        ("all_gather", True): (30, 10 * 36 * 2),
        ("reduce_scatter", True): (15, 5 * 36 * 4),
        ("all_gather", False): (10, 10 * 14 * 2),
        ("reduce_scatter", False): (5, 5 * 14 * 4),
    }


def test_under_fsdp_tensor_parallel_processes_sum_their_parts_of_norms() -> None:
    whole, parts = (
        Layout(parallel=ParallelConfig(tensor=2, sequence_parallel=True, fsdp=fsdp), data=4) for fsdp in (False, True)
    )
    stage = replace(MIDDLE, num_split_parameters=8.0)
    assert sent(stage, whole)["tensor", "all_reduce"] == 8 * 4 == 4 * sent(stage, parts)["tensor", "all_reduce"]


def test_a_stage_in_the_middle_sends_both_ways() -> None:
    layout = Layout(parallel=ParallelConfig(pipeline=3), data=1)
    shapes = 5 * 24
    assert sent(MIDDLE, layout) == {("pipeline", "send"): 2 * (HIDDEN + shapes)}
    first = sent(replace(MIDDLE, is_first=True, num_embedding_parameters=7.0), layout)
    assert first == {("pipeline", "send"): HIDDEN + shapes, ("embedding", "all_reduce"): 7 * 4}


def test_one_process_exchanges_nothing() -> None:
    assert list_exchanges(replace(MIDDLE, is_first=True, is_last=True), Layout(parallel=ParallelConfig(), data=1)) == []


def test_the_network_is_shared_by_a_machines_members_of_a_group() -> None:
    """Eight replicas a machine have eight adapters for their ring, up to what NVLink carries; one has one."""
    gpu, gradients = GPUS["h100"], Exchange("data", "all_reduce", 1, 1e9)
    alone = Layout(parallel=ParallelConfig(tensor=8), data=2)
    assert gradients.seconds(alone, gpu) == pytest.approx(NETWORK_SECONDS + 1e9 / (LINK_SHARE * 50e9))
    eight = Layout(parallel=ParallelConfig(), data=16)
    assert gradients.seconds(eight, gpu) == pytest.approx(NETWORK_SECONDS + 2 * 15 / 16 * 1e9 / (LINK_SHARE * 400e9))
    inside = Layout(parallel=ParallelConfig(), data=8)
    assert gradients.seconds(inside, gpu) == pytest.approx(10e-6 + 2 * 7 / 8 * 1e9 / (LINK_SHARE * 450e9))
