"""One process of megatron-core without a GPU, and a small Geneformer in it.

The models know nothing of the training engine, so their tests do not use its CPU adapter: for one process without
dropout it takes far less.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode

from celltron.models.geneformer import Geneformer, GeneformerConfig, build_geneformer
from celltron.models.geneformer.model import silence_padding_rows

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """Megatron's process groups and generators on one process, its CUDA calls answered with the CPU."""
    is_mine = not torch.distributed.is_initialized()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: CPU)
        patch.setattr(torch.cuda, "manual_seed", lambda seed: None)
        patch.setattr(torch.cuda, "get_rng_state", lambda *unused: torch.default_generator.get_state())
        patch.setattr(megatron_random, "_get_cuda_rng_state", lambda **unused: torch.default_generator.get_state())
        patch.setattr(megatron_random, "_set_cuda_rng_state", lambda *unused, **unused_keywords: None)
        if is_mine:
            torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel()
        megatron_random.model_parallel_cuda_manual_seed(0)
        yield
        parallel_state.destroy_model_parallel()
        if is_mine:
            torch.distributed.destroy_process_group()


class _Float64Stays(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float and args[0].dtype is torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


@pytest.fixture
def float64_stays() -> Iterator[None]:
    """Megatron's cross entropy works on `logits.float()`; here float64 logits are left in float64."""
    with _Float64Stays():
        yield


SMALL = GeneformerConfig(
    num_layers=3,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=4,
    max_positions=16,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    vocabulary_multiple=16,
)


@pytest.fixture
def small() -> GeneformerConfig:
    return SMALL


@torch.no_grad()
def _scramble(model: Geneformer, seed: int) -> None:
    """Give every parameter other values, biases and norms too, so that no mix-up of two of them goes unseen."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(values + 1.0 if name.endswith("norm.weight") else values)
    model.embedding.word_embeddings.weight[model.num_tokens :] = 0.0
    silence_padding_rows(model)


@pytest.fixture
def make_model(one_process: None) -> Callable[..., Geneformer]:
    def make(
        config: GeneformerConfig = SMALL, *, num_tokens: int = 101, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> Geneformer:
        model = build_geneformer(config, num_tokens=num_tokens, dtype=dtype, sequence_parallel=False, seed=seed)
        _scramble(model, seed)
        return model.eval()

    return make


Cells = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture
def make_cells() -> Callable[..., Cells]:
    """Random cells of the given lengths: token ids [B, S] and where there is padding [B, S]."""

    def make(*lengths: int, num_tokens: int = 101, num_places: int | None = None, seed: int = 0) -> Cells:
        generator = torch.Generator().manual_seed(seed)
        S = num_places or max(lengths)
        tokens_BS = torch.randint(2, num_tokens, (len(lengths), S), generator=generator)
        is_padding_BS = torch.arange(S)[None, :] >= torch.tensor(lengths)[:, None]
        return tokens_BS.masked_fill(is_padding_BS, 0), is_padding_BS

    return make


@pytest.fixture
def layer_norm() -> Callable[..., torch.Tensor]:
    """Layer normalisation written out."""

    def norm(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float = 1e-12) -> torch.Tensor:
        centred = values - values.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight + bias

    return norm


@pytest.fixture
def attention() -> Callable[..., torch.Tensor]:
    """Softmax attention written out for [B, N, S, H]; hidden keys [B, S] get no weight."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_hidden_BS: torch.Tensor) -> torch.Tensor:
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        return torch.softmax(scores.masked_fill(is_hidden_BS[:, None, None, :], -math.inf), dim=-1) @ v

    return attend
