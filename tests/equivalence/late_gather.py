"""Parameters that arrive as late as may be: whatever does not wait for its own computes with those of a step before."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Buckets

from celltron.train import optimizer

gather = Buckets.start_param_sync


@contextmanager
def gathered_late() -> Iterator[None]:
    """Have Megatron gather every parameter by itself, and where it overlaps that with computing, when it waits for it.

    A network takes as long as it likes; this makes what depends on that fail every time.
    """
    config = partial(optimizer.DistributedDataParallelConfig, bucket_size=1)
    with patch.object(optimizer, "DistributedDataParallelConfig", config):
        with patch.object(Buckets, "start_param_sync", start_late):
            yield


def start_late(buckets: Any, force_sync: bool = False) -> None:
    if force_sync:
        gather(buckets, force_sync=True)
    else:
        buckets.param_gather_handle = SimpleNamespace(wait=partial(finish, buckets))
        buckets.param_gather_dispatched = True


def finish(buckets: Any) -> None:
    buckets.param_gather_handle = None
    gather(buckets, force_sync=True)
