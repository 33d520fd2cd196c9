"""`celltron launch`, with a module of NeMo-Run's signatures in its place."""

import inspect
import os
import shlex
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from celltron.cli import main as command_line
from celltron.cli.launch import LaunchPlan, make_plan, submit
from celltron.core import InputError

TRAIN = ["train", "--config", "run.yaml", "--data", "my cells.store", "--out", "runs/$first", "loop.seed=3"]
SLURM = ["--executor", "slurm", "--account", "lab"]

# Arguments of NeMo-Run 0.11.1.
EXECUTOR = "packager launcher env_vars retries experiment_id job_dir"
SIGNATURES = {
    "LocalExecutor": f"{EXECUTOR} ntasks_per_node nodes",
    "SlurmExecutor": f"{EXECUTOR} account partition job_name_prefix time nodes ntasks_per_node cpus_per_task "
    "cpus_per_gpu gpus_per_node gpus_per_task qos mem mem_per_gpu mem_per_cpu comment constraint exclude gres signal "
    "exclusive array open_mode container_image container_mounts container_env additional_parameters srun_args "
    "heterogeneous memory_measure job_details tunnel dependencies dependency_type torchrun_nproc_per_node "
    "wait_time_for_group_job monitor_group_job monitor_group_job_wait_time setup_lines het_group_indices segment "
    "network ray_template poll_estimated_start_time",
    "Torchrun": "nsys_profile nsys_folder nsys_filename nsys_trace nsys_extra_args nsys_gpu_metrics rdzv_backend "
    "rdzv_port rdzv_id",
    "Packager": "debug symlink_from_remote_dir",
    "Script": "path inline args env entrypoint m metadata",
    "Experiment": "title executor id log_level _reconstruct jobs base_dir clean_mode enable_goodbye_message "
    "threadpool_workers skip_status_at_exit serialize_metadata_for_scripts",
    "Experiment.add": "self task executor name plugins tail_logs dependencies",
    "Experiment.run": "self sequential detach tail_logs direct",
}


class Call:
    """A call of NeMo-Run, refused where it would refuse it."""

    def __init__(self, of: str, positional: tuple[Any, ...], given: dict[str, Any]) -> None:
        names = SIGNATURES[of].removeprefix("self ").split()
        assert set(given) <= set(names), f"{of} has no {set(given) - set(names)}"
        self.of = of
        self.given = dict(zip(names, positional, strict=False)) | given


class BadExitError(Exception):
    """As invoke raises it, by which NeMo-Run calls sbatch."""

    def __init__(self, stderr: str) -> None:
        self.result = types.SimpleNamespace(stderr=stderr)


class FakeExperiment:
    """Keeps what it is told; its only job ends as `end`, or sbatch refuses it with `refusal`, or it is told to stop."""

    made: list["FakeExperiment"] = []
    end = "SUCCEEDED"
    refusal = ""
    told: signal.Signals | None = None
    has_started = True
    torchrun_ended: int | None = None

    def __init__(self, *positional: Any, **given: Any) -> None:
        self.calls = [Call("Experiment", positional, given)]
        self.is_entered = False
        self.jobs: list[types.SimpleNamespace] = []
        FakeExperiment.made.append(self)

    def __enter__(self) -> "FakeExperiment":
        self.is_entered = True
        return self

    def __exit__(self, *unused: object) -> None:
        self.is_entered = False

    def add(self, *positional: Any, **given: Any) -> None:
        assert self.is_entered
        self.calls.append(Call("Experiment.add", positional, given))
        executor = types.SimpleNamespace(job_dir="/experiments/celltron")
        self.jobs.append(types.SimpleNamespace(state=types.SimpleNamespace(name=self.end), executor=executor))

    def run(self, *positional: Any, **given: Any) -> None:
        assert self.is_entered
        self.calls.append(Call("Experiment.run", positional, given))
        if self.refusal:
            raise BadExitError(self.refusal)
        if self.told is not None:
            with subprocess.Popen(["sleep", "60"], start_new_session=self.has_started) as torchrun:
                try:
                    os.kill(os.getpid(), self.told)
                    self.torchrun_ended = torchrun.wait(30)
                finally:
                    torchrun.kill()


