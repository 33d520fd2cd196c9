"""Where the processes of one start of a run leave each other their addresses, apart from those of earlier starts.

Torchrun keeps one store for all its restarts (seen with PyTorch 2.13), so that a process would find the addresses of
dead ones in it, and be refused there or wait for ever. Nor does torchrun give all its machines the same number of the
start: each counts the restarts that it asked for.
"""

import secrets
import time

from torch.distributed.distributed_c10d import PrefixStore, Store

from celltron.core import InputError

_POLL_SECONDS = 0.05


def open_fresh_part(store: Store, rank: int, world_size: int, timeout_seconds: float) -> Store:
    """A part of a store to which only processes of this start write; every process calls this.

    A process says hello with a word never said before. The main one answers all hellos, those of the dead too, with the
    name of the part, until every process has put its mark there.

    Raises:
        InputError: not all processes came in time.
    """
    word = secrets.token_hex(16)
    if rank > 0:
        store.set(f"hello/{rank}", word)
        part = PrefixStore(store.get(f"part/{word}").decode(), store)
        part.set(f"here/{rank}", "")
        return part
    part = PrefixStore(word, store)
    missing = set(range(1, world_size))
    end = time.monotonic() + timeout_seconds
    while missing:
        if time.monotonic() > end:
            raise InputError(
                f"process {min(missing)} of this run did not come to meet the others within {timeout_seconds:.0f} s; "
                "its own message says why, or it was never started"
            )
        for other in missing:
            if store.check([f"hello/{other}"]):
                store.set(f"part/{store.get(f'hello/{other}').decode()}", word)
        missing = {other for other in missing if not part.check([f"here/{other}"])}
        time.sleep(_POLL_SECONDS if missing else 0.0)
    return part
