"""Kill a training run again and again, at chosen moments, under launchers that start it anew (Linux only)."""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from celltron.core import InputError
from celltron.train.metrics import METRICS_NAME

POLL_SECONDS = 0.002
GIVE_UP_SECONDS = 600.0
"""Longest wait for the next moment to kill at, and for the end of a run."""
Moment = Literal["start", "step", "save"]
Victim = Literal["rank", "launcher", "all"]
MOMENTS: tuple[Moment, ...] = ("start", "step", "save")
VICTIMS: tuple[Victim, ...] = ("rank", "launcher", "all")


@dataclass(frozen=True, kw_only=True, slots=True)
class Kill:
    """A SIGKILL to one process of a run, or to all of them at once."""

    moment: Moment
    """`start`: after the ranks were started; `step`: after so many steps; `save`: after a checkpoint was begun."""
    after_steps: int
    """For `step`: steps that these ranks have logged by then."""
    fraction: float
    """Share of a start, a step or a save that passes until the blow."""
    victim: Victim
    """A rank; the launcher, whose ranks must not go on without it; or all of them."""
    rank: int
    """Which rank."""


def plan_kills(num_kills: int, *, world_size: int, save_every: int, seed: int, victims: Sequence[Victim]) -> list[Kill]:
    """Draw kills: two in five while a checkpoint is written, one in five in a start; victims in equal shares."""
    generator = random.Random(seed)
    moments: list[Moment] = ["save", "step", "save", "step", "start"]
    drawn_moments = [moments[number % len(moments)] for number in range(num_kills)]
    drawn_victims = [victims[number % len(victims)] for number in range(num_kills)]
    generator.shuffle(drawn_moments)
    generator.shuffle(drawn_victims)
    return [
        Kill(
            moment=moment,
            after_steps=generator.randint(1, 2 * save_every),
            # A checkpoint is not done with its renaming: `latest` is written, and old ones are removed.
            fraction=generator.uniform(0.0, 1.5 if moment == "save" else 1.0),
            victim=victim,
            rank=generator.randrange(world_size),
        )
        for moment, victim in zip(drawn_moments, drawn_victims, strict=True)
    ]


class Launcher(Protocol):
    """A process whose children are the ranks; it starts them anew when one dies."""

    @property
    def pid(self) -> int:
        """Its number."""

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""

    def wait(self, timeout: float) -> int:
        """Its exit code, after so many seconds at most."""


def start_torchrun(
    arguments: Sequence[str], *, world_size: int, max_restarts: int, log: Path, fork: bool = False
) -> Launcher:
    """Start `celltron train` under torchrun, which says all it has to say at the end of `log`.

    Args:
        arguments: Of the run.
        world_size: Its ranks.
        max_restarts: How often they may be started anew.
        log: A file, which is added to.
        fork: Whether the ranks are forks of the launcher, see fork_ranks.py; a start then takes a second or two.
    """
    if fork:
        launcher = [str(Path(__file__).with_name("fork_ranks.py")), str(world_size), str(max_restarts)]
    else:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
        launcher += [f"--max-restarts={max_restarts}", "--monitor-interval=0.05", "-m", "celltron.cli.main", "train"]
    # Nothing is compiled in such a run, and a start without what compiles takes a quarter less.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, *launcher, *arguments],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How long things take on this machine, which places the kills."""

    start_seconds: float
    """From the start of the ranks to their first line of metrics."""
    step_seconds: float
    """Of one step, saves included."""
    save_seconds: float
    """From the first sign of a checkpoint's folder to its renaming."""


@dataclass(kw_only=True, slots=True)
class Story:
    """What happened."""

    seconds: float = 0.0
    """From the first start to the end."""
    kills: list[tuple[Kill, int, bool]] = field(default_factory=list)
    """Every kill, the last step that was logged then, and whether it left a checkpoint half written."""
    num_launches: int = 0
    """Launchers started; a launcher starts its ranks once more for every kill of one of them."""


