import errno
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from celltron.core import artefact, durable
from celltron.core.artefact import (
    MANIFEST_NAME,
    begin_artefact,
    discard_artefact,
    finish_artefact,
    leave_artefact,
    new_manifest,
    read_manifest,
    verify_artefact,
    write_artefact,
    write_manifest,
)
from celltron.core.durable import HashedFile
from celltron.core.errors import InputError, run_command


def make(final: Path, text: str = "one", *, replace: bool = False) -> None:
    with write_artefact(final, format="test-thing", version=1, replace=replace) as writer:
        (writer.folder / "sub").mkdir()
        (writer.folder / "sub" / "a.bin").write_text(text)
        (writer.folder / "b.txt").write_text("")
        writer.meta["text"] = text


def text_of(final: Path) -> str:
    return str(read_manifest(final, format="test-thing", versions={1})["text"])


def assert_untouched(final: Path, text: str | None) -> None:
    """The old artefact is whole, or absent, and nothing else lies beside it."""
    if text is None:
        assert os.listdir(final.parent) == []
        return
    assert os.listdir(final.parent) == [final.name]
    assert text_of(final) == text
    verify_artefact(final)


def test_the_manifest_tells_every_file(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "a"
    make(final)
    manifest = json.loads((final / MANIFEST_NAME).read_text())
    assert list(manifest) == ["format", "version", "celltron_version", "text", "files", "manifest_sha256"]
    assert (manifest["format"], manifest["version"], manifest["celltron_version"]) == ("test-thing", 1, "0.1.0")
    assert manifest["files"] == {
        "b.txt": {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()},
        "sub/a.bin": {"bytes": 3, "sha256": hashlib.sha256(b"one").hexdigest()},
    }
    assert_untouched(final, "one")


def test_the_steps_one_by_one(tmp_path: Path) -> None:
    final = tmp_path / "a"
    partial = begin_artefact(final)
    assert partial == tmp_path / ".a.partial" and not final.exists()
    (partial / "x").write_text("x")
    finish_artefact(partial, final, format="f", version=2, meta={"shape": (2, 3), "by_id": {1: "x", 10: "y", 9: "z"}})
    manifest = read_manifest(final, format="f", versions=[1, 2])
    assert manifest["shape"] == [2, 3] and manifest["by_id"] == {"1": "x", "10": "y", "9": "z"}
    verify_artefact(final)
    discard_artefact(partial)


def test_a_target_in_use_is_refused(tmp_path: Path) -> None:
    final = tmp_path / "a"
    make(final)
    with pytest.raises(InputError, match="exists already"):
        begin_artefact(final)
    assert_untouched(final, "one")
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty", "two")
    assert text_of(tmp_path / "empty") == "two"
    (tmp_path / "file").touch()
    for replace in (False, True):
        with pytest.raises(InputError, match="is a file"):
            begin_artefact(tmp_path / "file", replace=replace)
    (tmp_path / "link").symlink_to(final)
    with pytest.raises(InputError, match="symbolic link"):
        begin_artefact(tmp_path / "link", replace=True)
    with pytest.raises(InputError, match="cannot be written as an artefact"):
        begin_artefact(Path("/"))


def test_only_an_artefact_is_replaced(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years")
    with pytest.raises(InputError, match=r"holds files but no manifest.json"):
        begin_artefact(home, replace=True)
    assert (home / "thesis.txt").read_text() == "years"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_replacing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool) -> None:
    if not can_exchange:
        monkeypatch.setattr(artefact, "exchange_folders", lambda first, second: False)
    final = tmp_path / "a"
    make(final, "old")
    make(final, "new", replace=True)
    assert_untouched(final, "new")


def test_a_reader_always_finds_a_manifest_while_it_is_replaced(tmp_path: Path) -> None:
    final = tmp_path / "a"
    make(final, "000")
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    if not durable.exchange_folders(tmp_path / "x", tmp_path / "y"):
        pytest.skip("this file system cannot exchange two names")
    misses, is_done = [], threading.Event()

    def read() -> None:
        while not is_done.is_set():
            try:
                (final / MANIFEST_NAME).read_text()
            except OSError as error:
                misses.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(15):
        make(final, f"{number:03}", replace=True)
    is_done.set()
    reader.join()
    assert misses == []
    assert text_of(final) == "014"


def test_a_swap_that_fails_halfway_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "a"
    make(final, "old")
    monkeypatch.setattr(artefact, "exchange_folders", lambda first, second: False)
    real = os.rename

    def rename(source: Any, target: Any) -> None:
        if Path(source).name == ".a.partial":
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(artefact.os, "rename", rename)
    with pytest.raises(OSError):
        make(final, "new", replace=True)
    assert_untouched(final, "old")


def test_a_crash_between_the_renames_is_mended_by_the_next_writer(tmp_path: Path) -> None:
    final = tmp_path / "a"
    make(final, "old")
    os.rename(final, tmp_path / ".a.old")
    with pytest.raises(InputError, match=r"broke off left it as .*\.a\.old"):
        text_of(final)
    with pytest.raises(InputError, match="exists already"):
        begin_artefact(final)
    assert_untouched(final, "old")


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("stage", ["body", "hash", "manifest", "sync", "rename"])
def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    old: str | None,
) -> None:
    final = tmp_path / "out" / "a"
    final.parent.mkdir()
    if old:
        make(final, old)

    def full_disk(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(words: object) -> None:
        with write_artefact(final, format="test-thing", version=1, replace=True) as writer:
            (writer.folder / "a.bin").write_text("new")
            if stage == "body":
                full_disk()
            targets = {
                "hash": (durable.hashlib, "file_digest"),
                "manifest": (durable.secrets, "token_hex"),
                "sync": (durable.os, "fsync"),
                "rename": (artefact, "_move_into_place"),
            }
            monkeypatch.setattr(*targets[stage], full_disk)

    assert run_command(write, []) == 2
    monkeypatch.undo()
    sentence = capsys.readouterr().err
    assert "No space left on device" in sentence and sentence.count("\n") == 1
    assert str(final.parent) in sentence
    assert_untouched(final, old)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError(), InputError("odd")])
