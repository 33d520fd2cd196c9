"""Models: one folder each, the shared layers in `layers`."""

import warnings

# megatron-core says at import, several times over, that optional GPU libraries are missing, and that it deprecates a
# default of its own.
warnings.filterwarnings(
    "ignore", message=".*(Apex|Transformer Engine|full scope is deprecated).*", module=r"megatron\.core"
)