def run_undisturbed(run: Path, start: Callable[[], Launcher], *, world_size: int) -> tuple[Story, Pace]:
    """Have a run go to its end and watch how long it takes.

    Args:
        run: The run's folder.
        start: Starts its launcher.
        world_size: Its ranks.

    Raises:
        InputError: the run failed, or made no checkpoint on its way.
    """
    begin = time.monotonic()
    launcher = start()
    watch = Watch(run, launcher, world_size)
    first = last = 0.0
    num_steps = 0
    save_began: dict[int, float] = {}
    save_seconds: list[float] = []
    try:
        watch.wait_for_ranks(unlike=[])
        started = time.monotonic()
        while launcher.poll() is None:
            now, saves = time.monotonic(), watch.saves_in_progress()
            save_seconds += [now - save_began.pop(save) for save in list(save_began) if save not in saves]
            save_began |= {save: now for save in saves if save not in save_began}
            if (logged := watch.num_steps()) > num_steps:
                num_steps, first, last = logged, first or now, now
            time.sleep(POLL_SECONDS)
    finally:
        kill_processes(family_of(launcher.pid))
    if launcher.poll() or not save_seconds or num_steps < 2:
        raise InputError(f"the undisturbed run {run} ended with exit code {launcher.poll()}; its log says why")
    pace = Pace(
        start_seconds=first - started,
        step_seconds=(last - first) / (num_steps - 1),
        save_seconds=statistics.median(save_seconds),
    )
    return Story(seconds=time.monotonic() - begin, num_launches=1), pace


def run_under_fire(
    run: Path, start: Callable[[], Launcher], kills: Sequence[Kill], pace: Pace, *, world_size: int
) -> Story:
    """Have a run go to its end with a kill at each of the moments, in their order.

    Args:
        run: The run's folder.
        start: Starts its launcher, at first and whenever it was killed.
        kills: What to kill when.
        pace: As an undisturbed run showed it.
        world_size: Its ranks.

    Raises:
        InputError: the run failed by itself, did not go on, was done before all kills were, or left processes behind.
    """
    story, begin, remaining = Story(), time.monotonic(), list(kills)
    code: int | None = None
    while code is None:
        launcher = start()
        story.num_launches += 1
        try:
            code = _see_through(run, launcher, remaining, pace, story, world_size)
        finally:
            kill_processes(family_of(launcher.pid))
    story.seconds = time.monotonic() - begin
    if code:
        raise InputError(f"the run {run} failed by itself with exit code {code}; its log says why")
    if remaining:
        raise InputError(f"{run} was done before {len(remaining)} of {len(kills)} kills; train for more steps")
    return story


def _see_through(
    run: Path, launcher: Launcher, remaining: list[Kill], pace: Pace, story: Story, world_size: int
) -> int | None:
    """Kill at every moment until the launcher ends; its exit code, None where a kill ended it."""
    ranks: list[int] = []
    seen: set[int] = set()
    is_killed = False
    watch = Watch(run, launcher, world_size)
    while True:
        ranks = watch.wait_for_ranks(unlike=ranks)
        # A launcher that does not restart its ranks, or was killed itself, ends without new ones.
        is_killed = is_killed and not ranks
        if not ranks or not remaining or not watch.wait_for_moment(remaining[0], pace):
            break
        kill, family = remaining.pop(0), family_of(launcher.pid)
        seen |= family
        before, watch = watch, Watch(run, launcher, world_size)  # new ranks may be faster than what follows
        kill_processes({"rank": {ranks[kill.rank]}, "launcher": {launcher.pid}, "all": family}[kill.victim])
        story.kills.append((kill, before.last_step(), bool(before.saves_in_progress())))
        is_killed = True
    code = launcher.wait(GIVE_UP_SECONDS)
    if left := wait_until_gone(seen):
        raise InputError(f"processes {sorted(left)} outlived their launcher")
    return None if is_killed and code else code


