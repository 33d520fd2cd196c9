"""Parameters, gradients and optimizer state cut between data-parallel processes: PyTorch's FSDP2 through Megatron-core.

A process keeps a part of the rows of every tensor. A layer's parameters are gathered before it computes, in the forward
and again in the backward pass, and its gradients are summed into the parts after it (Rajbhandari et al. 2020, "ZeRO",
doi:10.1109/SC41405.2020.00024, stage 3; Zhao et al. 2023, doi:10.48550/arXiv.2304.11277).

Megatron-core 0.16 wraps a model for it, and leaves to others what is done here:

- gradients are summed, and divided once by the count of predicted places; the wrapper averages them over processes, and
  its `finish_grad_sync` does not take what `finalize_model_grads` gives it;
- with bfloat16 the parts are float32, gathered in bfloat16 and their gradients summed in float32; the wrapper gathers
  and sums in the parts' own precision;
- parts differ in their number of rows, and some are empty; Megatron describes them for a checkpoint as all alike;
- the optimizer works on the parts as plain tensors; of the wrapper's own PyTorch deduces at each operation how its
  result is cut, which takes longer than the operation.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import (
    DistributedDataParallel,
    TorchFullyShardedDataParallel,
    TorchFullyShardedDataParallelConfig,
)
from megatron.core.distributed import torch_fully_sharded_data_parallel as megatron_wrapper
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from celltron.train.parameter_shards import shard_parameters

# As Megatron's optimizer for bfloat16 parameters names its float32 copies.
_COPIES = "fp32_from_fp16_params"
_COPY_PREFIX = "optimizer.state.fp32_param."


class FullyShardedModel(TorchFullyShardedDataParallel):
    """A model whose parameters are cut between data-parallel processes.

    Each transformer layer is gathered by itself; embedding and head, which share a weight, with all else at once.

    Its `parameters` are this process's parts but empty ones, plain tensors, as the optimizer takes them; `module` has
    the cut ones.

    Args:
        model: This process's part of the model under the other parallelisms, with its initial weights.
        dtype: Of the parameters in computing.
    """

    def __init__(self, model: MegatronModule, *, dtype: torch.dtype) -> None:
        assert not model.config.gradient_accumulation_fusion, "there is no whole gradient to add to"
        is_narrow = dtype is torch.bfloat16
        if is_narrow:
            model.float()
        whole = {name: entry.without_data() for name, entry in shard_parameters(model).items()}
        with _gathered_as_bfloat16() if is_narrow else contextlib.nullcontext():
            super().__init__(
                config=model.config,
                ddp_config=TorchFullyShardedDataParallelConfig(),
                module=model,
                sub_modules_to_wrap={TransformerLayer},
            )
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        self.has_copies = is_narrow
        self._whole: dict[str, ShardedTensor] = whole
        self._parts = {name: _make_part(parameter) for name, parameter in model.named_parameters()}

    def named_parameters(self, *unused: Any, **unused_too: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """This process's part of every parameter that it has one of; fused kernels stumble over empty tensors."""
        yield from ((name, part) for name, part in self._parts.items() if part.numel())

    def zero_grad_buffer(self) -> None:
        """Forget the gradients."""
        for parameter in self.module.parameters():
            parameter.grad = None

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Give the optimizer's parameters their gradients, which the backward pass has summed."""
        for name, parameter in self.module.named_parameters():
            self._parts[name].grad = None if parameter.grad is None else _local(parameter.grad)

    @torch.no_grad()
    def scale_gradients(self, scaling_factor: float | torch.Tensor) -> None:
        """Multiply this process's part of all gradients."""
        for part in self._parts.values():
            if part.grad is not None:
                part.grad.mul_(scaling_factor)

    def shard_parameters(self) -> dict[str, ShardedTensor]:
        """This process's part of every parameter, and where it lies in the whole; it may be empty."""
        parameters = dict(self.module.named_parameters())
        return {name: _cut(self._whole[name], parameters[name], part) for name, part in self._parts.items()}


DataParallel = DistributedDataParallel | FullyShardedModel


@contextlib.contextmanager
def _gathered_as_bfloat16() -> Iterator[None]:
    """Give PyTorch the precision for which Megatron's wrapper has no argument."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    plain = megatron_wrapper.fully_shard
    megatron_wrapper.fully_shard = partial(plain, mp_policy=policy)
    try:
        yield
    finally:
        megatron_wrapper.fully_shard = plain


@torch.no_grad()
def _local(tensor: Any) -> torch.Tensor:
    """This process's rows of a cut tensor; not a copy."""
    assert isinstance(tensor, DTensor), type(tensor)
    return tensor.to_local().detach()


def _make_part(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """This process's rows as a parameter of their own, with what Megatron has noted at the whole one."""
    part = torch.nn.Parameter(_local(parameter))
    for name, value in vars(parameter).items():
        setattr(part, name, value)
    return part


def _cut(whole: ShardedTensor, parameter: Any, part: torch.nn.Parameter) -> ShardedTensor:
    """The entry of this process's rows, ceil(rows / processes) as far as they go, out of the entry of all."""
    num_rows, (num_parts,) = whole.local_shape[0], parameter.device_mesh.shape
    first_row = min(num_rows, parameter.device_mesh.get_local_rank() * -(-num_rows // num_parts))
    return replace(
        whole,
        data=part,
        dtype=part.dtype,
        local_shape=tuple(part.shape),
        global_offset=(whole.global_offset[0] + first_row, *whole.global_offset[1:]),
        # Parts need not be alike, which None says.
        axis_fragmentations=None,
        # The last number counts data-parallel replicas, of which there are none.
        replica_id=(*whole.replica_id[:-1], 0),
    )


def shard_training(model: FullyShardedModel, optimizer: MegatronOptimizer, *, is_loading: bool) -> dict[str, Any]:
    """`model` and `optimizer` for Megatron's checkpoints, under the names and in the precision of other layouts'."""
    entries = model.shard_parameters()
    state: dict[str, Any] = optimizer.sharded_state_dict(entries, is_loading=is_loading)
    if model.has_copies:
        copies = {name: replace(entry, key=_COPY_PREFIX + entry.key) for name, entry in entries.items()}
        state = {"optimizer": state, _COPIES: copies}
        entries = {
            name: replace(entry, data=entry.data.bfloat16(), dtype=torch.bfloat16) for name, entry in entries.items()
        }
    _, sharded = extract_matching_values({"model": entries, "optimizer": state}, _is_empty)
    return dict(sharded)


def _is_empty(value: Any) -> bool:
    return isinstance(value, ShardedTensor) and 0 in value.local_shape


@torch.no_grad()
def put_training(model: FullyShardedModel, optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Take over what `shard_training` was filled with."""
    state, tensors = loaded["optimizer"], loaded["model"]
    if model.has_copies:
        state, tensors = state["optimizer"], state[_COPIES]
    for name, part in model.named_parameters():
        part.copy_(tensors[name])
    optimizer.load_state_dict(state)


def most_micro_batches(num_micro_batches: int) -> int:
    """The most that a data-parallel process has of this batch; every process calls this.

    All of them gather parameters together, micro-batch for micro-batch.
    """
    most = torch.tensor([num_micro_batches])
    group = parallel_state.get_data_parallel_group_gloo()
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX, group=group)
    return int(most.item())
