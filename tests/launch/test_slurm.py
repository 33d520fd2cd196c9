"""The batch scripts, run with programs in SLURM's place: what they start, whom they signal, what is queued again."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from celltron.train.launch import Launch, read_launch
from celltron.train.loop_config import LoopConfig

SLURM = Path(__file__).parents[2] / "scripts" / "slurm"
SCRIPTS = {path.stem: path for path in sorted(SLURM.glob("*.sbatch"))}
TORCHRUN = ["many_nodes_torchrun", "one_node"]

# From the manuals of sbatch and srun.
SBATCH_OPTIONS = {
    "account", "partition", "time", "nodes", "gpus-per-node", "ntasks-per-node", "cpus-per-task", "job-name", "output",
    "open-mode", "requeue", "signal",
}  # fmt: skip
SRUN_OPTIONS = {"cpus-per-task", "gpu-bind", "kill-on-bad-exit", "output", "open-mode"}
SLURM_VARIABLES = {  # that SLURM sets in a batch script, or in a task (the last three)
    "SLURM_CPUS_PER_TASK", "SLURM_GPUS_ON_NODE", "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_NNODES",
    "SLURM_RESTART_COUNT", "SLURM_SUBMIT_DIR", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_PROCID",
}  # fmt: skip

FAKES = {
    # Two tasks a node where every GPU has one, else one; it answers a SIGTERM as srun does.
    "srun": r"""
        printf '%s\0' "$@" >"$FAKE/srun"
        while [[ "$1" == --* ]]; do shift; done
        trap 'echo "srun was told to stop, and kills its tasks" >>"$FAKE/log"' TERM
        tasks=()
        for ((rank = 0; rank < FAKE_TASKS * SLURM_NNODES; rank++)); do
            SLURM_NTASKS=$((FAKE_TASKS * SLURM_NNODES)) SLURM_PROCID=$rank SLURM_NODEID=$((rank / FAKE_TASKS)) \
                SLURM_LOCALID=$((rank % FAKE_TASKS)) "$@" &
            tasks+=($!)
            echo $! >>"$FAKE/tasks"
        done
        worst=0
        for task in "${tasks[@]}"; do
            wait "$task" || { status=$?; worst=$((status > worst ? status : worst)); }
        done
        exit "$worst"
    """,
    "scancel": r"""
        echo "scancel $*" >>"$FAKE/log"
        kill -TERM $(cat "$FAKE/tasks")
    """,
    "scontrol": r"""
        if [[ "$*" == "show hostnames $SLURM_JOB_NODELIST" ]]; then printf 'node7\nnode8\n'; exit; fi
        echo "scontrol $*" >>"$FAKE/log"
    """,
    "squeue": r"""
        [[ "$*" == "--noheader --jobs=4711 --format=%T" ]] || echo "squeue $*" >>"$FAKE/log"
        cat "$FAKE/state"
    """,
    # In place of torchrun and celltron.
    "trainer": r"""
        printf '%s\0' "$(basename "$0")" "$@" >"$FAKE/command.$SLURM_PROCID"
        for name in RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT OMP_NUM_THREADS; do
            if [[ -v $name ]]; then printf '%s\0' "$name=${!name}" >>"$FAKE/environment.$SLURM_PROCID"; fi
        done
        code=
        trap 'echo TERM >>"$FAKE/signals.$SLURM_PROCID"; code=$FAKE_CODE' TERM
        touch "$FAKE/ready.$SLURM_PROCID"
        if [[ "$FAKE_RUN" == ends ]]; then exit "$FAKE_CODE"; fi
        until [[ "$FAKE_RUN" == stops && -n "$code" ]]; do sleep 0.1; done
        exit "$code"
    """,
}


@dataclass
class Scenario:
    """One run of a batch script, and what came of it."""

    script: str
    run: str = "stops"
    """`ends` by itself, `stops` at a SIGTERM, or is `deaf`."""
    code: int = 143
    """The trainer's exit status."""
    signals: tuple[signal.Signals, ...] = ()
    """Sent to the batch script once its tasks run."""
    to_tasks: bool = False
    """Whether SLURM signals the tasks itself."""
    state: str = "RUNNING"
    """Of the job, as squeue tells it once there is a signal."""
    environment: dict[str, str] = field(default_factory=dict)
    ended: int = -1
    log: list[str] = field(default_factory=list)
    stderr: str = ""
    folder: Path = Path()

    def num_terms(self) -> list[int]:
        """SIGTERMs that every task got."""
        tasks = sorted(self.folder.glob("ready.*"))
        files = [path.with_name(path.name.replace("ready", "signals")) for path in tasks]
        return [len(file.read_text().splitlines()) if file.exists() else 0 for file in files]

    def words(self, name: str) -> list[str]:
        """A recorded command line."""
        return (self.folder / name).read_text().split("\0")[:-1]

    def task_environment(self, rank: int) -> dict[str, str]:
        return dict(word.split("=", 1) for word in self.words(f"environment.{rank}"))


