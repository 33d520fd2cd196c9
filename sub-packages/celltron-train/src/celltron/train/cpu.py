"""Megatron-core on a CPU over gloo: the few places where it takes a CUDA device for granted.

`install` changes, for this process:

- `torch.cuda.current_device` answers the CPU device, which Megatron passes on as `device=`;
- `torch.cuda.synchronize`, `empty_cache` do nothing; `manual_seed`, `get_rng_state` mean the CPU generator;
- `megatron.core.tensor_parallel.random._get_cuda_rng_state` and `_set_cuda_rng_state` use the CPU generator, and the
  warning that the CPU generator moved inside a forked state is dropped, since here it is that very state;
- `megatron.core.distributed.torch_fully_sharded_data_parallel.DeviceMesh.from_group` makes a mesh of CPUs of a group;
- one `TorchFunctionMode` for tensor calls: `device="cuda"` becomes the CPU, `Tensor.cuda()` is the identity,
  `Tensor.type()` gives the `torch.cuda.*` name that Megatron's optimizers and gradient clipping compare with (float64
  answers as float32, so that the optimizer takes it for a full-precision parameter), and `Tensor.float()` leaves
  float64 alone, so that float64 runs, which prove layouts equal, stay exact through Megatron's cross entropy;
- where the processor has no instructions for bfloat16 (AMX or AVX512-BF16), the same mode computes products of bfloat16
  tensors in float32 and rounds the result, as such instructions do: PyTorch's own way takes four times as long.

Never imported on CUDA.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.package_info import __version__ as megatron_version
from torch.overrides import TorchFunctionMode

TESTED_MEGATRON_VERSIONS = ("0.16.1",)
CPU = torch.device("cpu")
_PRODUCTS = {
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.nn.functional.linear,
    torch.nn.functional.scaled_dot_product_attention,
}
_installed: list[TorchFunctionMode] = []


class _CudaMeansCpu(TorchFunctionMode):
    """Answers CUDA requests of tensor functions with the CPU."""

    def __init__(self, *, has_bfloat16: bool) -> None:
        super().__init__()
        self.slow_products = set() if has_bfloat16 else _PRODUCTS

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        keywords = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.float and args[0].dtype is torch.float64:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not keywords:
            name = str(func(args[0])).replace("torch.", "torch.cuda.", 1)
            return name.replace("DoubleTensor", "FloatTensor")
        if func in self.slow_products and args[0].dtype is torch.bfloat16:
            return func(*map(_widen, args), **{name: _widen(value) for name, value in keywords.items()}).bfloat16()
        device = keywords.get("device")
        if device is not None and torch.device(device).type == "cuda":
            keywords["device"] = CPU
        return func(*args, **keywords)


def _widen(value: Any) -> Any:
    is_narrow = isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16
    return value.float() if is_narrow else value


def _set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
    torch.default_generator.set_state(new_state)


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _get_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.default_generator.get_state()


def install() -> None:
    """Make Megatron-core run on this process's CPU; calling it again changes nothing.

    Raises:
        ImportError: the installed megatron-core is not one these changes were tested with.
    """
    if _installed:
        return
    if megatron_version not in TESTED_MEGATRON_VERSIONS:
        raise ImportError(
            f"megatron-core {megatron_version} is installed, but training on a CPU was tested with "
            f"{', '.join(TESTED_MEGATRON_VERSIONS)} only; install megatron-core=={TESTED_MEGATRON_VERSIONS[-1]}."
        )
    from megatron.core.distributed import torch_fully_sharded_data_parallel as megatron_fsdp
    from megatron.core.tensor_parallel import random as megatron_random

    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.empty_cache = lambda: None
    torch.cuda.manual_seed = _seed
    torch.cuda.get_rng_state = _get_rng_state
    megatron_random._get_cuda_rng_state = _get_rng_state
    megatron_random._set_cuda_rng_state = _set_rng_state
    mesh_class = megatron_fsdp.DeviceMesh
    megatron_fsdp.DeviceMesh = SimpleNamespace(from_group=lambda group, device: mesh_class.from_group(group, "cpu"))
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)
    mode = _CudaMeansCpu(has_bfloat16=torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    mode.__enter__()  # type: ignore[no-untyped-call]
    _installed.append(mode)
