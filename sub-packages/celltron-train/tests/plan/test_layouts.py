"""Layouts: which there are, and on which machines their groups lie."""

import pytest

from celltron.train.parallel import ParallelConfig
from celltron.train.plan.gpus import GPUS_PER_NODE
from celltron.train.plan.layouts import Group, Layout, list_contexts, list_layouts


def test_every_way_to_give_out_gpus_is_listed_once() -> None:
    layouts = list(list_layouts(12))
    degrees = {(one.parallel.tensor, one.parallel.pipeline, one.data) for one in layouts}
    # Tensor x pipeline x data = 12, tensor at most the eight GPUs of a machine.
    triples = {(t, p, 12 // t // p) for t in (1, 2, 3, 4, 6) for p in range(1, 13) if 12 % (t * p) == 0}
    assert degrees == triples and all(one.num_gpus == 12 for one in layouts)
    ways = [(1 + (t > 1)) * (1 if d == 1 else 2 if p > 1 else 3) for t, p, d in triples]
    assert len(layouts) == len(set(layouts)) == sum(ways)


def test_fsdp_has_copies_and_no_stages() -> None:
    found = [one for one in list_layouts(8, context=2) if one.parallel.fsdp]
    degrees = {(one.parallel.tensor, one.parallel.sequence_parallel, one.num_shards) for one in found}
    assert degrees == {(1, False, 8), *((t, cut, 8 // t) for t in (2, 4) for cut in (False, True))}
    assert all(one.parallel.pipeline == 1 and not one.parallel.distributed_optimizer for one in found)


@pytest.mark.parametrize(
    ("num_gpus", "max_length", "least", "contexts"),
    [
        (64, 4095, 1, [1]),
        (64, 4096, 1, [1, 2]),
        (64, 1 << 20, 1, [1, 2, 4, 8]),
        (12, 1 << 20, 1, [1, 2, 4]),
        (12, 1 << 20, 3, [3, 6]),
        (16, 2048, 4, [4]),
        (16, 1 << 20, 16, [16]),
    ],
)
def test_long_cells_are_shared_as_far_as_gpus_go(
    num_gpus: int, max_length: int, least: int, contexts: list[int]
) -> None:
    assert list_contexts(num_gpus, max_length, least=least) == contexts


def test_gpus_that_share_cells_are_left_out_of_the_rest() -> None:
    layouts = list(list_layouts(12, context=3))
    assert {one.parallel.context for one in layouts} == {3} and {one.num_gpus for one in layouts} == {12}
    assert {(one.parallel.tensor, one.parallel.pipeline, one.data) for one in layouts} == {
        (t, p, 4 // t // p) for t in (1, 2, 4) for p in (1, 2, 4) if 4 % (t * p) == 0
    }
    # They hold the same parameters, so that their optimizer can be distributed without replicas.
    assert any(one.parallel.distributed_optimizer and one.data == 1 for one in layouts)


def test_one_gpu_has_one_layout() -> None:
    assert list(list_layouts(1)) == [Layout(parallel=ParallelConfig(), data=1)]


@pytest.mark.parametrize(
    ("layout", "members"),
    [
        # Two machines of eight: pairs of neighbours, replicas every second rank, one stage a machine.
        (Layout(parallel=ParallelConfig(tensor=2, pipeline=2), data=4), {"tensor": 2, "data": 4, "pipeline": 1}),
        (Layout(parallel=ParallelConfig(tensor=8), data=2), {"tensor": 8, "data": 1}),
        (Layout(parallel=ParallelConfig(), data=16), {"data": 8}),
        (
            Layout(parallel=ParallelConfig(tensor=2, context=2, pipeline=2), data=4),
            {"tensor": 2, "context": 2, "data": 4, "pipeline": 1},
        ),
        (Layout(parallel=ParallelConfig(context=16), data=1), {"context": 8, "data": 8}),
        (Layout(parallel=ParallelConfig(pipeline=4), data=2), {"data": 2, "pipeline": 4, "embedding": 2}),
        (Layout(parallel=ParallelConfig(pipeline=8), data=2), {"data": 2, "pipeline": 4, "embedding": 1}),
        # Ranks 6 and 7 are on the first machine, 8 of their group on the second.
        (Layout(parallel=ParallelConfig(context=3), data=8), {"context": 1, "data": 8}),
        (Layout(parallel=ParallelConfig(pipeline=4), data=3), {"data": 1, "pipeline": 1, "embedding": 1}),
        # Only four of twelve are on the second machine.
        (Layout(parallel=ParallelConfig(), data=12), {"data": 4}),
        (Layout(parallel=ParallelConfig(context=3), data=2), {"context": 3, "data": 6}),
    ],
)
def test_groups_lie_on_machines_as_megatron_counts_ranks(layout: Layout, members: dict[Group, int]) -> None:
    degrees = {
        "tensor": layout.parallel.tensor,
        "context": layout.parallel.context,
        "data": layout.parallel.context * layout.data,
        "pipeline": layout.parallel.pipeline,
    }
    for group, number in members.items():
        assert layout.members_per_node(group) == number, group
        assert layout.spans_nodes(group) == (number < degrees.get(group, 2)), group


@pytest.mark.parametrize("num_gpus", [2, 8, 12, 16, 24, 64])
@pytest.mark.parametrize("context", [1, 2, 3])
def test_a_group_lies_within_machines_where_its_ranks_divide_them(num_gpus: int, context: int) -> None:
    groups: tuple[Group, ...] = ("tensor", "context", "pipeline", "data", "embedding")
    for layout in list_layouts(num_gpus, context=context):
        for group in groups:
            size, stride = layout.group_size(group), layout.group_stride(group)
            is_within = size == 1 or layout.num_gpus <= GPUS_PER_NODE or GPUS_PER_NODE % (size * stride) == 0
            assert layout.spans_nodes(group) != is_within, (layout, group)
            if num_gpus in (16, 64) and context < 3:  # machines that powers of two fill
                expected = max(1, min(size, GPUS_PER_NODE // stride))
                assert layout.members_per_node(group) == expected, (layout, group)
