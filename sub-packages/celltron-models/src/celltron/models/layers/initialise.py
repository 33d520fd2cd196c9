"""Initial weights as a function of (seed, global parameter name) alone: every layout starts from the same ones."""

import hashlib

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.module import MegatronModule


def draw_parameter(seed: int, name: str, shape: tuple[int, ...], standard_deviation: float) -> np.ndarray:
    """Draw one whole parameter, float32: weights N(0, sd^2), norm weights 1, biases 0 (BERT's initialisation).

    The generator is Philox keyed by a hash of (seed, name), the same bits on every machine.

    Args:
        seed: The run's seed.
        name: The parameter's global name; for layers of a stack, with the layer's number in it.
        shape: The whole parameter's shape.
        standard_deviation: Of the weights.
    """
    kind = name.rsplit(".", 1)[-1]
    if kind == "bias":
        return np.zeros(shape, dtype=np.float32)
    if name.rsplit(".", 2)[-2].endswith("norm"):
        return np.ones(shape, dtype=np.float32)
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "little")
    values = np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)
    values *= np.float32(standard_deviation)
    return values


@torch.no_grad()
def initialise(model: MegatronModule, *, seed: int, standard_deviation: float, num_tokens: int) -> None:
    """Set every parameter of this rank's part of `model` to its cut of the whole parameter.

    Args:
        model: This rank's part; where its parameters lie in the whole model is read off its sharded state dict.
        seed: The run's seed.
        standard_deviation: Of the weights.
        num_tokens: The true vocabulary; rows after it, which pad a vocabulary-parallel parameter, are set to 0.
    """
    sharded = model.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    for entry in sharded.values():
        if not isinstance(entry, ShardedTensor):
            continue
        assert entry.prepend_axis_num == 0, entry.key
        is_padded = bool(entry.allow_shape_mismatch)
        whole_shape = (num_tokens, *entry.global_shape[1:]) if is_padded else tuple(entry.global_shape)
        whole = draw_parameter(seed, entry.key, whole_shape, standard_deviation)
        corners = zip(entry.global_offset, entry.local_shape, strict=True)
        cut = np.ascontiguousarray(whole[tuple(slice(start, start + size) for start, size in corners)])
        entry.data.zero_()
        entry.data[tuple(slice(size) for size in cut.shape)] = torch.from_numpy(cut).to(entry.data)
