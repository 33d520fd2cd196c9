"""Where a process's parameters lie in the whole model, as Megatron describes it for checkpoints."""

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.module import MegatronModule

# Layers are stored one by one, so that any layout reads them.
MODEL_METADATA = {"non_homogeneous_layers": True}


def shard_parameters(module: MegatronModule) -> dict[str, ShardedTensor]:
    """The parameters by name.

    Without Megatron's `_extra_state` objects, which are empty for these layers and would be read back as pickle.
    """
    state = module.sharded_state_dict(metadata=dict(MODEL_METADATA))
    return {name: entry for name, entry in state.items() if isinstance(entry, ShardedTensor)}