ENVIRONMENT = {
    "SLURM_CPUS_PER_TASK": "6",
    "SLURM_GPUS_ON_NODE": "2",
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "node[7-8]",
    "DATA": "my cells.store",
    "OUT": "runs/a run",
}
USR1, TERM = signal.SIGUSR1, signal.SIGTERM
SCENARIOS = {
    **{f"{name} ends": Scenario(name, run="ends", code=0) for name in SCRIPTS},
    **{f"{name} at its limit": Scenario(name, signals=(USR1,)) for name in SCRIPTS},
    "crash": Scenario("many_nodes_srun", run="ends", code=1),
    "torchrun at its limit": Scenario("one_node", signals=(USR1,), code=1),
    "done in time": Scenario("many_nodes_srun", signals=(USR1,), code=0),
    "told twice": Scenario("many_nodes_srun", signals=(USR1, USR1, TERM)),
    "term": Scenario("many_nodes_srun", signals=(TERM,)),
    "cancelled": Scenario("many_nodes_srun", signals=(TERM,), to_tasks=True, state="COMPLETING"),
    "tasks alone": Scenario("many_nodes_srun", to_tasks=True),
    "squeue fails": Scenario("many_nodes_srun", signals=(TERM,), state=""),
    "too slow": Scenario("many_nodes_srun", run="deaf", signals=(USR1,), environment={"STOP_SECONDS": "0"}),
    "too often": Scenario("many_nodes_srun", signals=(USR1,), environment={"SLURM_RESTART_COUNT": "100"}),
}


