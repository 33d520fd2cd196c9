"""What a device can do at most, and the memory that a run takes of it."""

import time

import psutil
import torch

SIDES = (512, 1024, 2048, 4096, 8192)
"""Of the square matrices that are multiplied: larger ones come closer to the peak."""
BUDGET_SECONDS = {"cpu": 0.3, "cuda": 1.0}
"""Of products measured. A GPU needs a third of it for all sides: only the largest ones reach its peak."""
LONGEST_PRODUCT_SECONDS = {"cpu": 0.05, "cuda": 0.02}
"""After a product this long, larger ones gain nothing; shorter ones are repeated for so long."""
NUM_TRIES = 3


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The most floating-point operations a second that square matrix products reach here: 2 n^3 each.

    It is what the installed library reaches on this process's threads or GPU for about half a second, beside whatever
    else runs there; a vendor's figure is higher, and a GPU that gets warm may come to less. The matrices are random:
    with zeros a GPU would draw less power and run faster than in training.

    Args:
        device: Where.
        dtype: Of the matrices; products of float32 use TF32 where PyTorch has been told to.
    """
    best = measured_seconds = 0.0
    for side in SIDES:
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        # Not counted: a GPU's first product loads the library, and the first of each size its kernel.
        seconds = _time_products(left, right, num_products=1)
        for _ in range(NUM_TRIES):
            num_products = max(1, int(LONGEST_PRODUCT_SECONDS[device.type] / seconds))
            seconds = _time_products(left, right, num_products)
            best = max(best, 2.0 * side**3 / seconds)
            measured_seconds += num_products * seconds
            if measured_seconds > BUDGET_SECONDS[device.type]:
                return best
        if seconds > LONGEST_PRODUCT_SECONDS[device.type]:
            break
    return best


def _time_products(left: torch.Tensor, right: torch.Tensor, num_products: int) -> float:
    """Seconds of one of several products in a row."""
    _wait_for(left.device)
    start = time.perf_counter()
    for _ in range(num_products):
        torch.matmul(left, right)
    _wait_for(left.device)
    return (time.perf_counter() - start) / num_products


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_memory(device: torch.device) -> int:
    """Bytes that a run takes of a device.

    On a GPU the most that PyTorch has had allocated at once so far, on a CPU this process's resident set.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