@pytest.fixture
def nemo_run(monkeypatch: pytest.MonkeyPatch) -> type[FakeExperiment]:
    """Puts the module in place; gives what keeps the experiments."""
    module = types.ModuleType("nemo_run")
    for name in SIGNATURES:
        if not name.startswith("Experiment"):
            setattr(module, name, lambda *positional, name=name, **given: Call(name, positional, given))
    monkeypatch.setattr(FakeExperiment, "made", [])
    monkeypatch.setattr(FakeExperiment, "end", "SUCCEEDED")
    monkeypatch.setattr(FakeExperiment, "refusal", "")
    monkeypatch.setattr(FakeExperiment, "told", None)
    monkeypatch.setattr(FakeExperiment, "has_started", True)
    module.Experiment = FakeExperiment  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nemo_run", module)
    invoke = types.ModuleType("invoke")
    invoke.UnexpectedExit = BadExitError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "invoke", invoke)
    return FakeExperiment


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a space in its name and a config in it."""
    folder = tmp_path / "my work"
    folder.mkdir()
    (folder / "run.yaml").write_text("loop: {max_steps: 50}\nschedule: {warmup_steps: 5}\n")
    monkeypatch.chdir(folder)
    return folder


def plan(*words: str) -> LaunchPlan:
    return make_plan(command_line._make_parser().parse_args(["launch", *words]))


def run_script(plan: LaunchPlan, elsewhere: Path, python: str) -> tuple[str, list[str]]:
    """The folder and the words with which a plan's script would start Python."""
    fake = elsewhere / "python"
    fake.write_text("#!/bin/bash\npwd\nprintf '%s\\n' \"$@\"\n")
    fake.chmod(0o755)
    script = plan.script.replace(shlex.quote(python), shlex.quote(str(fake)))
    ended = subprocess.run(["bash", "-c", script], cwd=elsewhere, capture_output=True, text=True, check=True)
    where, *words = ended.stdout.splitlines()
    return where, words


def test_signatures_are_those_of_nemo_run() -> None:
    nemo_run = pytest.importorskip("nemo_run", reason="NeMo-Run is not installed (celltron[launch])")
    for name, arguments in SIGNATURES.items():
        found = nemo_run
        for part in name.split("."):
            found = getattr(found, part)
        assert list(inspect.signature(found).parameters) == arguments.split(), name


def test_local_plan() -> None:
    local = plan("--processes-per-node", "2", "--max-restarts", "7", *TRAIN)
    assert local.executor == "LocalExecutor" and local.name == "celltron"
    path = local.settings["env_vars"].pop("PATH")
    assert path.split(":")[0] == str(Path(sys.executable).parent), "torchrun lies beside python"
    environment = {"PET_MAX_RESTARTS": "7", "PET_SHUTDOWN_TIMEOUT": "120", "LOGLEVEL": "WARNING"}
    assert local.settings == {"ntasks_per_node": 2, "env_vars": environment}


def test_torchrun_reads_what_nemo_run_has_no_flags_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in plan("--max-restarts", "7", *TRAIN).settings["env_vars"].items():
        monkeypatch.setenv(name, value)
    torchrun = get_args_parser().parse_args(["--nproc-per-node", "2", "--no-python", "celltron.sh"])
    assert (torchrun.max_restarts, torchrun.shutdown_timeout) == (7, 120)


def test_slurm_plan() -> None:
    words = ["--nodes", "2", "--processes-per-node", "8", "--cpus-per-task", "64", "--partition", "gpu"]
    slurm = plan(*SLURM, *words, *TRAIN)
    environment = slurm.settings.pop("env_vars")
    assert environment["PATH"] == f"{Path(sys.executable).parent}:$PATH"
    assert slurm.executor == "SlurmExecutor"
    assert slurm.settings == {
        "account": "lab",
        "partition": "gpu",
        "time": "24:00:00",
        "nodes": 2,
        "ntasks_per_node": 8,
        "gpus_per_node": 8,
        "cpus_per_task": 64,
        "srun_args": ["--cpus-per-task=64"],
        "signal": "TERM@180",
        "retries": 20,
    }
    assert environment["PET_SHUTDOWN_TIMEOUT"] == "120"


