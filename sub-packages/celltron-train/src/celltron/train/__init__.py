"""Training on megatron-core: layout, loop, optimizer, schedule, checkpoints, metrics. Knows a callable, not a model."""
