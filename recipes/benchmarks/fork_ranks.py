"""torchrun whose ranks are forks of it: it has imported what they need, so that they start at once (Linux, no GPU).

`python fork_ranks.py RANKS MAX_RESTARTS ARGUMENT ...` trains with those arguments. Launcher, meeting and restarts are
torchrun's own; only the start of a rank is not the start of a new Python.
"""

import sys
import uuid
from collections.abc import Sequence

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from celltron.core import run_command
from celltron.recipes import geneformer_pretrain


def main(arguments: Sequence[str]) -> None:
    """Run the ranks to their end."""
    num_ranks, max_restarts, *words = arguments
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(num_ranks),
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=int(max_restarts),
        monitor_interval=0.05,
        start_method="fork",
    )
    elastic_launch(config, run_rank)(*words)


def run_rank(*words: str) -> None:
    """Train as this rank, and end with its exit code."""
    if code := run_command(geneformer_pretrain.main, words):
        sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
