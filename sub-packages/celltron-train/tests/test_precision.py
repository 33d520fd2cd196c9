from typing import get_args

import torch

from celltron.train.precision import DTYPES, Precision, name_dtype


def test_every_precision_has_a_dtype_with_a_name() -> None:
    assert set(DTYPES) == set(get_args(Precision))
    assert [name_dtype(dtype) for dtype in DTYPES.values()] == ["float32", "bfloat16", "float64"]
    assert all(getattr(torch, name_dtype(dtype)) is dtype for dtype in DTYPES.values())
