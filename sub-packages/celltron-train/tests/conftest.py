"""One process of the engine on a CPU, and a small model to train: y = W norm(x) + b.

Axes: M places, D width of the input, E of the output.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import torch_fully_sharded_data_parallel as megatron_fsdp
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from celltron.train import cpu
from celltron.train.launch import Launch, start_process_group
from celltron.train.optimizer import OptimizerConfig, set_learning_rate, wrap_model
from celltron.train.parallel import ParallelConfig, start_model_parallel

CPU = torch.device("cpu")
PATCHED_CUDA = ("current_device", "synchronize", "empty_cache", "manual_seed", "get_rng_state")
PATCHED_RANDOM = ("_get_cuda_rng_state", "_set_cuda_rng_state")


@pytest.fixture(scope="module")
def installed() -> Iterator[None]:
    """What `cpu.install` changes, put back afterwards: other packages' tests run in this process too."""
    if cpu._installed:
        yield
        return
    before = [(torch.cuda, name, getattr(torch.cuda, name)) for name in PATCHED_CUDA]
    before += [(megatron_random, name, getattr(megatron_random, name)) for name in PATCHED_RANDOM]
    before += [(megatron_fsdp, "DeviceMesh", megatron_fsdp.DeviceMesh)]
    logger = logging.getLogger(megatron_random.__name__)
    level = logger.level
    cpu.install()
    yield
    cpu._installed.pop().__exit__(None, None, None)
    logger.setLevel(level)
    for owner, name, value in before:
        setattr(owner, name, value)


@pytest.fixture(scope="module")
def engine(installed: None) -> Iterator[None]:
    """The process group of one process, and Megatron's groups and generators in it."""
    is_mine = not torch.distributed.is_initialized()
    start_process_group(Launch(), CPU)
    start_model_parallel(ParallelConfig(), seed=0)
    yield
    parallel_state.destroy_model_parallel()
    if is_mine:
        torch.distributed.destroy_process_group()


class SmallModel(MegatronModule):
    """y_ME = norm(x_MD) W + b, and what Megatron's schedules ask of a pipeline stage."""

    def __init__(self, config: TransformerConfig, num_outputs: int) -> None:
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder
        self.norm = torch.nn.LayerNorm(config.hidden_size, dtype=config.params_dtype)
        self.linear = torch.nn.Linear(config.hidden_size, num_outputs, dtype=config.params_dtype)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """The first stage has none."""

    def forward(self, x_MD: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x_MD))


@pytest.fixture
def make_model(engine: None) -> Callable[..., SmallModel]:
    """`make_model(dtype=..., hidden_size=..., seed=...)`."""

    def make(*, dtype: torch.dtype = torch.float64, hidden_size: int = 4, seed: int = 0) -> SmallModel:
        config = TransformerConfig(
            num_layers=1,
            hidden_size=hidden_size,
            num_attention_heads=1,
            params_dtype=dtype,
            bf16=dtype is torch.bfloat16,
            calculate_per_token_loss=True,
            gradient_accumulation_fusion=False,
        )
        torch.manual_seed(seed)
        return SmallModel(config, num_outputs=3)

    return make


def step_on_invented_gradients(wrapped: Any, optimizer: Any, num_steps: int) -> None:
    for step in range(num_steps):
        wrapped.zero_grad_buffer()
        generator = torch.Generator().manual_seed(step)
        for parameter in wrapped.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        set_learning_rate(optimizer, 0.1, 0.01)
        optimizer.step()


@pytest.fixture
def take_steps() -> Callable[[Any, Any, int], None]:
    """`take_steps(wrapped, optimizer, num_steps)`: the same invented gradients every time."""
    return step_on_invented_gradients


@pytest.fixture
def train(make_model: Callable[..., SmallModel]) -> Callable[..., tuple[Any, Any]]:
    """`train(num_steps, seed=..., ...)`: a wrapped model and its optimizer after some steps on invented gradients."""

    def make(
        num_steps: int, *, seed: int = 0, is_distributed: bool = False, dtype: torch.dtype = torch.float64
    ) -> tuple[Any, Any]:
        wrapped, optimizer = wrap_model(
            make_model(seed=seed, dtype=dtype),
            OptimizerConfig(),
            dtype=dtype,
            distributed_optimizer=is_distributed,
        )
        step_on_invented_gradients(wrapped, optimizer, num_steps)
        return wrapped, optimizer

    return make
