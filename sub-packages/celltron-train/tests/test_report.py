"""W&B, kept offline, and TensorBoard: what is read back from the files that they themselves wrote."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from celltron.core import InputError, build_config
from celltron.train import report, report_wandb
from celltron.train.metrics import MetricsWriter
from celltron.train.report import ReportConfig, open_reports

LOGGED_OUT = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_SERVICE")


@pytest.fixture
def wandb_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """W&B as on a machine where nobody has logged in; its process ends with the test."""
    import wandb

    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in LOGGED_OUT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    wandb.teardown()
    yield wandb
    wandb.teardown()


def write_records(folder: Path, config: ReportConfig, records: list[dict[str, Any]], **settings: Any) -> None:
    """One start of a run, from the first record's step on."""
    metrics = MetricsWriter(folder, is_main=True, first_step=records[0]["step"])
    open_reports(config, metrics, settings)
    for record in records:
        metrics.write(record)
    metrics.close()


def training(step: int, loss: float) -> dict[str, Any]:
    rates = dict.fromkeys(("real_tokens_per_second", "cells_per_second", "real_token_fraction"), 1.0)
    return {"step": step, "loss": loss, "learning_rate": 0.1, "grad_norm": 1.0, **rates, "data_wait_fraction": 0.0}


FIRST = [training(10, 5.0), {"step": 10, "validation_loss": 4.5}, training(20, 4.0), training(30, 3.0)]
SECOND = [
    training(20, 4.25),
    {"step": 20, "note": "loss spike", "spike_loss": 9.0, "cells": [1, 2]},
    training(30, 3.25),
]


def read_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_the_records_and_hides_what_a_restart_undid(tmp_path: Path) -> None:
    config = ReportConfig(to=("tensorboard",))
    write_records(tmp_path, config, FIRST)
    curves = read_tensorboard(tmp_path)
    assert curves["loss"] == [(10, 5.0), (20, 4.0), (30, 3.0)]
    assert curves["validation_loss"] == [(10, 4.5)]
    assert curves.keys() == {name for record in FIRST for name in record} - {"step"}
    write_records(tmp_path, config, SECOND)
    curves = read_tensorboard(tmp_path)
    assert curves["loss"] == [(10, 5.0), (20, 4.25), (30, 3.25)]
    assert curves["validation_loss"] == [(10, 4.5)]
    assert curves["spike_loss"] == [(20, 9.0)]


def test_tensorboard_has_on_disk_what_a_killed_process_wrote(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path, is_main=True, first_step=1)
    open_reports(ReportConfig(to=("tensorboard",)), metrics, {})
    metrics.write(FIRST[0])
    assert read_tensorboard(tmp_path)["loss"] == [(10, 5.0)]
    metrics.close()


def read_wandb(path: Path) -> list[Any]:
    """The records of a `.wandb` file: after a header of 7 bytes LevelDB's log format, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    place, whole, records = 7, b"", []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a full record, or the last piece of one
            records.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
    return records


def history(records: list[Any]) -> list[dict[str, Any]]:
    """What was told, without W&B's own columns."""
    rows = []
    for record in records:
        if record.HasField("history"):
            items = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
            rows.append({name: value for name, value in items.items() if not name.startswith("_")})
    return rows


def numbers(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in record.items() if name not in ("note", "cells")} for record in records
    ]


def test_an_offline_run_keeps_its_id_and_its_newest_folder_is_the_whole_run(wandb_alone: Any, tmp_path: Path) -> None:
    config = ReportConfig(to=("wandb",), wandb_project="cells")
    run = tmp_path / "first run"
    run.mkdir()
    write_records(run, config, FIRST, loop={"max_steps": 30})
    (first,) = run.glob("wandb/offline-run-*/run-*.wandb")
    write_records(run, config, SECOND, loop={"max_steps": 40})
    (second,) = set(run.glob("wandb/offline-run-*/run-*.wandb")) - {first}
    # W&B's process writes after `finish` has returned.
    wandb_alone.teardown()
    assert history(read_wandb(first)) == numbers(FIRST)
    assert second.name == first.name == f"run-{(run / 'wandb_run_id.txt').read_text().strip()}.wandb"
    records = read_wandb(second)
    assert history(records) == numbers([*FIRST[:2], *SECOND])
    (start,) = [record.run for record in records if record.HasField("run")]
    assert (start.project, start.display_name) == ("cells", "first run")
    settings = {
        update.key or ".".join(update.nested_key): json.loads(update.value_json)
        for record in records
        if record.HasField("config")
        for update in record.config.update
    }
    assert settings["loop"] == {"max_steps": 40}


