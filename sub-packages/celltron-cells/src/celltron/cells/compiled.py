"""The one place that decides how kernels are compiled: with numba, without the interpreter lock, cached if it can be.

``CACHE_REASON`` says why the machine code is not kept between runs; it is empty when it is kept.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import numba

Kernel = TypeVar("Kernel", bound=Callable[..., object])


def _reason_not_to_cache() -> str:
    folder = Path(__file__).parent
    kept = folder / "__pycache__"
    if os.access(kept if kept.exists() else folder, os.W_OK):
        return ""
    return f"{folder} cannot be written, so kernels are compiled anew in every process"


CACHE_REASON = _reason_not_to_cache()


def compiled(function: Kernel) -> Kernel:
    """Compile a kernel on its first call; arithmetic stays in the written order, so machines do not differ."""
    decorate = numba.njit(nogil=True, fastmath=False, cache=not CACHE_REASON)
    return cast(Kernel, decorate(function))
