"""What stands between a layer's matrix products: functions of rows, which can be compiled.

Axes: T rows, the places of all cells; D width, F feed-forward width.
"""

import shutil
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from celltron.core import InputError
from celltron.models.layers.norm import LayerNorm, Norm, normalise

Activation = Callable[[torch.Tensor], torch.Tensor]
NUM_SHOWN_ROWS = 4096


def add_branch(
    branch_TD: torch.Tensor, bias_D: torch.Tensor, residual_TD: torch.Tensor, probability: float, is_training: bool
) -> torch.Tensor:
    """The residual plus dropout(branch + bias), in the wider dtype of the two."""
    return residual_TD + torch.nn.functional.dropout(branch_TD + bias_D, p=probability, training=is_training)


def add_branch_and_normalise(
    branch_TD: torch.Tensor,
    bias_D: torch.Tensor,
    residual_TD: torch.Tensor,
    probability: float,
    norm: Norm,
) -> torch.Tensor:
    """The same in training, normalised."""
    return normalise(add_branch(branch_TD, bias_D, residual_TD, probability, True), norm)


def activate(inner_TF: torch.Tensor, bias_F: torch.Tensor, activation: Activation) -> torch.Tensor:
    """The activation of inner + bias."""
    return activation(inner_TF + bias_F)


class CompiledRows:
    """A function of rows, compiled for any number of them.

    What a compiler makes of a function depends on the numbers that it is shown, down to the order of a sum. It is shown
    `NUM_SHOWN_ROWS` rows, so that a resumed run, which begins with another batch, computes with the same kernels.
    """

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        # No measuring of which kernel is fastest: it could turn out otherwise the next time.
        self._function = torch.compile(function, fullgraph=True, options={"deterministic": True})
        self._known: set[Any] = set()

    def __call__(self, *arguments: Any) -> torch.Tensor:
        """Call the function: tensors of two axes hold rows, and all else is the same for all calls of a kind."""
        # On a CPU Megatron works under a mode of tensor functions, but recomputes activations outside of it.
        kind = (torch.is_grad_enabled(), torch._C._len_torch_function_stack(), *map(_kind, arguments))
        if kind not in self._known:
            self._show(arguments)
            self._known.add(kind)
        return self._function(*arguments)

    def _show(self, arguments: tuple[Any, ...]) -> None:
        shown = [_like(argument) for argument in arguments]
        devices = {tensor.device for tensor in shown if isinstance(tensor, torch.Tensor) and tensor.is_cuda}
        # Dropout draws, but the run's next draw must be the one that it would be without this.
        with torch.random.fork_rng(devices=devices):
            result = self._function(*shown)
            if result.requires_grad:
                result.sum().backward()  # type: ignore[no-untyped-call]


def _kind(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.shape[1:] if argument.dim() == 2 else argument.shape, argument.requires_grad
    return tuple(map(_kind, argument)) if isinstance(argument, tuple) else argument


def _like(argument: Any) -> Any:
    """A tensor of the same kind with rows of a fixed number, which the compiler takes for any number."""
    if isinstance(argument, tuple):
        return tuple(map(_like, argument))
    if not isinstance(argument, torch.Tensor):
        return argument
    num_rows = (NUM_SHOWN_ROWS,) if argument.dim() == 2 else ()
    shape = (*num_rows, *argument.shape[len(num_rows) :])
    shown = torch.zeros(shape, dtype=argument.dtype, device=argument.device)
    if isinstance(argument, torch.nn.Parameter):
        return torch.nn.Parameter(shown, requires_grad=argument.requires_grad)
    if num_rows:
        torch._dynamo.mark_dynamic(shown, 0)
    return shown.requires_grad_(argument.requires_grad)


@cache
def compiled(function: Callable[..., torch.Tensor]) -> CompiledRows:
    """The one compiled form of a function, which all layers share."""
    return CompiledRows(function)


def check_compiler(device: torch.device) -> None:
    """Raise InputError where PyTorch cannot compile for the device."""
    if device.type == "cpu" and not shutil.which("g++"):
        raise InputError(
            "engine.compile is true, but there is no C++ compiler g++, with which PyTorch compiles for a CPU; install "
            "it, or set engine.compile=false"
        )
    if device.type == "cuda" and not torch.utils._triton.has_triton():
        raise InputError(
            "engine.compile is true, but there is no Triton, with which PyTorch compiles for a GPU; install it, or set "
            "engine.compile=false"
        )


BranchWithBias = tuple[torch.Tensor, torch.Tensor]
BranchEnd = Callable[[BranchWithBias, torch.Tensor, float], torch.Tensor]
"""Takes a branch [S, B, D] with its bias, the residual and the probability of dropping a value."""


def branch_end(*, is_compiled: bool) -> Callable[..., BranchEnd]:
    """What Megatron's layers ask for the end of a branch: residual + dropout(branch + bias), and a norm of that.

    Megatron's own rounds a float32 residual to the branch's dtype.

    Args:
        is_compiled: Whether that is compiled in training, together with the norm if it is ours.
    """

    def choose(is_training: bool, unused_is_fused: bool, norm: torch.nn.Module | None = None) -> BranchEnd:
        if is_compiled and is_training:
            return partial(_end_compiled, norm)
        return partial(_end, norm, is_training)

    return choose


def _end(
    norm: torch.nn.Module | None,
    is_training: bool,
    branch_with_bias: BranchWithBias,
    residual_SBD: torch.Tensor,
    probability: float,
) -> torch.Tensor:
    sum_SBD = add_branch(*branch_with_bias, residual_SBD, probability, is_training)
    return sum_SBD if norm is None else norm(sum_SBD)


def _end_compiled(
    norm: torch.nn.Module | None, branch_with_bias: BranchWithBias, residual_SBD: torch.Tensor, probability: float
) -> torch.Tensor:
    branch_SBD, bias_D = branch_with_bias
    rows = branch_SBD.flatten(0, 1), bias_D, residual_SBD.flatten(0, 1), probability
    if isinstance(norm, LayerNorm):
        ended_TD: torch.Tensor = norm(*rows, function=compiled(add_branch_and_normalise))
        return ended_TD.view_as(residual_SBD)
    sum_SBD = compiled(add_branch)(*rows, True).view_as(residual_SBD)
    return sum_SBD if norm is None else norm(sum_SBD)
