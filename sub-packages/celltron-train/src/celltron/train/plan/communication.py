"""What one process sends in a step, by kind, for an encoder of Megatron's parallel layers.

It stands between an embedding split by vocabulary and the decoder tied to it.

Sources: Shoeybi et al. 2019 (doi:10.48550/arXiv.1909.08053), section 3, for the all-reduces of tensor parallelism;
Korthikanti et al. 2022 (doi:10.48550/arXiv.2205.05198), section 4.2, for what sequence parallelism makes of them;
Narayanan et al. 2021 (doi:10.1145/3458817.3476209), sections 2.2 and 3, for pipeline stages; Rajbhandari et al. 2020
(doi:10.1109/SC41405.2020.00024), section 7, for the distributed optimizer; Zhao et al. 2023
(doi:10.48550/arXiv.2304.11277), section 3.3, for FSDP. Bytes sent are those of a ring, see
`celltron.train.count_bytes`. Scalars, such as the gradient's norm, are left out.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from celltron.train.count_bytes import ring_bytes
from celltron.train.plan.gpus import Gpu
from celltron.train.plan.layouts import Group, Layout

SHAPE_BYTES = 24
"""A tensor's shape, three int64, which stages send before every tensor: cells differ in length."""
LINK_SHARE = 0.8
"""Of a link's peak that large messages reach; an assumption, of the order of what nccl-tests shows within a machine."""
NVLINK_SECONDS, NETWORK_SECONDS = 10e-6, 30e-6
"""What a call costs however small it is; an assumption."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """Calls of one kind in a step on one of this process's groups."""

    group: Group
    kind: str
    """One of `celltron.train.count_bytes.ring_bytes`."""
    calls: float
    tensor_bytes: float
    """The whole tensor, of all calls together."""
    is_beside_computing: bool = False
    """Whether the step waits for it only where it takes longer than what is computed meanwhile."""

    def sent_bytes(self, layout: Layout) -> float:
        """What this process sends."""
        return ring_bytes(self.kind, layout.group_size(self.group), self.tensor_bytes)

    def seconds(self, layout: Layout, gpu: Gpu) -> float:
        """Time of the calls one after the other.

        A ring over several machines enters and leaves each of them once; NCCL lays as many rings side by side as the
        group has GPUs with adapters on a machine.
        """
        rate, latency = gpu.nvlink_bytes_per_second, NVLINK_SECONDS
        if layout.spans_nodes(self.group):
            adapters = 1 if self.kind == "send" else layout.members_per_node(self.group)
            rate, latency = min(rate, adapters * gpu.network_bytes_per_second), NETWORK_SECONDS
        return self.calls * latency + self.sent_bytes(layout) / (LINK_SHARE * rate)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """What a process holds of the model, and what passes through it in a step, as far as communication goes."""

    is_first: bool
    is_last: bool
    num_layers: int
    """On this stage."""
    num_recomputed_layers: int
    """Of them, those whose whole forward pass the backward pass does once more."""
    num_reattended_layers: int = 0
    """Of them, those whose attention the backward pass does once more."""
    num_parameters: float
    """On this process."""
    num_split_parameters: float
    """Those of them that stand where sequence parallelism cuts the sequence: norms and the biases after a sum."""
    num_embedding_parameters: float
    """Rows of the vocabulary times width, on this process."""
    num_layer_parameters: float = 0.0
    """Of one layer, on this process: what FSDP gathers at once."""
    value_bytes: int
    """Of a parameter and of an activation."""
    gradient_bytes: int
    """Of a value of the gradient buffer."""
    num_micro_batches: float
    """In a step."""
    hidden_bytes: float
    """The hidden states of all places of the step, whole; of context-parallel processes this one's places."""
    predicted_bytes: float
    """The hidden states of those of them that are predicted."""
    num_predicted: float
    """How many they are."""


def list_exchanges(stage: Stage, layout: Layout) -> list[Exchange]:
    """All that a process exchanges in a step."""
    exchanges = [*_within_layers(stage, layout), *_attention(stage, layout), *_head(stage)]
    exchanges += [*_between_stages(stage, layout), *_gradients(stage, layout)]
    return [exchange for exchange in exchanges if layout.group_size(exchange.group) > 1 and exchange.tensor_bytes]