def test_an_exception_in_the_block_discards(tmp_path: Path, error: BaseException) -> None:
    final = tmp_path / "a"
    with pytest.raises(type(error)), write_artefact(final, format="f", version=1) as writer:
        (writer.folder / "x").write_text("x")
        raise error
    assert os.listdir(tmp_path) == []


def test_what_a_crash_left_is_removed(tmp_path: Path) -> None:
    final = tmp_path / "a"
    partial = begin_artefact(final)
    (partial / "stale").write_text("x")
    artefact._release(partial)  # as the system does for a dead process
    assert list(begin_artefact(final).iterdir()) == []
    discard_artefact(partial)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").touch()
    partial.symlink_to(tmp_path / "elsewhere")
    make(final)
    assert (tmp_path / "elsewhere" / "x").exists()


def test_a_folder_that_another_process_writes_is_refused(tmp_path: Path) -> None:
    final = tmp_path / "a"
    partial = begin_artefact(final)
    (partial / "x").write_text("x")
    child = os.fork()
    if child == 0:
        # The table of the parent's folders came along with the fork; another program would not have it.
        artefact._open_partials.clear()
        try:
            begin_artefact(final)
        except InputError as error:
            os._exit(0 if "written by another process" in str(error) else 3)
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (partial / "x").exists()
    finish_artefact(partial, final, format="f", version=1)


def test_a_target_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    final = tmp_path / "a"
    partial = begin_artefact(final)
    final.mkdir()
    (final / "precious").write_text("x")
    with pytest.raises(InputError, match="exists already"):
        finish_artefact(partial, final, format="f", version=1)
    assert (final / "precious").read_text() == "x"
    assert not partial.exists()


def test_links_and_odd_names_are_refused(tmp_path: Path) -> None:
    for number, (name, target) in enumerate([("link", "/etc/passwd"), ("folder_link", str(tmp_path))]):
        with pytest.raises(InputError, match=f"{name}: it is a symbolic link"):
            with write_artefact(tmp_path / str(number), format="f", version=1) as writer:
                (writer.folder / name).symlink_to(target)
    with pytest.raises(InputError, match="not a plain file"):
        with write_artefact(tmp_path / "p", format="f", version=1) as writer:
            os.mkfifo(writer.folder / "pipe")
    with pytest.raises(InputError, match="cannot stand in a manifest"):
        with write_artefact(tmp_path / "n", format="f", version=1) as writer:
            (writer.folder / "a\\b").touch()
    assert os.listdir(tmp_path) == []


def test_mistakes_of_the_program(tmp_path: Path) -> None:
    for key in ("format", "files", "manifest_sha256"):
        partial = begin_artefact(tmp_path / "a")
        with pytest.raises(ValueError, match=key):
            finish_artefact(partial, tmp_path / "a", format="f", version=1, meta={key: 1})
    partial = begin_artefact(tmp_path / "a")
    (partial / MANIFEST_NAME).write_text("{}")
    with pytest.raises(ValueError, match="written by finish_artefact"):
        finish_artefact(partial, tmp_path / "a", format="f", version=1)
    for value in (float("nan"), object()):
        partial = begin_artefact(tmp_path / "a")
        with pytest.raises((ValueError, TypeError)):
            finish_artefact(partial, tmp_path / "a", format="f", version=1, meta={"x": value})
    assert os.listdir(tmp_path) == []
    (tmp_path / "keep").mkdir()
    with pytest.raises(ValueError, match="begin_artefact"):
        discard_artefact(tmp_path / "keep")
    with pytest.raises(ValueError, match="begin_artefact"):
        finish_artefact(tmp_path / "keep", tmp_path / "a", format="f", version=1)
    assert (tmp_path / "keep").exists()


