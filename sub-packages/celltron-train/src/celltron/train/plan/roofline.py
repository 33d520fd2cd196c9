"""Time on a GPU: every operation takes as long as its arithmetic or its traffic with memory, whichever is longer.

Sources: Williams et al. 2009, "Roofline" (doi:10.1145/1498765.1498785); Narayanan et al. 2021
(doi:10.1145/3458817.3476209), section 2.2.1, for the pipeline's bubble.
"""

from collections.abc import Iterable
from typing import Protocol

from celltron.train.plan.gpus import Gpu
from celltron.train.precision import Precision

PRODUCT_SHARE = 0.8
"""Of the peak that large matrix products reach: 790 of 989 TFLOP/s in bfloat16 were measured on an H200."""
ATTENTION_SHARE = 0.5
"""Of the peak that flash attention reaches, forward and backward together (Dao 2023, doi:10.48550/arXiv.2307.08691,
figure 4: 50 to 60 % of an A100's with heads of 64)."""
MEMORY_SHARE = 0.8
"""Of the memory's peak rate that element-wise kernels reach; an assumption."""
LAUNCH_SECONDS = 6e-6
"""What PyTorch's host thread takes to start a kernel, which goes on while earlier ones run; an assumption."""
BACKWARD_PER_FORWARD = 2
"""A product has two in the backward pass, for its input and its weight; element-wise kernels move about twice as much
there too."""
OPTIMIZER_BYTES = 38
"""Read and written by clipping, AdamW and zeroing for a parameter that a process updates: its gradient three times, its
two moments and float32 value twice each, and the parameter."""


class Work(Protocol):
    """What one operation of the forward pass of a micro-batch does on one process."""

    @property
    def flops(self) -> float:
        """Operations of matrix products."""

    @property
    def moved_bytes(self) -> float:
        """Read from and written to the GPU's memory."""

    @property
    def is_attention(self) -> bool:
        """Whether it is the attention's pair of products."""

    @property
    def is_recomputed(self) -> bool:
        """Whether the backward pass does it once more."""

    @property
    def kernels(self) -> int:
        """Kernels that are started for it."""


def micro_batch_seconds(works: Iterable[Work], gpu: Gpu, precision: Precision) -> float:
    """Forward and backward of one micro-batch on one stage, without communication."""
    device = host = 0.0
    peak = gpu.peak_flops(precision)
    for work in works:
        share = ATTENTION_SHARE if work.is_attention else PRODUCT_SHARE
        moving = work.moved_bytes / (MEMORY_SHARE * gpu.hbm_bytes_per_second)
        passes = 1 + BACKWARD_PER_FORWARD + int(work.is_recomputed)
        device += passes * max(work.flops / (share * peak), moving)
        host += passes * work.kernels * LAUNCH_SECONDS
    return max(device, host)


def optimizer_seconds(num_updated: float, gpu: Gpu) -> float:
    """Clipping and AdamW for the parameters that one process updates."""
    return num_updated * OPTIMIZER_BYTES / (MEMORY_SHARE * gpu.hbm_bytes_per_second)


def pipeline_seconds(of_stage: float, *, num_micro_batches: int, num_stages: int) -> float:
    """All micro-batches through all stages, one forward and one backward in turn; stages wait at both ends.

    >>> pipeline_seconds(1.0, num_micro_batches=6, num_stages=3)
    8.0
    """
    return (num_micro_batches + num_stages - 1) * of_stage