def play(scenario: Scenario, folder: Path) -> None:
    """Run the batch script of a scenario with programs in SLURM's place."""
    scenario.folder = folder
    bin_folder, checkout = folder / "bin", folder / "check out"
    bin_folder.mkdir(parents=True)
    for name, text in FAKES.items():
        (bin_folder / name).write_text("#!/bin/bash\n" + text)
        (bin_folder / name).chmod(0o755)
    for name in ("torchrun", "celltron"):
        (bin_folder / name).symlink_to("trainer")
    checkout.mkdir()
    (checkout / "scripts").symlink_to(SLURM.parent)
    (folder / "state").write_text("RUNNING\n")
    num_nodes = 1 if scenario.script == "one_node" else 2
    num_tasks = 1 if scenario.script in TORCHRUN else 2
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment |= ENVIRONMENT | {"SLURM_NNODES": str(num_nodes), "SLURM_SUBMIT_DIR": str(checkout)}
    environment |= {"FAKE": str(folder), "FAKE_TASKS": str(num_tasks), "FAKE_RUN": scenario.run}
    environment |= {"FAKE_CODE": str(scenario.code), "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    command = ["bash", str(SCRIPTS[scenario.script])]
    environment |= scenario.environment
    with (
        (folder / "stderr").open("w") as stderr,
        subprocess.Popen(command, env=environment, cwd=folder, stderr=stderr, process_group=0) as job,
    ):
        try:
            while len(list(folder.glob("ready.*"))) < num_nodes * num_tasks and job.poll() is None:
                time.sleep(0.02)
            (folder / "state").write_text(scenario.state)
            if scenario.to_tasks:
                for task in (folder / "tasks").read_text().split():
                    os.kill(int(task), TERM)
            for number in scenario.signals:
                job.send_signal(number)
                time.sleep(1.2 if len(scenario.signals) > 1 else 0)
            job.wait(30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)  # as requeueing does with what did not stop
    scenario.ended = job.returncode
    scenario.stderr = (folder / "stderr").read_text()
    log = folder / "log"
    scenario.log = log.read_text().splitlines() if log.exists() else []


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    """All scenarios, side by side: they do nothing but wait."""
    folders = [tmp_path_factory.mktemp("job") for _ in SCENARIOS]
    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        list(pool.map(play, SCENARIOS.values(), folders))
    return SCENARIOS


HANDED_ON, REQUEUED = "scancel --signal=TERM 4711", "scontrol requeue 4711"


def test_scripts_are_bash() -> None:
    assert set(SCRIPTS) == {"one_node", "many_nodes_torchrun", "many_nodes_srun"}
    for path in SLURM.iterdir():
        subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_options_and_variables_are_slurms(name: str) -> None:
    text = SCRIPTS[name].read_text() + (SLURM / "job.sh").read_text()
    head, _, body = SCRIPTS[name].read_text().partition("set -euo pipefail")
    assert "#SBATCH" not in body, "SLURM reads no options after the first command"
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", head, re.MULTILINE))
    assert len(options) == head.count("#SBATCH") and set(options) <= SBATCH_OPTIONS
    assert {"account", "partition", "time", "requeue"} <= set(options)
    assert options["open-mode"] == "append", "a job that is queued again must not overwrite its log"
    assert set(re.findall(r"SLURM_[A-Z_]+", text)) <= SLURM_VARIABLES
    # Each waits for the one before: torchrun for celltron, the script for torchrun, SLURM for the script.
    notice = re.fullmatch(r"B:USR1@(\d+)", options["signal"])
    stop = re.search(r"STOP_SECONDS:-(\d+)", text)
    assert notice and stop and int(stop[1]) < int(notice[1])
    shutdown = re.search(r"--shutdown-timeout=(\d+)", body)
    assert bool(shutdown) == (name in TORCHRUN)
    assert LoopConfig().stop_seconds < int((shutdown or stop)[1]) <= int(stop[1])


@pytest.mark.parametrize("name", SCRIPTS)
def test_default_config_is_there(name: str) -> None:
    found = re.search(r"CONFIG=\$\{CONFIG:-(\S+)\}", SCRIPTS[name].read_text())
    assert found and (SLURM.parents[1] / found[1]).is_file()


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_runs_a_command_that_celltron_understands(
    name: str, played: dict[str, Scenario], check_command: Callable[[list[str]], Any], root: Path
) -> None:
    run = played[f"{name} ends"]
    assert run.ended == 0 and run.log == [], run.stderr
    config = "recipes/configs/geneformer_106m.yaml"
    words = [str(root / word) if word == config else word for word in run.words("command.0")]
    parsed = check_command(words)
    assert parsed.resume == "auto"
    assert parsed.out == "runs/a run" and list(parsed.data.sources) == ["my cells.store"]
    options = list(takewhile(lambda word: word.startswith("--"), run.words("srun")))
    assert {option.removeprefix("--").partition("=")[0] for option in options} <= SRUN_OPTIONS
    assert "--output=runs/a run.logs/%j_%N.log" in options and "--cpus-per-task=6" in options
    assert (run.folder / "check out" / "runs" / "a run.logs").is_dir()
    assert not (run.folder / "check out" / "runs" / "a run").exists(), "celltron wants that folder new"


def test_torchrun_is_told_the_job(played: dict[str, Scenario]) -> None:
    words = played["many_nodes_torchrun ends"].words("command.0")
    assert words[:3] == ["torchrun", "--nnodes=2", "--nproc-per-node=2"]
    assert {"--rdzv-backend=c10d", "--rdzv-endpoint=node7:19711", "--rdzv-id=4711", "--max-restarts=3"} <= set(words)
    assert played["many_nodes_torchrun ends"].words("command.1") == words
    assert played["one_node ends"].words("command.0")[:3] == ["torchrun", "--standalone", "--nproc-per-node=2"]
    assert played["one_node ends"].task_environment(0) == {"OMP_NUM_THREADS": "3"}


def test_tasks_of_srun_are_ranks(played: dict[str, Scenario]) -> None:
    run = played["many_nodes_srun ends"]
    for rank in range(4):
        environment = run.task_environment(rank)
        assert read_launch(environment) == Launch(rank=rank, world_size=4, local_rank=rank % 2)
        assert environment["MASTER_ADDR"] == "node7" and environment["MASTER_PORT"] == "19711"
        assert environment["OMP_NUM_THREADS"] == "6"


@pytest.mark.parametrize("name", SCRIPTS)
def test_notice_stops_the_run_and_queues_it_again(name: str, played: dict[str, Scenario]) -> None:
    run = played[f"{name} at its limit"]
    assert run.log == [HANDED_ON, REQUEUED], run.stderr
    assert set(run.num_terms()) == {1} and run.ended == 143


def test_a_torchrun_that_was_stopped_is_queued_again(played: dict[str, Scenario]) -> None:
    run = played["torchrun at its limit"]
    assert run.log == [HANDED_ON, REQUEUED] and run.ended == 1


def test_a_crash_is_not_queued_again(played: dict[str, Scenario]) -> None:
    run = played["crash"]
    assert run.log == [] and run.ended == 1


def test_a_run_that_is_done_when_it_is_told_to_stop_is_not_queued_again(played: dict[str, Scenario]) -> None:
    run = played["done in time"]
    assert run.log == [HANDED_ON] and run.ended == 0


def test_tasks_are_told_once(played: dict[str, Scenario]) -> None:
    run = played["told twice"]
    assert run.log == [HANDED_ON, REQUEUED] and run.num_terms() == [1, 1, 1, 1]


def test_term_of_a_running_job_is_handed_on(played: dict[str, Scenario]) -> None:
    assert played["term"].log == played["squeue fails"].log == [HANDED_ON, REQUEUED]
    assert played["term"].num_terms() == [1, 1, 1, 1]


def test_a_cancelled_job_stays_cancelled(played: dict[str, Scenario]) -> None:
    run = played["cancelled"]
    assert run.log == [] and run.num_terms() == [1, 1, 1, 1] and run.ended == 143


def test_a_job_whose_tasks_slurm_stopped_is_queued_again(played: dict[str, Scenario]) -> None:
    run = played["tasks alone"]
    assert run.log == [REQUEUED] and run.num_terms() == [1, 1, 1, 1]


def test_a_run_that_does_not_stop_is_queued_again_in_time(played: dict[str, Scenario]) -> None:
    run = played["too slow"]
    assert run.log == [HANDED_ON, REQUEUED] and "did not stop within 0 s" in run.stderr


def test_a_job_is_not_queued_again_for_ever(played: dict[str, Scenario]) -> None:
    run = played["too often"]
    assert run.log == [HANDED_ON] and "100 times already" in run.stderr
