import pytest
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from celltron.core import InputError
from celltron.train.parallel import ParallelConfig, data_parallel_place, start_model_parallel


@pytest.mark.parametrize(
    ("tensor", "pipeline", "world_size", "data"),
    [(1, 1, 1, 1), (1, 1, 6, 6), (2, 1, 8, 4), (2, 3, 12, 2), (4, 2, 8, 1)],
)
def test_what_is_left_is_data_parallel(tensor: int, pipeline: int, world_size: int, data: int) -> None:
    assert ParallelConfig(tensor=tensor, pipeline=pipeline).data(world_size) == data


@pytest.mark.parametrize("world_size", [1, 4, 7])
def test_an_impossible_product_is_printed_whole(world_size: int) -> None:
    with pytest.raises(InputError) as error:
        ParallelConfig(tensor=2, pipeline=3).data(world_size)
    assert "parallel.tensor 2 x parallel.pipeline 3 = 6" in str(error.value)
    assert f"the {world_size} processes" in str(error.value)


@pytest.mark.parametrize("name", ["tensor", "pipeline"])
def test_degrees_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"parallel.{name} is 0"):
        ParallelConfig(**{name: 0})


def test_sequence_parallelism_needs_tensor_parallelism() -> None:
    with pytest.raises(ValueError, match="parallel.sequence_parallel is true with parallel.tensor 1"):
        ParallelConfig(sequence_parallel=True)
    assert ParallelConfig(sequence_parallel=True, tensor=2).data(2) == 1


def test_groups_and_generators_are_made_and_made_again(engine: None) -> None:
    for _ in range(2):
        start_model_parallel(ParallelConfig(), seed=1)
        assert parallel_state.get_tensor_model_parallel_world_size() == 1
        assert parallel_state.get_pipeline_model_parallel_world_size() == 1
        assert data_parallel_place() == (0, 1)
        assert "model-parallel-rng" in get_cuda_rng_tracker().get_states()
