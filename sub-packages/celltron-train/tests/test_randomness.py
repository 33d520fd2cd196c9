import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel import random as megatron_random

from celltron.train.randomness import seed_step

pytestmark = pytest.mark.usefixtures("engine")


def draw() -> tuple[float, ...]:
    """What the default generator and the model-parallel one give next."""
    hidden = torch.rand(2, dtype=torch.float64)
    with get_cuda_rng_tracker().fork():
        inner = torch.rand(2, dtype=torch.float64)
    return (*hidden.tolist(), *inner.tolist())


def draw_for(seed: int, step: int) -> tuple[float, ...]:
    seed_step(seed, step)
    return draw()


def test_a_step_draws_the_same_whatever_was_drawn_before() -> None:
    expected = draw_for(3, 7)
    for num_draws in (0, 1, 5):
        for _ in range(num_draws):
            draw()
        assert draw_for(3, 7) == expected


def test_seeds_steps_and_generators_differ() -> None:
    drawn = [draw_for(seed, step) for seed in (0, 1) for step in (1, 2, 3)]
    numbers = [number for numbers in drawn for number in numbers]
    assert len(set(numbers)) == len(numbers)


def test_step_and_seed_are_not_mixed_up() -> None:
    assert draw_for(1, 12) != draw_for(11, 2)


@pytest.mark.parametrize(
    "getter", ["get_data_parallel_rank", "get_pipeline_model_parallel_rank", "get_context_parallel_rank"]
)
def test_replicas_stages_and_parts_of_rows_differ(monkeypatch: pytest.MonkeyPatch, getter: str) -> None:
    drawn = [draw_for(0, 1)]
    monkeypatch.setattr(parallel_state, getter, lambda: 1)
    drawn.append(draw_for(0, 1))
    assert set(drawn[0]).isdisjoint(drawn[1])


def test_tensor_parallel_ranks_share_the_default_generator_only(monkeypatch: pytest.MonkeyPatch) -> None:
    left = draw_for(0, 1)
    monkeypatch.setattr(megatron_random, "get_tensor_model_parallel_rank", lambda: 1)
    right = draw_for(0, 1)
    assert left[:2] == right[:2]
    assert set(left[2:]).isdisjoint(right[2:])
