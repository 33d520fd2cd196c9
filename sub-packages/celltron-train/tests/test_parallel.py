from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from celltron.core import InputError
from celltron.train.parallel import (
    ParallelConfig,
    context_parallel_place,
    cut_row,
    data_parallel_place,
    start_model_parallel,
)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "context", "world_size", "data"),
    [(1, 1, 1, 1, 1), (1, 1, 1, 6, 6), (2, 1, 1, 8, 4), (2, 3, 1, 12, 2), (4, 2, 1, 8, 1), (2, 1, 4, 16, 2)],
)
def test_what_is_left_is_data_parallel(tensor: int, pipeline: int, context: int, world_size: int, data: int) -> None:
    assert ParallelConfig(tensor=tensor, pipeline=pipeline, context=context).data(world_size) == data


@pytest.mark.parametrize("world_size", [1, 6, 15])
def test_an_impossible_product_is_printed_whole(world_size: int) -> None:
    with pytest.raises(InputError) as error:
        ParallelConfig(tensor=2, pipeline=3, context=2).data(world_size)
    assert "parallel.tensor 2 x parallel.pipeline 3 x parallel.context 2 = 12" in str(error.value)
    assert f"number of processes, {world_size};" in str(error.value)


@pytest.mark.parametrize("name", ["tensor", "pipeline", "context"])
def test_degrees_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"parallel.{name} is 0"):
        ParallelConfig(**{name: 0})


def test_sequence_parallelism_needs_tensor_parallelism() -> None:
    with pytest.raises(ValueError, match="parallel.sequence_parallel is true with parallel.tensor 1"):
        ParallelConfig(sequence_parallel=True)
    assert ParallelConfig(sequence_parallel=True, tensor=2).data(2) == 1


@pytest.mark.parametrize(
    ("other", "named"),
    [({"distributed_optimizer": True}, "parallel.distributed_optimizer"), ({"pipeline": 2}, "parallel.pipeline 2")],
)
def test_what_does_not_go_with_fsdp_is_refused(other: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"parallel.fsdp .* {named}"):
        ParallelConfig(fsdp=True, **other)
    assert ParallelConfig(fsdp=True, tensor=2, sequence_parallel=True, context=2).data(8) == 2


def test_groups_and_generators_are_made_and_made_again(engine: None) -> None:
    for _ in range(2):
        start_model_parallel(ParallelConfig(), seed=1)
        assert parallel_state.get_tensor_model_parallel_world_size() == 1
        assert parallel_state.get_pipeline_model_parallel_world_size() == 1
        assert data_parallel_place() == context_parallel_place() == (0, 1)
        assert "model-parallel-rng" in get_cuda_rng_tracker().get_states()


@settings(max_examples=30, deadline=None)
@given(size=st.integers(0, 9), num_parts=st.integers(1, 9))
def test_parts_of_a_row_are_of_like_size_and_in_order(size: int, num_parts: int) -> None:
    row = list(range(size * num_parts))
    parts = [row[cut_row(len(row), rank, num_parts)] for rank in range(num_parts)]
    assert [place for part in parts for place in part] == row
    assert {len(part) for part in parts} == {size}


def test_a_row_that_is_not_padded_for_its_parts_is_refused() -> None:
    with pytest.raises(AssertionError, match="7 places, wanted a multiple of 2"):
        cut_row(7, 0, 2)
