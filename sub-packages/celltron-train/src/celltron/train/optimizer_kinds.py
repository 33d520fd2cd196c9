"""Continuing with the other kind of optimizer than the checkpoint's: split between data-parallel processes, or whole.

Both write their moments under the parameters' names and in their shapes, and with bfloat16 their float32 copies of the
parameters too, under another name. What differs is the arrangement around them, and where the count of steps stands.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor

_COPY_IN_SPLIT = "optimizer.state.param."
_COPY_IN_WHOLE = "optimizer.state.fp32_param."


def read_other_kind(
    sharded: dict[str, Any],
    read: Callable[[dict[str, Any]], dict[str, Any]],
    *,
    is_split: bool,
    has_copies: bool,
) -> dict[str, Any]:
    """Read model and optimizer of a checkpoint whose optimizer is of the other kind.

    Args:
        sharded: This run's `model` and `optimizer`, as Megatron shards them for loading.
        read: Reads such a state from the checkpoint.
        is_split: Whether this run's optimizer is split between processes; the checkpoint's is not then.
        has_copies: Whether the optimizer has float32 copies of the parameters.

    Returns:
        `model` and `optimizer`, arranged as this run's.
    """
    shards = [shard for shard in nested_values(sharded["optimizer"]) if isinstance(shard, ShardedTensor)]
    wanted = {shard.key: replace(shard, key=_name_in_other_kind(shard.key, is_split=is_split)) for shard in shards}
    if not has_copies:
        # A split optimizer names float32 parameters its copies; a whole one does not have them twice.
        wanted = {key: shard for key, shard in wanted.items() if not key.startswith(_COPY_IN_SPLIT)}
    loaded = read({"model": sharded["model"], "tensors": wanted})
    tensors = dict(loaded["tensors"])
    if not has_copies:
        for name, shard in sharded["model"].items():
            tensors[_COPY_IN_SPLIT + shard.key] = loaded["model"][name]

    def fill(value: Any) -> Any:
        if isinstance(value, ShardedTensor):
            return tensors[value.key]
        return value.unwrap() if isinstance(value, LocalNonpersistentObject) else value

    optimizer = dict_list_map_inplace(fill, sharded["optimizer"])
    _set_num_steps(optimizer, _num_steps(loaded["optimizer"]), is_split=is_split)
    return {"model": loaded["model"], "optimizer": optimizer}


def _name_in_other_kind(key: str, *, is_split: bool) -> str:
    here, there = (_COPY_IN_SPLIT, _COPY_IN_WHOLE) if is_split else (_COPY_IN_WHOLE, _COPY_IN_SPLIT)
    return there + key.removeprefix(here) if key.startswith(here) else key


def _num_steps(state: dict[str, Any]) -> float:
    """The count that all parameters share: beside the moments, or with a fused Adam in the groups of parameters."""
    inner = state.get("optimizer", state)
    counts = {float(group["step"]) for group in inner["param_groups"] if "step" in group}
    if "common_step" in inner.get("state", {}):
        counts.add(float(inner["state"]["common_step"]))
    assert len(counts) == 1, counts
    return counts.pop()


def _set_num_steps(state: dict[str, Any], num_steps: float, *, is_split: bool) -> None:
    inner = state.get("optimizer", state)
    is_in_groups = is_split or any("step" in group for group in inner["param_groups"])
    for group in inner["param_groups"] if is_in_groups else []:
        group["step"] = num_steps
    if not is_in_groups:
        inner["state"]["common_step"] = torch.tensor(num_steps)