def _within_layers(stage: Stage, layout: Layout) -> Iterable[Exchange]:
    """Forward a sum after each of a layer's two branches, backward one before it.

    With sequence parallelism each sum is a reduce-scatter, whose adjoint is an all-gather, and the input of each branch
    is gathered: forward, and again for the gradient of the weight.
    """
    m, hidden = stage.num_micro_batches, stage.hidden_bytes
    embeddings, again = int(stage.is_first), 2 * stage.num_recomputed_layers
    if layout.parallel.sequence_parallel:
        # The embedding is summed whole, then cut; the head takes whole sequences.
        gathers = 6 * stage.num_layers + again + embeddings + int(stage.is_last)
        scatters = 4 * stage.num_layers + again
        yield Exchange("tensor", "all_gather", m * gathers, hidden * gathers)
        yield Exchange("tensor", "reduce_scatter", m * scatters, hidden * scatters)
        yield Exchange("tensor", "all_reduce", m * embeddings, hidden * embeddings)
    else:
        sums = 4 * stage.num_layers + again + embeddings
        yield Exchange("tensor", "all_reduce", m * sums, hidden * sums)


def _attention(stage: Stage, layout: Layout) -> Iterable[Exchange]:
    """Keys and values of whole rows are gathered, whenever a layer attends; backward their gradients are scattered."""
    m, context = stage.num_micro_batches, layout.parallel.context
    row = 2 * stage.hidden_bytes * context / layout.parallel.tensor
    gathers = stage.num_layers + stage.num_reattended_layers
    yield Exchange("context", "all_gather", m * gathers, row * gathers)
    yield Exchange("context", "reduce_scatter", m * stage.num_layers, row * stage.num_layers)


def _head(stage: Stage) -> Iterable[Exchange]:
    """Before the decoder a sum backward, and the cross entropy's three sums of a number a place."""
    if stage.is_last:
        yield Exchange("tensor", "all_reduce", stage.num_micro_batches, stage.predicted_bytes)
        of_sums = 3 * stage.num_predicted * stage.gradient_bytes
        yield Exchange("tensor", "all_reduce", 3 * stage.num_micro_batches, of_sums)


def _between_stages(stage: Stage, layout: Layout) -> Iterable[Exchange]:
    """Hidden states to the next stage, their gradients to the one before."""
    share = layout.parallel.tensor if layout.parallel.sequence_parallel else 1
    sends = int(not stage.is_first) + int(not stage.is_last)
    num_bytes = stage.hidden_bytes / share + SHAPE_BYTES * stage.num_micro_batches
    yield Exchange("pipeline", "send", 2 * sends * stage.num_micro_batches, sends * num_bytes)


def _gradients(stage: Stage, layout: Layout) -> Iterable[Exchange]:
    """Once a step: gradients of copies, of what several tensor-parallel processes hold, and of the tied embedding."""
    of_all = stage.num_parameters * stage.gradient_bytes
    if layout.parallel.fsdp:
        yield from _units(stage)
    elif layout.parallel.distributed_optimizer:
        yield Exchange("data", "reduce_scatter", 1, of_all)
        yield Exchange("data", "all_gather", 1, stage.num_parameters * stage.value_bytes)
    else:
        yield Exchange("data", "all_reduce", 1, of_all)
    if layout.parallel.sequence_parallel:
        shards = layout.num_shards if layout.parallel.fsdp else 1
        yield Exchange("tensor", "all_reduce", 1, stage.num_split_parameters / shards * stage.gradient_bytes)
    if stage.is_first or stage.is_last:
        yield Exchange("embedding", "all_reduce", 1, stage.num_embedding_parameters * stage.gradient_bytes)


def _units(stage: Stage) -> Iterable[Exchange]:
    """FSDP: in every micro-batch each unit is gathered forward and backward, and its gradients are scattered.

    A layer's gather runs beside the layer before it, its scatter beside the layer after it, both one after the other on
    the group's one communicator. Nothing runs beside those of the unit of all else: it is needed before the first layer
    and before the backward pass, which ends with its gradients. Left out are that its second gather may begin while
    the GPU is still busy with the forward pass, that rows of a tensor are padded to a multiple of the processes, and
    copies into and out of buffers.
    """
    m, num_layers = stage.num_micro_batches, stage.num_layers
    of_layers = num_layers * stage.num_layer_parameters
    of_root = stage.num_parameters - of_layers
    for is_beside, num_units, num_parameters in ((True, num_layers, of_layers), (False, 1, of_root)):
        values, gradients = num_parameters * stage.value_bytes, num_parameters * stage.gradient_bytes
        yield Exchange("data", "all_gather", 2 * m * num_units, 2 * m * values, is_beside)
        yield Exchange("data", "reduce_scatter", m * num_units, m * gradients, is_beside)
