import os
import socket
from pathlib import Path

import pytest

from celltron.core import InputError
from celltron.core.durable import lock_folder
from celltron.train import run_folder
from celltron.train.launch import Launch
from celltron.train.run_folder import RUN_MARK_NAME, check_folder, hold_folder, mark_folder

pytestmark = pytest.mark.usefixtures("engine")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "first"


def assert_refused(out: Path, match: str) -> None:
    with pytest.raises(InputError, match=f"first is in use by another run{match}; "), hold_folder(out, Launch()):
        pytest.fail("entered")


def test_a_second_run_is_refused_and_told_who_holds_the_folder(out: Path) -> None:
    me = f"process {os.getpid()} on {socket.gethostname()}, since 20"
    with hold_folder(out, Launch()):
        assert_refused(out, "")
        mark_folder(out)
        assert_refused(out, rf" \({me}.* UTC\)")
        assert (out / RUN_MARK_NAME).read_text().startswith(me)
    assert (out / RUN_MARK_NAME).read_text() == ""
    with hold_folder(out, Launch()):
        assert (out / RUN_MARK_NAME).read_text().startswith(me)


def test_the_folder_is_free_after_a_failure(out: Path) -> None:
    with pytest.raises(ValueError, match="of the run"), hold_folder(out, Launch()):
        (out / "a file").touch()
        raise ValueError("of the run")
    lock = lock_folder(out)
    assert lock
    os.close(lock)


def test_a_run_that_makes_nothing_leaves_nothing(out: Path, tmp_path: Path) -> None:
    with hold_folder(out, Launch()):
        assert out.is_dir()
    assert list(tmp_path.iterdir()) == []
    out.mkdir(parents=True)
    with hold_folder(out, Launch()):
        pass
    assert out.is_dir()


def test_without_locks_a_run_goes_on(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_folder, "lock_folder", lambda folder: None)
    with hold_folder(out, Launch()):
        mark_folder(out)
    assert (out / RUN_MARK_NAME).read_text() == ""
    assert "no locks on this file system" in capsys.readouterr().err


def test_other_processes_hold_nothing(out: Path) -> None:
    with hold_folder(out, Launch(rank=1, world_size=2, local_rank=1)):
        assert not out.exists()


def test_a_folder_of_somebody_elses_files_is_refused(out: Path) -> None:
    check_folder(out)
    out.mkdir(parents=True)
    check_folder(out)
    (out / "thesis.tex").touch()
    with pytest.raises(InputError, match="first holds files that no run made"):
        check_folder(out)
    mark_folder(out)
    check_folder(out)
