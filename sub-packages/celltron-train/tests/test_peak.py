import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch

from celltron.train import peak
from celltron.train.peak import SIDES, measure_peak, read_memory

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_real_measurement_is_short_and_near_what_a_plain_product_reaches(dtype: torch.dtype) -> None:
    start = time.perf_counter()
    found = measure_peak(CPU, dtype)
    assert time.perf_counter() - start < 5.0  # 1 s, and room for a busy machine
    matrix = torch.ones(512, 512, dtype=dtype)
    start = time.perf_counter()
    matrix @ matrix
    assert 2.0 * 512**3 / (time.perf_counter() - start) < 50 * found
    assert 1e8 < found < 1e14


def test_the_best_of_all_products_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that multiplies 1024 x 1024 at 3e9 a second once, and else and others at 1e9."""
    asked: list[tuple[int, int]] = []

    def time_products(left: torch.Tensor, right: torch.Tensor, num_products: int) -> float:
        side = len(left)
        asked.append((side, num_products))
        is_best = side == 1024 and len([pair for pair in asked if pair[0] == 1024]) == 3
        return 2.0 * side**3 / (3e9 if is_best else 1e9)

    monkeypatch.setattr(peak, "_time_products", time_products)
    monkeypatch.setattr(peak, "BUDGET_SECONDS", {"cpu": 60.0})
    monkeypatch.setattr(peak, "LONGEST_PRODUCT_SECONDS", {"cpu": 2.0})
    assert measure_peak(CPU, torch.float32) == pytest.approx(3e9)
    # 512 takes 0.27 s, 1024 2.1 s: no larger one is tried.
    assert {side for side, _ in asked} == {512, 1024}
    assert [count for side, count in asked if side == 512] == [1, 7, 7, 7]


def test_a_slow_device_is_not_measured_longer_than_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def time_products(left: torch.Tensor, right: torch.Tensor, num_products: int) -> float:
        asked.append(num_products)
        return 0.4

    monkeypatch.setattr(peak, "_time_products", time_products)
    assert measure_peak(CPU, torch.float32) == pytest.approx(2.0 * SIDES[0] ** 3 / 0.4)
    assert asked == [1, 1]


def test_what_a_gpu_loads_first_takes_nothing_from_the_largest_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """800 TFLOP/s and 10 microseconds a product; the first of a size half a second more, which loads its kernel."""
    now = 0.0
    counts: Counter[int] = Counter()

    def matmul(left: torch.Tensor, right: torch.Tensor) -> None:
        nonlocal now
        side = len(left)
        now += 1e-5 + 2.0 * side**3 / 800e12 + (0.0 if counts[side] else 0.5)
        counts[side] += 1

    monkeypatch.setattr(torch, "matmul", matmul)
    monkeypatch.setattr(torch, "randn", lambda *sides, device: torch.empty(*sides))
    monkeypatch.setattr(peak.time, "perf_counter", lambda: now)
    monkeypatch.setattr(peak, "BUDGET_SECONDS", {"cpu": peak.BUDGET_SECONDS["cuda"]})
    monkeypatch.setattr(peak, "LONGEST_PRODUCT_SECONDS", {"cpu": peak.LONGEST_PRODUCT_SECONDS["cuda"]})
    assert measure_peak(CPU, torch.float32) == pytest.approx(800e12, rel=0.01)
    assert set(counts) == set(SIDES)
    assert now - 0.5 * len(SIDES) < 0.4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_new_process_reaches_on_a_gpu_what_a_warm_one_does() -> None:
    program = (
        "import torch; from celltron.train.peak import measure_peak; "
        "print(*(measure_peak(torch.device('cuda'), torch.bfloat16) for _ in range(2)))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, second = map(float, ended.stdout.split())
    assert first == pytest.approx(second, rel=0.2)


def test_memory_of_this_process_on_a_cpu() -> None:
    before = read_memory(CPU)
    held = np.ones(96 << 20, dtype=np.uint8)  # more than the allocator ever keeps of what was freed
    assert read_memory(CPU) - before >= held.nbytes // 2
    assert before > 10 << 20


def test_reading_the_memory_of_a_gpu_leaves_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    most = [5 << 30]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: most[-1])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: most.append(0))
    gpu = torch.device("cuda", 0)
    assert [read_memory(gpu), read_memory(gpu)] == [5 << 30, 5 << 30]
