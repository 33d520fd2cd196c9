"""Who this process is among the processes of the run: the one place that reads a launcher's environment."""

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch.distributed.rendezvous import rendezvous

from celltron.core import InputError
from celltron.train.meeting import open_fresh_part

RESTART_NAMES = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
"""Where launchers say how often they have started a run again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """This process's place in the run, as `torchrun` tells it; alone without a launcher."""

    rank: int = 0
    """Number of this process among all."""
    world_size: int = 1
    """Number of processes."""
    local_rank: int = 0
    """Number of this process on its machine: its GPU."""
    is_restart: bool = False
    """Whether torchrun started it again after a loss, or SLURM after it was queued anew."""

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for the run: prints, writes metrics and manifests."""
        return self.rank == 0


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read RANK, WORLD_SIZE and LOCAL_RANK, and how often the run was started again.

    Raises:
        InputError: some but not all are set, one is no number, or the rank is none of the world's.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = [name for name in names if name in environment]
    is_restart = any(environment.get(name, "0") != "0" for name in RESTART_NAMES)
    if not found:
        return Launch(is_restart=is_restart)
    if len(found) < len(names):
        missing = ", ".join(name for name in names if name not in environment)
        raise InputError(
            f"the environment sets {', '.join(found)} but not {missing}; start several processes with torchrun, "
            "which sets all of them, or unset them to run alone"
        )
    try:
        rank, world_size, local_rank = (int(environment[name]) for name in names)
    except ValueError:
        raise InputError(
            f"the environment's {', '.join(names)} must be whole numbers, but are "
            f"{', '.join(repr(environment[name]) for name in names)}; start the processes with torchrun"
        ) from None
    if not 0 <= rank < world_size or local_rank < 0:
        raise InputError(
            f"the environment sets RANK {rank}, WORLD_SIZE {world_size}, LOCAL_RANK {local_rank}, but ranks are "
            "numbered from 0 to WORLD_SIZE - 1; start the processes with torchrun"
        )
    return Launch(rank=rank, world_size=world_size, local_rank=local_rank, is_restart=is_restart)


def choose_device(device: str, launch: Launch) -> torch.device:
    """Turn `auto`, `cpu` or `cuda` into this process's device.

    Raises:
        InputError: `cuda` is asked for where PyTorch sees no GPU, or fewer than processes on this machine.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(
            f"device is {device}, but PyTorch {torch.__version__} sees no GPU; use device=cpu, or install a CUDA build"
        )
    if launch.local_rank >= torch.cuda.device_count():
        raise InputError(
            f"process {launch.local_rank} of this machine has no GPU, PyTorch sees {torch.cuda.device_count()}; "
            "start no more processes a machine than it has GPUs"
        )
    return torch.device("cuda", launch.local_rank)


# Others wait for the main process as long as it takes to convert a corpus; a process that dies still ends the wait.
PATIENCE = timedelta(days=7)
# In finding each other they are not as patient: a launcher may be gone.
MEETING_TIMEOUT = timedelta(minutes=30)
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl
_patient_groups: list[torch.distributed.ProcessGroup] = []


def patient_group() -> torch.distributed.ProcessGroup | None:
    """The gloo group of all processes that waits long; None is the default group, which does so on a CPU."""
    return _patient_groups[0] if _patient_groups else None


def start_process_group(launch: Launch, device: torch.device) -> None:
    """Join the run's processes (gloo on a CPU, nccl on CUDA) and make Megatron-core fit the device.

    Raises:
        InputError: there are several processes, but not the address where they meet.
    """
    end_with_launcher()
    if device.type == "cpu":
        from celltron.train import cpu

        cpu.install()
        backend = "gloo"
    else:
        torch.cuda.set_device(device)
        backend = "nccl"
    if torch.distributed.is_initialized():
        return
    if launch.world_size == 1:
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    else:
        _join(backend, launch)
    if backend == "nccl":
        _patient_groups[:] = [torch.distributed.new_group(backend="gloo", timeout=PATIENCE)]


def end_with_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Have Linux kill this process when the torchrun that started it dies.

    Torchrun's processes outlive it otherwise: they would go on to write into the folder of a run that is started anew.
    """
    if "TORCHELASTIC_RUN_ID" in environment and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL.value)


def _join(backend: str, launch: Launch) -> None:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            f"the environment sets WORLD_SIZE {launch.world_size} but not {', '.join(missing)}; start the processes "
            "with torchrun, which sets all of them"
        )
    store, rank, world_size = next(rendezvous("env://", timeout=MEETING_TIMEOUT))
    store = open_fresh_part(store, rank, world_size, MEETING_TIMEOUT.total_seconds())
    timeout = PATIENCE if backend == "gloo" else None
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
