"""Memory that lasts from step to step: parameters, gradients and the optimizer's state.

Source: Rajbhandari et al. 2020, "ZeRO" (doi:10.1109/SC41405.2020.00024), sections 3.1 and 5.1. ZeRO counts 16 bytes a
parameter for mixed precision; Megatron sums gradients in float32, which makes 18. FSDP's parts are float32 themselves,
which makes 16, and beside them some parameters are whole for a moment.
"""

from dataclasses import dataclass

from celltron.train.precision import DTYPES, Precision

FLOAT32_BYTES = 4


def value_bytes(precision: Precision) -> int:
    """Bytes of a parameter and of an activation.

    >>> value_bytes("bf16"), value_bytes("fp32")
    (2, 4)
    """
    return DTYPES[precision].itemsize


def gradient_bytes(precision: Precision) -> int:
    """Bytes of a value of the buffer in which gradients are summed, over micro-batches and over processes."""
    return max(FLOAT32_BYTES, value_bytes(precision))


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Of one process."""

    parameters: float
    gradients: float
    """Megatron's contiguous buffer, which lasts for the whole run; FSDP's parts of gradients, from the first
    micro-batch of a step to its end."""
    optimizer: float
    """Adam's two moments, and float32 copies of parameters of fewer bits."""


def state_bytes(num_parameters: float, precision: Precision, *, shards: int, fsdp: bool = False) -> StateBytes:
    """What `num_parameters` on a process cost it.

    Args:
        num_parameters: Those that the process computes with.
        precision: Of the run.
        shards: Processes that split the optimizer's state: the data-parallel degree under the distributed optimizer
            (ZeRO stage 1) and FSDP (stage 3), otherwise 1.
        fsdp: Whether they split parameters and gradients as well; parts are float32 at least, and the optimizer's own.

    In bfloat16 2 bytes a parameter, 4 of gradient and 12 of optimizer, in float32 4, 4 and 8:

    >>> state_bytes(1, "bf16", shards=1), state_bytes(1, "fp32", shards=4)
    (StateBytes(parameters=2, gradients=4, optimizer=12.0), StateBytes(parameters=4, gradients=4, optimizer=2.0))
    >>> state_bytes(1, "bf16", shards=4, fsdp=True)
    StateBytes(parameters=1.0, gradients=1.0, optimizer=2.0)
    """
    if fsdp:
        of_parts = num_parameters / shards * gradient_bytes(precision)
        return StateBytes(parameters=of_parts, gradients=of_parts, optimizer=2 * of_parts)
    of_value = value_bytes(precision)
    of_optimizer = 2 * gradient_bytes(precision) + (FLOAT32_BYTES if of_value < FLOAT32_BYTES else 0)
    return StateBytes(
        parameters=num_parameters * of_value,
        gradients=num_parameters * gradient_bytes(precision),
        optimizer=num_parameters * of_optimizer / shards,
    )


def gathered_bytes(num_root: float, num_layer: float, precision: Precision, *, shards: int) -> float:
    """What FSDP has whole at the peak of a micro-batch beside the parts, in which a layer is a unit, and all else one.

    R parameters of the root unit and P of a layer, in b bytes each, their gradients summed in g bytes, n shards:

        in the backward pass of a layer       2 R b          the root unit and its gradients, until the pass ends
                                            + 3 P b + P g    the layer, its gradients, the next layer, which is being
                                                             gathered, and the gradients of the one before, being summed
        at the end of the backward pass       R b + R g      the root's gradients, and they as they are summed
                                            + R g / n        the sum, before it is added to other micro-batches'

    As PyTorch 2.13 does it (`torch.distributed.fsdp`): a unit is gathered into a buffer and copied out of it; one more
    is gathered while a layer computes; gradients are copied into a buffer, of which one is under way. In the forward
    pass there is less.

    >>> gathered_bytes(10, 2, "bf16", shards=4), gathered_bytes(10, 8, "bf16", shards=4)
    (70.0, 120.0)
    """
    b, g = value_bytes(precision), gradient_bytes(precision)
    in_layer = 2 * num_root * b + num_layer * (3 * b + g)
    return float(max(in_layer, num_root * (b + g + g / shards)))