def test_a_run_that_saves_slowly_is_given_its_time() -> None:
    """SLURM waits for torchrun, and torchrun for the run."""
    slurm = plan(*SLURM, *TRAIN, "loop.stop_seconds=299.5")
    assert (slurm.settings["signal"], slurm.settings["env_vars"]["PET_SHUTDOWN_TIMEOUT"]) == ("TERM@380", "320")
    assert plan(*TRAIN, "loop.stop_seconds=30").settings["env_vars"]["PET_SHUTDOWN_TIMEOUT"] == "50"


@pytest.mark.parametrize("text", ["4", "3:01", "0:03:01", "0-1", "0-0:4", "0-0:03:01", "2-12:00:00", "5000"])
def test_a_time_limit_is_handed_on_as_it_was_written(text: str) -> None:
    assert plan(*SLURM, "--time", text, *TRAIN).settings["time"] == text


def test_slurm_plan_in_a_container(folder: Path, tmp_path: Path) -> None:
    words = ["--container-image", "celltron.sqsh", "--container-mounts", "/a:/a,/b:/c", "--gpus-per-node", "0"]
    slurm = plan(*SLURM, *words, "--requeues", "0", *TRAIN)
    assert slurm.settings["container_image"] == "celltron.sqsh"
    assert slurm.settings["container_mounts"] == [f"{folder}:{folder}", "/a:/a", "/b:/c"]
    assert "gpus_per_node" not in slurm.settings and slurm.settings["retries"] == 0
    assert "PATH" not in slurm.settings["env_vars"], "that of the image is right"
    where, words = run_script(slurm, tmp_path, "python")
    assert where == str(folder) and words[:3] == ["-m", "celltron.cli.main", "train"]


def test_every_process_runs_celltron_train(
    folder: Path, tmp_path: Path, check_command: Callable[[list[str]], Any]
) -> None:
    where, words = run_script(plan(*TRAIN), tmp_path, sys.executable)
    assert where == str(folder), "relative paths mean what they meant where the run was launched"
    assert words == ["-m", "celltron.cli.main", *TRAIN, "--resume", "auto"]
    config = check_command(["celltron", *words[2:]])
    assert (config.out, config.resume, config.loop.seed, config.loop.max_steps) == ("runs/$first", "auto", 3, 50)


def test_resume_auto_is_not_said_twice() -> None:
    assert plan(*TRAIN, "--resume=auto").script.count("--resume") == 1


def test_dry_run_prints_all_that_nemo_run_would_be_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], nemo_run: type[FakeExperiment]
) -> None:
    words = [*SLURM, "--nodes", "2", "--processes-per-node", "4", *TRAIN]
    submit(plan(*words))
    (experiment,) = nemo_run.made
    monkeypatch.setitem(sys.modules, "nemo_run", None)  # as where it is not installed
    assert command_line.main(["launch", "--dry-run", *words]) == 0
    printed = capsys.readouterr().out
    task = experiment.calls[1].given
    told = task["executor"].given | task["task"].given
    assert {name for name, value in told.items() if f"  {name} = {value!r}\n" not in printed} == {
        "launcher",
        "packager",
        "inline",
    }
    assert "\n".join(f"  {line}" for line in told["inline"].splitlines()) in printed
    assert "torchrun" in printed


@pytest.mark.parametrize(("words", "is_local"), [([], True), (SLURM, False)])
def test_nemo_run_is_told(nemo_run: type[FakeExperiment], words: list[str], is_local: bool) -> None:
    made = plan("--name", "first", *words, *TRAIN)
    submit(made)
    (experiment,) = nemo_run.made
    opened, added, run = experiment.calls
    assert opened.given == {"title": "first"}
    assert added.given["name"] == "first" and added.given["tail_logs"] is is_local
    assert added.given["task"].of == "Script" and added.given["task"].given == {"inline": made.script}
    executor = added.given["executor"]
    assert executor.of == made.executor
    assert executor.given.pop("launcher").of == "Torchrun"
    assert executor.given.pop("packager").of == "Packager", "nothing of the current folder is copied"
    assert executor.given == made.settings
    assert run.given == {"detach": not is_local, "tail_logs": is_local}


