"""Memory that lasts from step to step: parameters, gradients and the optimizer's state.

Source: Rajbhandari et al. 2020, "ZeRO" (doi:10.1109/SC41405.2020.00024), sections 3.1 and 5.1. ZeRO counts 16 bytes a
parameter for mixed precision; Megatron sums gradients in float32, which makes 18.
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
    """Megatron's contiguous buffer, which lasts for the whole run."""
    optimizer: float
    """Adam's two moments, and float32 copies of parameters of fewer bits."""


def state_bytes(num_parameters: float, precision: Precision, *, shards: int) -> StateBytes:
    """What `num_parameters` on a process cost it.

    Args:
        num_parameters: Those that the process holds.
        precision: Of the run.
        shards: Processes that split the optimizer's state: the data-parallel degree under the distributed optimizer
            (ZeRO stage 1), otherwise 1.

    In bfloat16 2 bytes a parameter, 4 of gradient and 12 of optimizer, in float32 4, 4 and 8:

    >>> state_bytes(1, "bf16", shards=1), state_bytes(1, "fp32", shards=4)
    (StateBytes(parameters=2, gradients=4, optimizer=12.0), StateBytes(parameters=4, gradients=4, optimizer=2.0))
    """
    of_value = value_bytes(precision)
    of_optimizer = 2 * gradient_bytes(precision) + (FLOAT32_BYTES if of_value < FLOAT32_BYTES else 0)
    return StateBytes(
        parameters=num_parameters * of_value,
        gradients=num_parameters * gradient_bytes(precision),
        optimizer=num_parameters * of_optimizer / shards,
    )