class Watch:
    """What can be seen of a run from outside, from one start of its ranks to the next."""

    def __init__(self, run: Path, launcher: Launcher, world_size: int) -> None:
        self.run = run
        self.launcher = launcher
        self.world_size = world_size
        self._old_saves = self._half_written()
        self._old_metrics = self._metrics_file()
        self._lines_before: int | None = None

    def wait_for_ranks(self, *, unlike: Sequence[int]) -> list[int]:
        """Wait until the launcher has started all ranks anew, and give their processes; none when it ends before."""
        ranks: list[int] = []

        def are_there() -> bool:
            ranks[:] = [child for child in _children_of(self.launcher.pid) if child not in unlike]
            return len(ranks) == self.world_size

        return ranks if self._wait_until(are_there, "the ranks to be started") else []

    def wait_for_moment(self, kill: Kill, pace: Pace) -> bool:
        """Wait for the moment of a kill; False when the launcher ends before."""
        seconds = {"start": pace.start_seconds, "step": pace.step_seconds, "save": pace.save_seconds}[kill.moment]
        end = time.monotonic() + kill.fraction * seconds
        if kill.moment == "start":
            # A start that is faster than it was must not let the run get away.
            return self._wait_until(lambda: time.monotonic() >= end or self.num_steps() > 0, "a start")
        if kill.moment == "step":
            is_near = self._wait_until(lambda: self.num_steps() >= kill.after_steps, f"{kill.after_steps} steps")
        else:
            is_near = self._wait_until(lambda: bool(self.saves_in_progress()), "a checkpoint to be begun")
        time.sleep(kill.fraction * seconds)
        return is_near and self.launcher.poll() is None

    def _wait_until(self, is_so: Callable[[], bool], what: str) -> bool:
        end = time.monotonic() + GIVE_UP_SECONDS
        while not is_so():
            if self.launcher.poll() is not None:
                return False
            if time.monotonic() > end:
                raise InputError(f"waited {GIVE_UP_SECONDS:.0f} s for {what} in {self.run}; the run does not go on")
            time.sleep(POLL_SECONDS)
        return True

    def num_steps(self) -> int:
        """Lines of metrics of these ranks; a start puts a new file in the old one's place before it appends."""
        if self._metrics_file() == self._old_metrics:
            return 0
        num_lines = (self.run / METRICS_NAME).read_bytes().count(b"\n")
        if self._lines_before is None:
            self._lines_before = 0 if self._old_metrics is None else num_lines
        return num_lines - self._lines_before

    def last_step(self) -> int:
        """The last step that was logged, 0 before the first."""
        metrics = self.run / METRICS_NAME
        lines = metrics.read_bytes().split(b"\n") if metrics.exists() else []
        return int(json.loads(lines[-2])["step"]) if len(lines) > 1 else 0

    def saves_in_progress(self) -> set[int]:
        """Folders of half-written checkpoints (their inodes) that these ranks began."""
        return self._half_written() - self._old_saves

    def _half_written(self) -> set[int]:
        folder = self.run / "checkpoints"
        if not folder.exists():
            return set()
        return {entry.inode() for entry in os.scandir(folder) if entry.name.endswith(".partial")}

    def _metrics_file(self) -> int | None:
        try:
            return (self.run / METRICS_NAME).stat().st_ino
        except FileNotFoundError:
            return None


def _children_of(pid: int) -> list[int]:
    """Children of a process in the order of their birth; none when it is gone."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def family_of(pid: int) -> set[int]:
    """A process, its children, theirs, and so on; those of its main thread, as a launcher has them."""
    return {pid}.union(*(family_of(child) for child in _children_of(pid))) if _is_alive(pid) else set()


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill_processes(pids: set[int]) -> None:
    """SIGKILL to each that is there still."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_until_gone(pids: set[int], seconds: float = 20.0) -> set[int]:
    """Those of the processes that are still there when time is up."""
    end = time.monotonic() + seconds
    while (left := {pid for pid in pids if _is_alive(pid)}) and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
    return left
