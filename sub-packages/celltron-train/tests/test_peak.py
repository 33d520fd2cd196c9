import time

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
    now = 0.0

    def time_products(left: torch.Tensor, right: torch.Tensor, num_products: int) -> float:
        nonlocal now
        now += 0.4 * num_products
        return 0.4

    monkeypatch.setattr(peak, "_time_products", time_products)
    monkeypatch.setattr(peak.time, "perf_counter", lambda: now)
    assert measure_peak(CPU, torch.float32) == pytest.approx(2.0 * SIDES[0] ** 3 / 0.4)
    assert now == pytest.approx(0.8)


def test_memory_of_this_process_on_a_cpu() -> None:
    before = read_memory(CPU)
    held = np.ones(32 << 20, dtype=np.uint8)
    assert read_memory(CPU) - before >= held.nbytes // 2
    assert before > 10 << 20
