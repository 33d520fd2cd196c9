"""Layers that celltron's models share, built from megatron-core's parts."""
