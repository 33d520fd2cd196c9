"""`celltron launch`: a run under torchrun by NeMo-Run, on this machine or as a SLURM job."""

import argparse
import importlib
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from celltron.core import InputError, parse_arguments

SPARE_SECONDS = 20
"""What torchrun, once it is told to stop, leaves its processes besides the run's `loop.stop_seconds`."""
SLURM_SPARE_SECONDS = 60
"""What SLURM leaves torchrun besides, from telling a job's steps to stop to the job's time limit."""
DEFAULT_TIME = "24:00:00"
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)
# Set by what the flags' names say; None where they were not given.
_SLURM_ONLY = (
    "account",
    "partition",
    "time",
    "nodes",
    "gpus_per_node",
    "cpus_per_task",
    "requeues",
    "container_image",
    "container_mounts",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchPlan:
    """All that NeMo-Run is told."""

    name: str
    """Of the experiment and its task."""
    executor: str
    """Class of `nemo_run`."""
    settings: dict[str, Any]
    """Its arguments, besides launcher and packager."""
    script: str
    """What every process under torchrun runs, by bash."""

    def describe(self) -> str:
        """The plan as `--dry-run` prints it."""
        settings = [f"  {name} = {value!r}" for name, value in self.settings.items()]
        script = [f"  {line}" for line in self.script.splitlines()]
        return "\n".join(
            [f"NeMo-Run {self.executor} {self.name!r}", *settings, "every process under torchrun runs", *script]
        )


def add_verb(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "launch",
        help="start a run with NeMo-Run, here or on SLURM: celltron launch --executor slurm ... train --config FILE",
    )
    parser.add_argument("--executor", choices=["local", "slurm"], default="local", help="where the run goes")
    parser.add_argument("--name", default="celltron", help="of the experiment")
    parser.add_argument("--processes-per-node", type=_positive, default=1, help="one a GPU, or several on a CPU")
    parser.add_argument("--max-restarts", type=_count, default=3, help="times that torchrun restarts a run that failed")
    parser.add_argument("--dry-run", action="store_true", help="print what NeMo-Run would be told, and stop")
    slurm = parser.add_argument_group("on SLURM")
    slurm.add_argument("--account", help="who pays")
    slurm.add_argument("--partition", help="where to queue; the cluster's default otherwise")
    slurm.add_argument("--time", metavar="HH:MM:SS", help=f"time limit, as SLURM takes it; {DEFAULT_TIME} otherwise")
    slurm.add_argument("--nodes", type=_positive, help="machines; 1 otherwise")
    slurm.add_argument("--gpus-per-node", type=_count, help="0 for none; one a process otherwise")
    slurm.add_argument("--cpus-per-task", type=_positive, help="processors of a node; the cluster's default otherwise")
    slurm.add_argument("--requeues", type=_count, help="times that a job that ends early is queued again; 20 otherwise")
    slurm.add_argument("--container-image", help="image with celltron in it, for clusters with pyxis")
    slurm.add_argument("--container-mounts", metavar="A:B,C:D", help="folders it sees besides the current one")
    parser.add_argument("command", choices=["train"], help="the celltron command to run, followed by its arguments")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(verb=_launch)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 0")
    return int(text)


def _launch(options: argparse.Namespace) -> None:
    plan = make_plan(options)
    if options.dry_run:
        print(plan.describe())
    else:
        submit(plan)


def make_plan(options: argparse.Namespace) -> LaunchPlan:
    """Turn the command line into what NeMo-Run is told.

    Raises:
        InputError: the options do not fit together, or `celltron train` would refuse its arguments.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", options.name):
        raise InputError(f"--name is {options.name!r}, but must be of letters, digits, - and _")
    num_processes = (options.nodes or 1) * options.processes_per_node
    arguments, stop_seconds = check_train_arguments(options.arguments, num_processes)
    saving_seconds = math.ceil(stop_seconds) + SPARE_SECONDS
    is_slurm = options.executor == "slurm"
    in_container = options.container_image is not None
    python = "python" if in_container else sys.executable
    return LaunchPlan(
        name=options.name,
        executor="SlurmExecutor" if is_slurm else "LocalExecutor",
        settings=(_slurm_settings if is_slurm else _local_settings)(options, saving_seconds),
        # NeMo-Run starts it elsewhere; `exec` makes torchrun's signals reach celltron itself.
        script=f"cd {shlex.quote(str(Path.cwd()))} || exit\n"
        + f"exec {shlex.join([python, '-m', 'celltron.cli.main', options.command, *arguments])}\n",
    )


def check_train_arguments(arguments: Sequence[str], num_processes: int) -> tuple[list[str], float]:
    """Read the arguments as `celltron train` will, before a job waits for hours to be refused.

    Returns:
        The arguments with `--resume auto`, by which a run that is started anew continues; the run's
        `loop.stop_seconds`.

    Raises:
        InputError: `celltron train` would refuse them, or a restart could not continue.
    """
    from celltron.recipes.geneformer_pretrain import FLAGS, Config

    config = parse_arguments(Config, arguments, flags=FLAGS).config
    config.loop.check_batches(config.parallel.data(num_processes))
    if config.resume not in ("", "auto"):
        raise InputError(
            f"resume is {config.resume!r}, but a run that celltron launch restarts can only continue with auto; "
            "leave it out, or use celltron train"
        )
    return [*arguments, *([] if config.resume else ["--resume", "auto"])], config.loop.stop_seconds


def _torchrun_environment(options: argparse.Namespace, saving_seconds: int) -> dict[str, str]:
    """What torchrun reads in place of flags that NeMo-Run does not know."""
    return {
        "PET_MAX_RESTARTS": str(options.max_restarts),
        "PET_SHUTDOWN_TIMEOUT": str(saving_seconds),
        "LOGLEVEL": "WARNING",
    }


def _local_settings(options: argparse.Namespace, saving_seconds: int) -> dict[str, Any]:
    for name in _SLURM_ONLY:
        if getattr(options, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} is given, but the executor is local; give --executor slurm")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {
        "ntasks_per_node": options.processes_per_node,
        "env_vars": _torchrun_environment(options, saving_seconds) | {"PATH": path},
    }


def _slurm_settings(options: argparse.Namespace, saving_seconds: int) -> dict[str, Any]:
    if not options.account:
        raise InputError("--executor slurm needs --account; give the one that pays for the job")
    if options.container_mounts and not options.container_image:
        raise InputError("--container-mounts is given, but no --container-image; give both or neither")
    time = DEFAULT_TIME if options.time is None else options.time
    notice_seconds = saving_seconds + SLURM_SPARE_SECONDS
    if read_time_limit(time) <= notice_seconds:
        raise InputError(
            f"--time is {time!r}, but the run is told to stop {notice_seconds} s before that; give more time, or lower "
            "loop.stop_seconds"
        )
    settings: dict[str, Any] = {
        "account": options.account,
        "time": time,
        "nodes": options.nodes or 1,
        "ntasks_per_node": options.processes_per_node,
        # To the steps, not to the batch script: that queues the job again when a step ends badly.
        "signal": f"TERM@{notice_seconds}",
        "retries": 20 if options.requeues is None else options.requeues,
        "env_vars": _torchrun_environment(options, saving_seconds),
    }
    gpus_per_node = options.processes_per_node if options.gpus_per_node is None else options.gpus_per_node
    if gpus_per_node:
        settings["gpus_per_node"] = gpus_per_node
    if options.partition:
        settings["partition"] = options.partition
    if options.cpus_per_task:
        settings["cpus_per_task"] = options.cpus_per_task
        settings["srun_args"] = [f"--cpus-per-task={options.cpus_per_task}"]  # srun does not take sbatch's over
    if options.container_image:
        mounts = options.container_mounts.split(",") if options.container_mounts else []
        settings["container_image"] = options.container_image
        settings["container_mounts"] = [f"{Path.cwd()}:{Path.cwd()}", *mounts]
    else:
        # bash puts the rest of the node's own path in.
        settings["env_vars"]["PATH"] = f"{shlex.quote(str(Path(sys.executable).parent))}:$PATH"
    return settings


def read_time_limit(text: str) -> int:
    """Read a time limit as SLURM does, in seconds.

    Source: `--time` in the manual of sbatch.

    >>> [read_time_limit(text) for text in ("90", "90:30", "1:30:30", "1-6", "1-6:30", "1-6:30:15")]
    [5400, 5430, 5430, 108000, 109800, 109815]

    Raises:
        InputError: it has none of SLURM's forms.
    """
    found = _TIME.fullmatch(text)
    if found is None:
        raise InputError(
            f"--time is {text!r}, but SLURM takes minutes, minutes:seconds, hours:minutes:seconds, days-hours, "
            "days-hours:minutes or days-hours:minutes:seconds; write one of these"
        )
    days, *rest = found.groups()
    numbers = [int(number) for number in rest if number is not None]
    # Hours come first only after days, or where there are three numbers.
    units = (3600, 60, 1) if days or len(numbers) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(unit * number for unit, number in zip(units, numbers, strict=False))


def submit(plan: LaunchPlan) -> None:
    """Hand a plan to NeMo-Run; returns once a local run has ended, or a job is in the queue.

    Raises:
        InputError: NeMo-Run is not installed, SLURM does not take the job, or a local run failed.
        SystemExit: after SIGTERM or SIGINT, once a local run has saved its last step and ended.
    """
    try:
        nemo_run = importlib.import_module("nemo_run")
        invoke = importlib.import_module("invoke")  # by which NeMo-Run calls sbatch
    except ImportError as error:
        raise InputError(
            f"celltron launch needs NeMo-Run, which cannot be imported ({error}); install celltron[launch], or print "
            "what it would be told with --dry-run"
        ) from None
    executor = getattr(nemo_run, plan.executor)(
        launcher=nemo_run.Torchrun(), packager=nemo_run.Packager(), **plan.settings
    )
    is_local = plan.executor == "LocalExecutor"
    try:
        with _handing_on_signals() as received, nemo_run.Experiment(plan.name) as experiment:
            experiment.add(nemo_run.Script(inline=plan.script), executor=executor, name=plan.name, tail_logs=is_local)
            experiment.run(detach=not is_local, tail_logs=is_local)
    except invoke.UnexpectedExit as error:
        raise InputError(
            f"SLURM does not take the job ({' '.join(error.result.stderr.split())}); launch it on a machine that has "
            "sbatch, with an account and a partition that it knows"
        ) from None
    (job,) = experiment.jobs
    if is_local and job.state.name != "SUCCEEDED":
        if received:
            raise SystemExit(128 + received[0])
        raise InputError(f"the run ended as {job.state.name}; its messages are above, and below {job.executor.job_dir}")


@contextmanager
def _handing_on_signals() -> Iterator[list[int]]:
    """Hand SIGTERM and SIGINT on to torchrun, which NeMo-Run would leave running, out of a terminal's reach."""
    received: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        # NeMo-Run starts torchrun in a session of its own.
        started = [child for child in psutil.Process().children() if os.getsid(child.pid) == child.pid]
        if not started:
            raise SystemExit(128 + number)
        for child in started:
            child.terminate()

    previous = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
