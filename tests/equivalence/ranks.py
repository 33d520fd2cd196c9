"""Run a program on several ranks of this machine: `python ranks.py WORLD_SIZE RENDEZVOUS_FILE PROGRAM [ARGUMENT ...]`.

As torchrun does it, but the ranks are forked from one process that has imported megatron-core already (ten seconds a
process otherwise), and meet in a file instead of at a port. Exits with 0 if every rank did; when one fails, the others,
which would wait for it for ever, are killed.
"""

import multiprocessing
import os
import runpy
import signal
import sys
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import torch

import celltron.models.geneformer  # noqa: F401 - imported before the ranks are forked
import celltron.train.loop  # noqa: F401

GIVE_UP_AFTER = timedelta(seconds=120)


def run_rank(rank: int, world_size: int, rendezvous: str, program: str, arguments: list[str]) -> None:
    """Be one rank: what torchrun sets in the environment, the process group, then the program as `__main__`."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size, timeout=GIVE_UP_AFTER
    )
    # A program that leaves this group at once would else do so while another rank still connects to it.
    torch.distributed.barrier()
    sys.argv = [program, *arguments]
    sys.path[0] = os.path.dirname(os.path.abspath(program))
    runpy.run_path(program, run_name="__main__")


def wait_for_all(ranks: list[BaseProcess]) -> int:
    """Exit code of the first rank that fails, 0 if none does."""
    waiting = {process.sentinel: process for process in ranks}
    failure = 0
    while waiting:
        for sentinel in wait(list(waiting)):
            process = waiting.pop(sentinel)
            process.join()
            if process.exitcode and not failure:
                failure = process.exitcode
                print(f"rank {ranks.index(process)} ended with {failure}", file=sys.stderr, flush=True)
                for other in waiting.values():
                    other.kill()
    return failure


def main() -> int:
    """Fork the ranks; SIGTERM and SIGINT to this process's group are theirs to answer."""
    world_size, rendezvous, program, *arguments = sys.argv[1:]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    context = multiprocessing.get_context("fork")
    ranks: list[BaseProcess] = [
        context.Process(target=run_rank, args=(rank, int(world_size), rendezvous, program, arguments))
        for rank in range(int(world_size))
    ]
    for process in ranks:
        process.start()
    return wait_for_all(ranks)


if __name__ == "__main__":
    sys.exit(main())