class FakeRun:
    """W&B's run, told to nobody."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.config = self

    def update(self, settings: dict[str, Any], *, allow_val_change: bool) -> None:
        assert allow_val_change

    def define_metric(self, name: str, *, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.rows.append({"finished": True})


@pytest.fixture
def start_fake(wandb_alone: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[dict[str, Any], FakeRun]]:
    """`start_fake(folder, mode=...)`: what `wandb.init` was asked for, and the run that it gave."""

    def start(folder: Path, **changes: Any) -> tuple[dict[str, Any], FakeRun]:
        asked: dict[str, Any] = {}
        run = FakeRun()

        def init(**keywords: Any) -> FakeRun:
            asked.update(keywords)
            return run

        monkeypatch.setattr(wandb_alone, "init", init)
        folder.mkdir(exist_ok=True)
        write_records(folder, ReportConfig(to=("wandb",), **changes), FIRST[:1])
        return asked, run

    return start


def test_an_online_run_goes_on_with_the_same_run(start_fake: Callable[..., Any], tmp_path: Path) -> None:
    asked, run = start_fake(tmp_path / "a", wandb_mode="online", wandb_name="named")
    assert (asked["mode"], asked["resume"], asked["name"], asked["project"]) == ("online", "allow", "named", "celltron")
    assert run.rows == [FIRST[0], {"finished": True}]
    again, run = start_fake(tmp_path / "a", wandb_mode="online")
    assert again["id"] == asked["id"] and again["name"] == "a"
    assert run.rows == [FIRST[0], {"finished": True}]
    other, _ = start_fake(tmp_path / "b", wandb_mode="online")
    assert other["id"] != asked["id"]


NETRC = "machine {host} login user password " + 40 * "a"


@pytest.mark.parametrize(
    ("environment", "netrc", "mode"),
    [
        ({}, "", "offline"),
        ({"WANDB_API_KEY": 40 * "a"}, "", "online"),
        ({"WANDB_API_KEY": 40 * "a", "WANDB_MODE": "offline"}, "", "offline"),
        ({}, NETRC.format(host="api.wandb.ai"), "online"),
        ({}, NETRC.format(host="other.example"), "offline"),
        ({}, "no such file format", "offline"),
    ],
    ids=["nobody", "key", "key, but told to be offline", "login", "login elsewhere", "broken netrc"],
)
def test_a_run_is_sent_only_where_there_is_a_key(
    start_fake: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    environment: dict[str, str],
    netrc: str,
    mode: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "home" / "netrc"
    path.write_text(netrc)
    path.chmod(0o600)
    asked, _ = start_fake(tmp_path / "run")
    assert (asked["mode"], asked["resume"]) == (mode, "allow" if mode == "online" else None)


def test_a_refusal_is_one_sentence(wandb_alone: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(**unused: Any) -> None:
        raise wandb_alone.errors.AuthenticationError("no such key")

    monkeypatch.setattr(wandb_alone, "init", refuse)
    metrics = MetricsWriter(tmp_path, is_main=True, first_step=1)
    with pytest.raises(InputError, match="refused the run: no such key; log in with `wandb login`, or keep"):
        open_reports(ReportConfig(to=("wandb",), wandb_mode="online"), metrics, {})


@pytest.mark.parametrize(("mode", "advice"), [("online", "; keep the run in its folder with .*=offline"), ("auto", "")])
def test_a_refusal_advises_only_what_would_help(
    wandb_alone: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: Any, advice: str
) -> None:
    def refuse(**unused: Any) -> None:
        raise wandb_alone.errors.CommError("no such\nentity.")

    monkeypatch.setattr(wandb_alone, "init", refuse)
    metrics = MetricsWriter(tmp_path, is_main=True, first_step=1)
    with pytest.raises(InputError, match=f"refused the run: no such entity{advice}$"):
        open_reports(ReportConfig(to=("wandb",), wandb_mode=mode), metrics, {})


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_what_is_not_installed_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda package: None)
    with pytest.raises(InputError, match=rf"asks for {name}, which is not installed; install celltron\[{name}\]"):
        build_config(ReportConfig, {"to": [name]}).check_installed()


def test_nothing_is_needed_where_nothing_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda package: None)
    write_records(tmp_path, ReportConfig(), FIRST)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_settings_that_cannot_be() -> None:
    with pytest.raises(InputError, match="negative"):
        build_config(ReportConfig, {"peak_flops": -1.0})
    with pytest.raises(InputError, match="'to.0' is \"mlflow\""):
        build_config(ReportConfig, {"to": ["mlflow"]})


@pytest.mark.parametrize("name", [*(f"cells{letter}a" for letter in "/\\#?%:"), "a" * 129, "a" * 128, "a b.c-d_e@ä"])
def test_a_project_is_refused_by_the_rule_of_wandb(name: str) -> None:
    from wandb import Settings
    from wandb.errors import UsageError

    try:
        Settings(project=name)
    except UsageError:
        with pytest.raises(InputError, match="report.wandb_project is .*, but W&B takes at most 128 letters and"):
            build_config(ReportConfig, {"wandb_project": name})
    else:
        assert build_config(ReportConfig, {"wandb_project": name}).wandb_project == name


def test_an_id_is_drawn_once(tmp_path: Path) -> None:
    first = report_wandb._read_run_id(tmp_path)
    assert len(first) == 8 and report_wandb._read_run_id(tmp_path) == first