def test_ctrl_c_leaves_what_can_be_gone_on_with(tmp_path: Path) -> None:
    final = tmp_path / "a"
    with pytest.raises(KeyboardInterrupt), write_artefact(final, format="f", version=1, resume=True) as writer:
        (writer.folder / "x").write_text("x")
        raise KeyboardInterrupt
    (tmp_path / ".a.partial" / MANIFEST_NAME).write_text("{}")  # as if it had broken off right before the renaming
    (tmp_path / ".a.partial" / f".{MANIFEST_NAME}.0123abcd.tmp").write_text("{")  # or within the manifest
    with write_artefact(final, format="f", version=1, resume=True) as writer:
        assert (writer.folder / "x").read_text() == "x"
    assert os.listdir(tmp_path) == ["a"]
    assert list(read_manifest(final, format="f", versions={1})["files"]) == ["x"]


def test_an_error_discards_it_unless_it_is_to_be_left(tmp_path: Path) -> None:
    for leave in (True, False):
        with pytest.raises(InputError), write_artefact(tmp_path / "a", format="f", version=1, resume=True) as writer:
            assert not any(writer.folder.iterdir()) or not leave
            (writer.folder / "x").touch()
            writer.leave = leave
            raise InputError("odd")
        assert os.listdir(tmp_path) == ([".a.partial"] if leave else [])


def test_a_folder_that_was_left_can_be_begun_anew(tmp_path: Path) -> None:
    partial = begin_artefact(tmp_path / "a", resume=True)
    (partial / "x").touch()
    leave_artefact(partial)
    assert list(begin_artefact(tmp_path / "a", resume=True).iterdir()) == [partial / "x"]
    leave_artefact(partial)
    assert list(begin_artefact(tmp_path / "a").iterdir()) == []


def test_ctrl_c_at_the_very_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(artefact, "_move_into_place", interrupt)
    for resume in (True, False):
        with pytest.raises(KeyboardInterrupt), write_artefact(tmp_path / "a", format="f", version=1, resume=resume):
            pass
        assert os.listdir(tmp_path) == ([".a.partial"] if resume else [])


def test_files_hashed_before_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefact, "hash_file", lambda path: pytest.fail(f"{path} was read"))
    with write_artefact(tmp_path / "a", format="f", version=1) as writer:
        with HashedFile(writer.folder / "x") as file:
            assert file.write(b"12") + file.write(memoryview(b"")) + file.write(bytearray(b"345")) == 5
            assert file.tell() == 5 and not file.closed
        assert file.closed
        writer.files["x"] = file.entry()
    verify_artefact(tmp_path / "a")
    with (
        pytest.raises(AssertionError, match="3 bytes, hashed were 5"),
        write_artefact(tmp_path / "b", format="f", version=1) as writer,
    ):
        (writer.folder / "x").write_text("123")
        writer.files["x"] = file.entry()


def test_what_is_no_part_of_it_is_removed_at_the_end(tmp_path: Path) -> None:
    with write_artefact(tmp_path / "a", format="f", version=1) as writer:
        (writer.folder / "work" / "deep").mkdir(parents=True)
        (writer.folder / "work" / "deep" / "link").symlink_to("/etc/passwd")
        (writer.folder / "sub" / "work").mkdir(parents=True)
        (writer.folder / "sub" / "work" / "x").touch()
        (writer.folder / "note").touch()
        writer.remove += ["work", "note", "never there"]
    assert list(read_manifest(tmp_path / "a", format="f", versions={1})["files"]) == ["sub/work/x"]
    assert sorted(os.listdir(tmp_path / "a")) == [MANIFEST_NAME, "sub"]


def test_a_manifest_is_replaced_in_one_step(tmp_path: Path) -> None:
    final = tmp_path / "a"
    make(final)
    old = read_manifest(final, format="test-thing", versions={1})
    (final / "c.txt").write_text("new")
    files = {"c.txt": durable.hash_file(final / "c.txt")} | old["files"]
    write_manifest(final, new_manifest(format="test-thing", version=1, meta={"text": "two"}, files=files))
    verify_artefact(final)
    assert text_of(final) == "two" and sorted(os.listdir(final)) == ["b.txt", "c.txt", MANIFEST_NAME, "sub"]
    assert list(json.loads((final / MANIFEST_NAME).read_text())["files"]) == ["b.txt", "c.txt", "sub/a.bin"]
