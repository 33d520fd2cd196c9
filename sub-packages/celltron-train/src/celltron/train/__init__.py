"""Training on megatron-core: layout, loop, optimizer, schedule, checkpoints, metrics. Knows a callable, not a model."""

import warnings

# megatron-core says at import, several times over, that optional GPU libraries are missing.
warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*", module=r"megatron\.core")
# It reads checkpoints through a call that PyTorch has renamed.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"megatron\.core")
