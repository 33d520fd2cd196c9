"""The precisions that runs and checkpoints can have."""

from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "fp64"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def name_dtype(dtype: torch.dtype) -> str:
    """A dtype as checkpoints spell it, such as float32."""
    return str(dtype).removeprefix("torch.")
