"""On one process, which holds the only part; tests/equivalence and tests/resume have several.

Axes: M places, D width of the input, E of the output.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.distributed.tensor import DTensor

from celltron.train.checkpoint import Checkpoints, load_training
from celltron.train.checkpoint_folder import RunState
from celltron.train.fully_sharded import FullyShardedModel, most_micro_batches
from celltron.train.launch import Launch
from celltron.train.optimizer import OptimizerConfig, set_learning_rate, take_step, wrap_model
from celltron.train.precision import name_dtype

pytestmark = pytest.mark.usefixtures("engine")
Trained = tuple[Any, Any]


def run_next(micro_batches: Iterator[torch.Tensor], model: torch.nn.Module) -> Any:
    """The sum of squares of what the model makes of M places, and M."""
    x_MD = next(micro_batches)

    def sum_and_count(output_ME: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        loss = output_ME.float().square().sum() if output_ME.dtype is torch.bfloat16 else output_ME.square().sum()
        return loss, torch.tensor(len(x_MD)), loss.detach()

    return model(x_MD), sum_and_count


def take_steps(model: Any, optimizer: Any, num_steps: int) -> list[float]:
    """Steps on two micro-batches of 3 and 5 places, as the loop takes them; the gradients' norms."""
    norms = []
    for step in range(num_steps):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        dtype = model.config.params_dtype
        inputs = [torch.randn(size, 4, generator=generator, dtype=torch.float64).to(dtype) for size in (3, 5)]
        get_forward_backward_func()(
            forward_step_func=run_next,
            data_iterator=iter(inputs),
            model=[model],
            num_microbatches=2,
            seq_length=1,
            micro_batch_size=1,
            forward_only=False,
        )
        set_learning_rate(optimizer, 0.05, 0.01)
        norms.append(take_step(optimizer))
    return norms


def whole(tensor: torch.Tensor | DTensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


@pytest.fixture
def make(make_model: Callable[..., Any]) -> Callable[..., Trained]:
    """`make(fsdp=..., dtype=..., seed=...)`: a wrapped model and its optimizer."""

    def make(*, fsdp: bool, dtype: torch.dtype = torch.float64, clip: float = 0.5, seed: int = 0) -> Trained:
        config = OptimizerConfig(clip_gradient_norm=clip, weight_decay=0.3)
        model = make_model(dtype=dtype, seed=seed)
        return wrap_model(model, config, dtype=dtype, distributed_optimizer=False, fsdp=fsdp)

    return make


def test_it_trains_as_replicas_do(make: Callable[..., Trained]) -> None:
    """Gradients are sums over micro-batches divided once by the count of places, then clipped."""
    (cut, cut_optimizer), (plain, plain_optimizer) = make(fsdp=True), make(fsdp=False)
    assert isinstance(cut, FullyShardedModel)
    norms = take_steps(plain, plain_optimizer, 3)
    assert take_steps(cut, cut_optimizer, 3) == pytest.approx(norms, rel=1e-6) and min(norms) > 0.5
    for found, expected in zip(cut.module.parameters(), plain.parameters(), strict=True):
        assert isinstance(found, DTensor)
        torch.testing.assert_close(whole(found.grad), expected.main_grad, rtol=0, atol=1e-12)
        torch.testing.assert_close(whole(found), whole(expected), rtol=0, atol=1e-12)


def test_bfloat16_is_computed_with_and_float32_kept(make: Callable[..., Trained]) -> None:
    (cut, cut_optimizer), (plain, plain_optimizer) = (
        make(fsdp=fsdp, dtype=torch.bfloat16, clip=0.0) for fsdp in (True, False)
    )
    assert [parameter.dtype for parameter in cut.parameters()] == [torch.float32] * 4
    assert cut(torch.ones(2, 4, dtype=torch.bfloat16)).dtype is torch.bfloat16
    take_steps(cut, cut_optimizer, 4)
    take_steps(plain, plain_optimizer, 4)
    for found, expected in zip(cut.module.parameters(), plain.parameters(), strict=True):
        # Sums in float32 of the same products, in another order.
        torch.testing.assert_close(whole(found), expected.main_param, rtol=0, atol=1e-6)
        assert found.grad.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("saved", "loaded"), [(True, True), (True, False), (False, True)])
def test_what_is_saved_goes_on_cut_and_whole(
    make: Callable[..., Trained], tmp_path: Path, dtype: torch.dtype, saved: bool, loaded: bool
) -> None:
    run, other = make(fsdp=saved, dtype=dtype, clip=0.0), make(fsdp=loaded, dtype=dtype, clip=0.0, seed=1)
    take_steps(*run, 2)
    state = RunState(step=2, seed=0, loader={}, distributed_optimizer=False, dtype=name_dtype(dtype))
    path = Checkpoints(tmp_path, launch=Launch()).save(state, *run)
    load_training(path, *other)
    for num_steps in (0, 2):
        take_steps(*run, num_steps)
        take_steps(*other, num_steps)
        for found, expected in zip(other[0].module.parameters(), run[0].module.parameters(), strict=True):
            torch.testing.assert_close(whole(found).to(dtype), whole(expected).to(dtype), rtol=1e-6, atol=1e-7)


def test_one_process_has_the_most_micro_batches() -> None:
    assert [most_micro_batches(number) for number in (0, 3)] == [0, 3]
