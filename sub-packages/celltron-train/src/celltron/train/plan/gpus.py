"""What GPUs and the machines around them can do, from the vendor's data sheets.

Sources, all NVIDIA; arithmetic is that of dense matrices, without "sparsity":

- "A100 Tensor Core GPU" data sheet (80 GB SXM) and "DGX A100" data sheet (one 200 Gb/s adapter a GPU);
- "H100 Tensor Core GPU" data sheet (SXM5) and "DGX H100" data sheet (one 400 Gb/s adapter a GPU);
- "H200 Tensor Core GPU" data sheet (SXM);
- "DGX B200" and "HGX B200" data sheets (1,440 GB and 64 TB/s for eight GPUs).
"""

from dataclasses import dataclass
from typing import Literal

from celltron.core import InputError
from celltron.train.precision import Precision

GpuName = Literal["h100", "h200", "a100", "b200"]
GPUS_PER_NODE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU and its share of its machine."""

    name: str
    """As people write it."""
    memory_bytes: float
    """Its memory."""
    bf16_flops: float
    """Peak operations a second of matrix products in bfloat16, summed in float32."""
    fp32_flops: float
    """Peak operations a second in float32 proper: PyTorch does not use TF32 unless told to."""
    hbm_bytes_per_second: float
    """Peak rate of its memory."""
    nvlink_bytes_per_second: float
    """Peak rate to the other GPUs of its machine, one way: half of what the data sheet sums over both."""
    network_bytes_per_second: float
    """Peak rate of its network adapter, one way."""

    def peak_flops(self, precision: Precision) -> float:
        """Peak operations a second of matrix products.

        Raises:
            InputError: the precision is not one to train in on a GPU.
        """
        peaks: dict[str, float] = {"bf16": self.bf16_flops, "fp32": self.fp32_flops}
        if precision not in peaks:
            raise InputError(f"precision is {precision}, which is for proofs on a CPU; plan with {' or '.join(peaks)}")
        return peaks[precision]


GPUS: dict[GpuName, Gpu] = {
    "a100": Gpu(
        name="A100 80GB SXM",
        memory_bytes=80e9,
        bf16_flops=312e12,
        fp32_flops=19.5e12,
        hbm_bytes_per_second=2.039e12,
        nvlink_bytes_per_second=300e9,
        network_bytes_per_second=25e9,
    ),
    "h100": Gpu(
        name="H100 SXM",
        memory_bytes=80e9,
        bf16_flops=989.4e12,
        fp32_flops=66.9e12,
        hbm_bytes_per_second=3.35e12,
        nvlink_bytes_per_second=450e9,
        network_bytes_per_second=50e9,
    ),
    "h200": Gpu(
        name="H200 SXM",
        memory_bytes=141e9,
        bf16_flops=989.4e12,
        fp32_flops=66.9e12,
        hbm_bytes_per_second=4.8e12,
        nvlink_bytes_per_second=450e9,
        network_bytes_per_second=50e9,
    ),
    "b200": Gpu(
        name="B200 SXM",
        memory_bytes=180e9,
        bf16_flops=2250e12,
        fp32_flops=80e12,
        hbm_bytes_per_second=8e12,
        nvlink_bytes_per_second=900e9,
        network_bytes_per_second=50e9,
    ),
}
