"""Kill a small training run many times and prove that it ends as the run that was not killed (Linux, no GPU needed).

    python recipes/benchmarks/kill_runs.py --kills 100 --out runs/kills

Two data-parallel ranks under torchrun train on the bundled cells, once undisturbed and once under fire: SIGKILL at
random moments, two in five while a checkpoint is written, to a random rank, to the launcher, or to all processes at
once. Exits with 1 if the two runs differ in anything computed: a line of metrics, the place of the next cell, a bit of
the newest checkpoint's parameters or optimizer; with 2 if the killed run ended by itself, hung, or left a process
behind. A kill costs a start, ten seconds or more; with `--fork` a second or two, as ranks are then forks of their
launcher, which has imported what they need.
"""

import argparse
import json
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from celltron.cells import convert
from celltron.core import InputError, run_command
from celltron.recipes.benchmarks.compare_runs import compare_runs, find_litter
from celltron.recipes.benchmarks.kills import (
    MOMENTS,
    VICTIMS,
    Story,
    Victim,
    plan_kills,
    run_under_fire,
    run_undisturbed,
    start_torchrun,
)

CELLS = Path(__file__).parents[1] / "data" / "pbmc_citeseq" / "pbmc_citeseq.h5ad"
WORLD_SIZE = 2
SAVE_EVERY = 10
KEEP = 3
# One kill in five is not of a rank.
KILLED: list[Victim] = ["rank", "rank", "rank", "rank", "launcher", "rank", "rank", "rank", "rank", "all"]
# Small, so that a step takes some 50 ms and a run of a hundred kills goes on for long enough; with dropout, whose
# generators a resumed run must find again.
CONFIG = {
    "device": "cpu",
    "data": {"max_length": 32},
    "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2, "max_positions": 32},
    "schedule": {"learning_rate": 3e-3, "warmup_steps": 20},
    "loop": {"global_batch_size": 8, "log_every": 1, "save_every": SAVE_EVERY, "keep_checkpoints": KEEP},
}


def tabulate(story: Story, undisturbed: Story) -> str:
    """Kills by moment and victim, restarts, time."""
    counts = Counter((kill.moment, kill.victim) for kill, *_ in story.kills)
    lines = ["kills   " + "".join(f"{victim:>10}" for victim in VICTIMS)]
    for moment in MOMENTS:
        lines.append(f"{moment:<8}" + "".join(f"{counts.get((moment, victim), 0):>10}" for victim in VICTIMS))
    lost = story.seconds - undisturbed.seconds
    return "\n".join(
        [
            *lines,
            f"{sum(cut for *_, cut in story.kills)} kills left a checkpoint half written; {story.num_launches - 1} "
            f"launchers restarted, {len(story.kills) - story.num_launches + 1} times the ranks alone",
            f"{story.seconds:,.0f} s, {undisturbed.seconds:,.0f} s undisturbed: "
            f"{lost / max(1, len(story.kills)):.1f} s lost a kill",
        ]
    )


def run(arguments: Sequence[str]) -> None:
    """Train twice, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="how many")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for both runs and their logs")
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims")
    parser.add_argument("--fork", action="store_true", help="fork the ranks from their launcher")
    options = parser.parse_args(arguments)
    out: Path = options.out
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} holds files already; choose a new folder for --out")
    convert([CELLS], out / "cells.store")
    (out / "config.yaml").write_text(json.dumps(CONFIG), encoding="utf-8")
    # A kill takes back half an interval of saves or more, so that the run outlives its kills.
    steps = SAVE_EVERY * (options.kills + 2)
    settings = ["--config", str(out / "config.yaml"), "--data", str(out / "cells.store"), f"--max-steps={steps}"]
    start = partial(start_torchrun, world_size=WORLD_SIZE, fork=options.fork)
    runs = [out / "undisturbed", out / "killed"]
    commands = [[*settings, "--out", str(run), "--resume", "auto"] for run in runs]
    begin = partial(start, commands[0], max_restarts=0, log=out / "undisturbed.log")
    undisturbed, pace = run_undisturbed(runs[0], begin, world_size=WORLD_SIZE)
    print(f"undisturbed: {undisturbed.seconds:,.0f} s; {pace}", flush=True)
    kills = plan_kills(
        options.kills, world_size=WORLD_SIZE, save_every=SAVE_EVERY, seed=options.seed, victims=KILLED
    )
    begin = partial(start, commands[1], max_restarts=options.kills, log=out / "killed.log")
    story = run_under_fire(runs[1], begin, kills, pace, world_size=WORLD_SIZE)
    print(tabulate(story, undisturbed), flush=True)
    problems = compare_runs(runs[1], runs[0]) + find_litter(runs[1], keep=KEEP)
    if problems:
        print("\n".join(problems), file=sys.stderr)
        raise SystemExit(1)
    print(f"{steps:,} steps after {len(story.kills)} kills: every number, every cell and every bit as without them")


if __name__ == "__main__":
    # Told to end, it ends its run first.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(run_command(run))