def test_a_local_run_that_fails_is_an_error(nemo_run: type[FakeExperiment], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nemo_run, "end", "FAILED")
    with pytest.raises(InputError, match="ended as FAILED.*/experiments/celltron"):
        submit(plan(*TRAIN))
    submit(plan(*SLURM, *TRAIN))  # its end is SLURM's to tell


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_local_run_is_told_to_stop(
    number: signal.Signals, nemo_run: type[FakeExperiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(number)
    monkeypatch.setattr(nemo_run, "told", number)
    monkeypatch.setattr(nemo_run, "end", "FAILED")
    with pytest.raises(SystemExit) as end:
        submit(plan(*TRAIN))
    (experiment,) = nemo_run.made
    assert end.value.code == 128 + number and experiment.torchrun_ended == -signal.SIGTERM
    assert signal.getsignal(number) is before


def test_a_local_run_that_has_not_started_does_not(
    nemo_run: type[FakeExperiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nemo_run, "told", signal.SIGINT)
    monkeypatch.setattr(nemo_run, "has_started", False)  # another child, such as one that writes logs
    with pytest.raises(SystemExit) as end:
        submit(plan(*TRAIN))
    assert end.value.code == 130 and nemo_run.made[0].torchrun_ended is None


def test_a_job_that_slurm_does_not_take_is_an_error(
    nemo_run: type[FakeExperiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nemo_run, "refusal", "sbatch: error: Batch job submission failed:\nInvalid account\n")
    with pytest.raises(InputError, match=r"\(sbatch: error: Batch job submission failed: Invalid account\); launch it"):
        submit(plan(*SLURM, *TRAIN))


def test_nemo_run_is_asked_for_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "nemo_run", None)
    assert command_line.main(["launch", *SLURM, *TRAIN]) == 2
    printed = capsys.readouterr().err
    assert "install celltron[launch]" in printed and "--dry-run" in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "2", *TRAIN], "--nodes is given, but the executor is local"),
        (["--requeues", "0", *TRAIN], "--requeues is given, but the executor is local"),
        (["--executor", "slurm", *TRAIN], "needs --account"),
        ([*SLURM, "--container-mounts", "/a:/a", *TRAIN], "no --container-image"),
        *(
            ([*SLURM, "--time", text, *TRAIN], f"--time is {text!r}, but SLURM takes minutes, minutes:seconds")
            for text in ("tomorrow", "1h", "-5", "1:2:3:4", "1-", "1-2:3:4:5", "10:", "1.5", "٣", "", "UNLIMITED")
        ),
        ([*SLURM, "--time", "00:03:00", *TRAIN], "--time is '00:03:00', but the run is told to stop 180 s before that"),
        ([*SLURM, "--time", "0", *TRAIN], "--time is '0', but the run is told to stop 180 s before that"),
        ([*SLURM, "--time", "61", *TRAIN, "loop.stop_seconds=3600"], "'61', but the run is told to stop 3680 s before"),
        (["--name", "a/b", *TRAIN], "--name is 'a/b'"),
        (["--processes-per-node", "0", *TRAIN], "'0' is no whole number"),
        (["--max-restarts", "-1", *TRAIN], "'-1' is no whole number"),
        ([], "required: command"),
        (["embed"], "invalid choice: 'embed'"),
        (["train"], "out is empty"),
        (["train", "--config", "missing.yaml"], "missing.yaml"),
        ([*TRAIN, "--max-stepz", "3"], "--max-stepz; did you mean"),
        ([*TRAIN, "--resume", "runs/other"], "can only continue with auto"),
        ([*SLURM, "--nodes", "2", *TRAIN, "--tensor-parallel", "4"], "parallel.tensor 4"),
        (["--processes-per-node", "128", *TRAIN, "--global-batch-size", "64"], "less than the 128"),
    ],
)
def test_what_cannot_run_is_refused_before_it_waits_in_a_queue(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], nemo_run: type[FakeExperiment]
) -> None:
    assert command_line.main(["launch", *words]) == 2
    assert message in capsys.readouterr().err
    assert nemo_run.made == []


def test_help_of_the_run_is_trains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command_line._run(["launch", "train", "--help"])
    assert end.value.code == 0 and "--micro-batch-size" in capsys.readouterr().out
