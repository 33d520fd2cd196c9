"""Count what this process communicates: every call of a collective, by kind and process group, and its bytes.

Two numbers are kept, of which the second is what interconnects are compared with:

- `tensor_bytes`: the whole tensor of the call, that is what is summed by an all-reduce or a reduce-scatter, what an
  all-gather ends with, what is sent.
- `sent_bytes`: what a process of the group sends, on average, where the call is made as a ring (Patarasuk and Yuan
  2009, doi:10.1016/j.jpdc.2008.09.002, section 3; the "bus bandwidth" factors of nccl-tests). Of a tensor of b bytes
  and n processes that is

      all-reduce                                   2 (n - 1) / n x b
      all-gather, reduce-scatter, all-to-all         (n - 1) / n x b
      broadcast, reduce                              (n - 1) / n x b      all but one pass it on
      gather, scatter                              (n - 1) / n^2 x b      b is what all processes have together
      send                                                         b
      recv                                                         0      the sender's

  A backend may choose another way, a tree for instance; this says what it could do with, not what it did.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True, slots=True)
class Traffic:
    """Calls of one kind on groups of one name."""

    calls: int = 0
    tensor_bytes: int = 0
    sent_bytes: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.calls + other.calls,
            self.tensor_bytes + other.tensor_bytes,
            self.sent_bytes + other.sent_bytes,
        )


@dataclass(frozen=True, slots=True)
class _Collective:
    kind: str
    tensors: int
    """The argument that holds the whole tensor, or this process's part of it."""
    is_part: bool = False


_COLLECTIVES = {
    "allreduce_": _Collective("all_reduce", 0),
    "allreduce_coalesced_": _Collective("all_reduce", 0),
    "_allgather_base_": _Collective("all_gather", 0),
    "allgather_": _Collective("all_gather", 0),
    "allgather_coalesced_": _Collective("all_gather", 0),
    "allgather_into_tensor_coalesced_": _Collective("all_gather", 0),
    "_reduce_scatter_base_": _Collective("reduce_scatter", 1),
    "reduce_scatter_": _Collective("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": _Collective("reduce_scatter", 1),
    "alltoall_": _Collective("all_to_all", 1),
    "alltoall_base_": _Collective("all_to_all", 1),
    "broadcast_": _Collective("broadcast", 0),
    "reduce_": _Collective("reduce", 0),
    "gather_": _Collective("gather", 1, is_part=True),
    "scatter_": _Collective("scatter", 0, is_part=True),
    "send": _Collective("send", 0),
    "recv_": _Collective("recv", 0),
    "recv_any_source_": _Collective("recv", 0),
}
_WITHOUT_DATA = ("barrier", "monitored_barrier_", "check_for_nan")
_SENT: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
    "broadcast": lambda n: (n - 1) / n,
    "reduce": lambda n: (n - 1) / n,
    "gather": lambda n: (n - 1) / n**2,
    "scatter": lambda n: (n - 1) / n**2,
    "send": lambda n: 1.0,
    "recv": lambda n: 0.0,
}


def ring_bytes(kind: str, num_processes: int, tensor_bytes: float) -> float:
    """What a process of a group of `num_processes` sends in a ring for one whole tensor, on average; see the module.

    >>> ring_bytes("all_reduce", 4, 1000), ring_bytes("all_gather", 4, 1000), ring_bytes("all_reduce", 1, 1000)
    (1500.0, 750.0, 0.0)
    """
    return _SENT[kind](num_processes) * tensor_bytes


class CountBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While this context is open, counts what its thread and the backward passes started in it communicate.

    It sees calls where they reach `torch.distributed`'s backends, whoever makes them and under whatever name: Megatron
    keeps functions of its own for some. Calls on groups of one process communicate nothing and are left out. Every
    operation passes through Python meanwhile, so steps are not timed in it. It does not see what goes past
    `torch.distributed`: a replayed CUDA graph, communication inside a fused kernel.

    `traffic` holds the sums by (kind, name of the group); kinds are those of `ring_bytes`, and the name is the
    `group_desc` under which the group was made, such as "TENSOR_MODEL_PARALLEL_GROUP", or "default_pg".
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.traffic: dict[tuple[str, str], Traffic] = {}

    def total(self, *kinds: str) -> Traffic:
        """The sum of some kinds, or of all where none is named."""
        return sum_traffic(part for (kind, _), part in self.traffic.items() if not kinds or kind in kinds)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        namespace = getattr(func, "namespace", "")
        if namespace in ("c10d", "_c10d_functional"):
            self._count(namespace, func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _count(self, namespace: str, name: str, args: tuple[Any, ...]) -> None:
        if namespace == "c10d" and name in _WITHOUT_DATA:
            return
        collective = _COLLECTIVES.get(name) if namespace == "c10d" else None
        if collective is None:
            raise NotImplementedError(f"{namespace}::{name} is not counted yet; add it to celltron.train.count_bytes")
        group = _find_group(args)
        if group.size() == 1:
            return
        whole = _num_bytes(args[collective.tensors]) * (group.size() if collective.is_part else 1)
        call = Traffic(1, whole, ring_bytes(collective.kind, group.size(), whole))
        key = (collective.kind, group.group_desc)
        self.traffic[key] = self.traffic.get(key, Traffic()) + call


def sum_traffic(parts: Iterable[Traffic]) -> Traffic:
    """Add up."""
    return sum(parts, Traffic())


def _find_group(args: tuple[Any, ...]) -> ProcessGroup:
    """The first script object of every such operation is its group."""
    boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
    group: ProcessGroup = ProcessGroup.unbox(boxed)
    return group


def _num_bytes(tensors: Any) -> int:
    """Bytes of a tensor, or of all in a list, or in a list of lists."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_num_bytes(part) for part in tensors)
