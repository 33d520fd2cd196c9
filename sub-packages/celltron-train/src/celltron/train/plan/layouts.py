"""The layouts that a number of GPUs allows."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from celltron.train.parallel import ParallelConfig
from celltron.train.plan.gpus import GPUS_PER_NODE

Group = Literal["tensor", "context", "pipeline", "data", "embedding"]
MOST_CONTEXT = GPUS_PER_NODE
"""Processes that share a cell, at most: they exchange keys and values in every layer."""
LEAST_PLACES = 2048
"""Of the longest cell that each of them is left with, at least; an assumption: a cell of so many tokens keeps a GPU
busy, and fits on it."""
# What copies split between them, as (distributed_optimizer, fsdp): nothing, the optimizer's state, all.
_SPLITS = ((False, False), (True, False), (False, True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How processes, one a GPU, divide the work: tensor x pipeline x context x data of them."""

    parallel: ParallelConfig
    """The degrees that a run is given."""
    data: int
    """Replicas, each with cells of its own."""

    @property
    def num_gpus(self) -> int:
        """All processes."""
        return self.parallel.tensor * self.parallel.pipeline * self.num_copies

    @property
    def num_copies(self) -> int:
        """Processes that hold the same parameters: those of the replicas, and of each those that share its cells."""
        return self.parallel.context * self.data

    @property
    def num_shards(self) -> int:
        """Processes that split the optimizer's state, and with FSDP parameters and gradients too."""
        return self.num_copies if self.parallel.distributed_optimizer or self.parallel.fsdp else 1

    def group_size(self, group: Group) -> int:
        """Processes of a group; data's are all copies, the embedding's the first stage and the last."""
        return {
            "tensor": self.parallel.tensor,
            "context": self.parallel.context,
            "pipeline": self.parallel.pipeline,
            "data": self.num_copies,
            "embedding": min(2, self.parallel.pipeline),
        }[group]

    def group_stride(self, group: Group) -> int:
        """From one rank of a group to its next: Megatron counts tensor ranks, then context, then data, then stages."""
        tensor, stage = self.parallel.tensor, self.parallel.tensor * self.num_copies
        stages_apart = max(1, self.parallel.pipeline - 1)
        return {
            "tensor": 1,
            "context": tensor,
            "data": tensor,
            "pipeline": stage,
            "embedding": stage * stages_apart,
        }[group]

    def members_per_node(self, group: Group) -> int:
        """Processes of a group on one machine, the fewest on any; all where every such group lies within a machine.

        That is so on a single machine, and on more where size x stride of the group divides a machine's GPUs.

        >>> layout = Layout(parallel=ParallelConfig(tensor=2), data=16)
        >>> [layout.members_per_node(group) for group in ("tensor", "data")]
        [2, 4]
        """
        return _fewest_together(self.group_size(group), self.group_stride(group), self.num_gpus)

    def spans_nodes(self, group: Group) -> bool:
        """Whether any such group is on more than one machine."""
        return self.members_per_node(group) < self.group_size(group)


def list_layouts(num_gpus: int, *, context: int = 1) -> Iterator[Layout]:
    """Every way to give out `num_gpus`, whatever the model, `context` of them to each replica's cells.

    Tensor-parallel processes share a machine, for they exchange activations several times a layer (Narayanan et al.
    2021, doi:10.1145/3458817.3476209, section 3.2, takeaway 1).
    """
    for tensor in _divisors(num_gpus // context):
        if tensor > GPUS_PER_NODE:
            break
        for pipeline in _divisors(num_gpus // context // tensor):
            data = num_gpus // context // tensor // pipeline
            for sequence_parallel in (False, True)[: 2 if tensor > 1 else 1]:
                for distributed_optimizer, fsdp in _SPLITS:
                    if (distributed_optimizer or fsdp) and context * data == 1 or fsdp and pipeline > 1:
                        continue
                    parallel = ParallelConfig(
                        tensor=tensor,
                        pipeline=pipeline,
                        context=context,
                        sequence_parallel=sequence_parallel,
                        distributed_optimizer=distributed_optimizer,
                        fsdp=fsdp,
                    )
                    yield Layout(parallel=parallel, data=data)


def list_contexts(num_gpus: int, max_length: int, *, least: int = 1) -> list[int]:
    """Degrees of context parallelism worth trying for cells of up to `max_length` tokens: `least`, and that doubled.

    >>> list_contexts(64, 8192), list_contexts(64, 2048), list_contexts(2, 16_384), list_contexts(8, 2048, least=2)
    ([1, 2, 4], [1], [1, 2], [2])
    """
    doubles = [least * 2**power for power in range(1, MOST_CONTEXT.bit_length())]
    return [least] + [
        context
        for context in doubles
        if context <= MOST_CONTEXT and num_gpus % context == 0 and max_length >= context * LEAST_PLACES
    ]


@cache
def _fewest_together(size: int, stride: int, num_gpus: int) -> int:
    """The fewest members that a group has on a machine which it is on, of all groups of a size and a stride.

    >>> _fewest_together(3, 1, 12)  # ranks 6 and 7 are on the first machine, 8 is on the second
    1
    """
    firsts = [rank for rank in range(num_gpus - stride * (size - 1)) if rank // stride % size == 0]
    groups = [range(first, first + stride * size, stride) for first in firsts]
    return min(min(Counter(rank // GPUS_PER_NODE for rank in group).values()) for group in groups)


def _divisors(number: int) -> list[int]:
    """Rising.

    >>> _divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
