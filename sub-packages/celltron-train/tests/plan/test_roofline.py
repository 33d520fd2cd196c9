"""Time from arithmetic and traffic, and the state that lasts."""

from dataclasses import dataclass

import pytest

from celltron.core import InputError
from celltron.train.plan.gpus import GPUS
from celltron.train.plan.roofline import (
    ATTENTION_SHARE,
    LAUNCH_SECONDS,
    MEMORY_SHARE,
    PRODUCT_SHARE,
    micro_batch_seconds,
    optimizer_seconds,
    pipeline_seconds,
)
from celltron.train.plan.state import gathered_bytes, state_bytes
from celltron.train.precision import Precision


@dataclass(frozen=True)
class Work:
    flops: float = 0.0
    moved_bytes: float = 0.0
    is_attention: bool = False
    is_recomputed: bool = False
    kernels: int = 1


H100 = GPUS["h100"]


def test_a_large_product_takes_its_arithmetic_three_times() -> None:
    seconds = micro_batch_seconds([Work(flops=1e15, moved_bytes=1e9)], H100, "bf16")
    assert seconds == pytest.approx(3 * 1e15 / (PRODUCT_SHARE * 989.4e12))
    assert micro_batch_seconds([Work(flops=1e15)], H100, "fp32") == pytest.approx(3 * 1e15 / (PRODUCT_SHARE * 66.9e12))


def test_attention_is_slower_and_recomputed_work_is_done_once_more() -> None:
    seconds = micro_batch_seconds([Work(flops=1e15, is_attention=True, is_recomputed=True)], H100, "bf16")
    assert seconds == pytest.approx(4 * 1e15 / (ATTENTION_SHARE * 989.4e12))


def test_a_thin_product_waits_for_memory() -> None:
    seconds = micro_batch_seconds([Work(flops=1e12, moved_bytes=1e12)], H100, "bf16")
    assert seconds == pytest.approx(3 * 1e12 / (MEMORY_SHARE * 3.35e12))


def test_small_work_waits_for_the_host() -> None:
    assert micro_batch_seconds([Work(kernels=4)] * 10, H100, "bf16") == pytest.approx(3 * 40 * LAUNCH_SECONDS)


def test_the_optimizer_moves_its_state() -> None:
    assert optimizer_seconds(1e9, H100) == pytest.approx(38e9 / (MEMORY_SHARE * 3.35e12))


@pytest.mark.parametrize(("micro_batches", "stages", "bubble"), [(8, 1, 0.0), (8, 4, 3 / 8), (4, 2, 1 / 4)])
def test_bubble_is_stages_less_one_by_micro_batches(micro_batches: int, stages: int, bubble: float) -> None:
    """Narayanan et al. 2021, section 2.2.1."""
    whole = pipeline_seconds(2.0, num_micro_batches=micro_batches, num_stages=stages)
    assert whole / (2.0 * micro_batches) - 1 == pytest.approx(bubble)


def test_no_gpu_beats_its_data_sheet() -> None:
    for gpu in GPUS.values():
        assert 1e12 < gpu.fp32_flops < gpu.bf16_flops < 3e15
        assert gpu.network_bytes_per_second < gpu.nvlink_bytes_per_second < gpu.hbm_bytes_per_second < 1e13
    with pytest.raises(InputError, match=r"fp64.*proofs on a CPU.*bf16 or fp32"):
        H100.peak_flops("fp64")


def test_state_of_mixed_precision() -> None:
    """18 bytes a parameter: ZeRO's 16 and two more for gradients in float32; 6 + 12 / shards when it is split."""
    whole, split = (state_bytes(1e6, "bf16", shards=shards) for shards in (1, 8))
    assert whole.parameters + whole.gradients + whole.optimizer == 18e6
    assert split.parameters + split.gradients + split.optimizer == 7.5e6


@pytest.mark.parametrize(("precision", "of_all"), [("bf16", 16e6), ("fp32", 16e6), ("fp64", 32e6)])
def test_fsdp_splits_all_state(precision: Precision, of_all: float) -> None:
    parts = state_bytes(1e6, precision, shards=8, fsdp=True)
    assert parts.parameters == parts.gradients == of_all / 4 / 8 and parts.optimizer == of_all / 2 / 8


def test_a_wide_layer_or_a_wide_rest_is_what_fsdp_has_whole_at_most() -> None:
    """In bfloat16; `tests/plan` measures it."""
    assert gathered_bytes(0, 10, "bf16", shards=8) == 10 * (3 * 2 + 4)
    assert gathered_bytes(10, 0, "bf16", shards=8) == 10 * (2 + 4 + 4 / 8)
    assert gathered_bytes(10, 10, "fp32", shards=8) == 10 * (2 * 4 + 4 * 4)
