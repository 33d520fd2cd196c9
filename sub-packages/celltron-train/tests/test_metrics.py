import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from celltron.train.metrics import MetricsWriter, describe, describe_seconds, numbers_of

RECORD = {
    "step": 1200,
    "loss": 4.51239,
    "learning_rate": 9.5e-4,
    "grad_norm": 0.71,
    "real_tokens_per_second": 12345.6,
    "cells_per_second": 17.25,
    "real_token_fraction": 0.934,
    "data_wait_fraction": 0.012,
    "seconds_left": 200.0,
}


def read(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_record_is_a_line_of_json_and_a_line_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = MetricsWriter(tmp_path, is_main=True, first_step=1)
    metrics.write(RECORD)
    metrics.write({"step": 1200, "validation_loss": 4.0})
    assert read(tmp_path) == [RECORD, {"step": 1200, "validation_loss": 4.0}]
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 2


def test_other_processes_write_and_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = MetricsWriter(tmp_path, is_main=False, first_step=1)
    metrics.write(RECORD)
    metrics.say("a word")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_a_continued_run_drops_what_lies_after_its_checkpoint(tmp_path: Path) -> None:
    kept = [{"step": 1, "loss": 3.0}, {"step": 2, "validation_loss": 2.5}]
    dropped = [{"step": 3, "loss": 2.0}, {"step": 3, "validation_loss": 1.9}, {"step": 4, "loss": 1.8}]
    lines = [json.dumps(record) + "\n" for record in kept + dropped]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 5, "lo')
    MetricsWriter(tmp_path, is_main=False, first_step=3)
    assert (tmp_path / "metrics.jsonl").read_text().endswith('"lo')
    metrics = MetricsWriter(tmp_path, is_main=True, first_step=3)
    assert read(tmp_path) == kept
    metrics.write({"step": 3, "validation_loss": 1.0})
    assert read(tmp_path) == [*kept, {"step": 3, "validation_loss": 1.0}]


def test_a_line_that_was_cut_short_is_dropped_and_the_next_record_stands_alone(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "validation_loss": 3.0}\n{"step": 2, "validati')
    MetricsWriter(tmp_path, is_main=True, first_step=2).write({"step": 2, "validation_loss": 2.0})
    assert [record["step"] for record in read(tmp_path)] == [1, 2]


def test_descriptions() -> None:
    assert describe(RECORD) == (
        "step   1,200  loss 4.5124  lr 9.50e-04  grad norm 0.710  12,346 tokens/s  17.2 cells/s  93% real  "
        "1.2% waiting  3 min 20 s left"
    )
    assert describe({"step": 7, "validation_loss": 3.25}) == "step       7  validation loss 3.2500"
    no_number = {"step": 7, "validation_loss": None, "unigram_loss": 4.0}
    assert describe(no_number) == "step       7  validation loss no number"
    assert describe({"step": 7, "validation_loss": 3.25, "unigram_loss": 4.0}).endswith(
        "(unigram 4.0000: +0.7500 nats better)"
    )


class Noted:
    """A report that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, dict[str, float]]] = []
        self.is_closed = False

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.told.append((step, dict(values)))

    def close(self) -> None:
        self.is_closed = True


NOTE = {"step": 7, "note": "loss spike", "spike_loss": 9.25, "median_loss": 3.0, "cells": list(range(100, 112))}


def test_reports_are_told_the_numbers_of_each_record(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path, is_main=True, first_step=1)
    report = Noted()
    metrics.reports.append(report)
    metrics.write({"step": 7, "validation_loss": 4.0})
    metrics.write(NOTE)
    metrics.close()
    assert report.told == [(7, {"validation_loss": 4.0}), (7, {"spike_loss": 9.25, "median_loss": 3.0})]
    assert report.is_closed and not metrics.reports
    assert metrics.read() == [{"step": 7, "validation_loss": 4.0}, NOTE]


def test_what_is_no_number_makes_no_curve() -> None:
    assert numbers_of({"step": 3, "loss": 1.5, "calls": 2, "ok": True, "name": "a", "list": [1.0], "none": None}) == {
        "loss": 1.5,
        "calls": 2,
    }


def test_a_run_without_records_has_none_to_read(tmp_path: Path) -> None:
    assert MetricsWriter(tmp_path, is_main=True, first_step=1).read() == []


def test_a_note_names_some_of_its_cells_and_how_many_more() -> None:
    start = "step       7  note: loss spike; spike loss 9.25, median loss 3, cells "
    assert describe(NOTE) == start + "100, 101, 102, 103, 104, 105, 106, 107 and 4 more"
    assert describe(NOTE | {"cells": [3, 1]}) == start + "3, 1"
    assert describe({"step": 7, "note": "a word"}) == "step       7  note: a word"


def test_a_loss_that_is_not_finite_is_said_in_words() -> None:
    text = describe(RECORD | {"loss": None, "grad_norm": None})
    assert "  loss no number  " in text and "  grad norm no number  " in text


def test_utilisation_is_said_where_it_is_known() -> None:
    text = describe(RECORD | {"model_flops_utilization": 0.514})
    assert text.endswith("1.2% waiting  51.4% of peak  3 min 20 s left")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 s"), (0.2, "1 s"), (59.0, "59 s"), (59.5, "1 min 00 s"), (200.0, "3 min 20 s"), (7500.0, "2 h 05 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert describe_seconds(seconds) == text
