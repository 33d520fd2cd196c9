import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from celltron.core import durable
from celltron.core.durable import (
    HashedFile,
    exchange_folders,
    hash_file,
    lock_folder,
    name_file_in_errors,
    sync_folder,
    sync_tree,
    write_atomically,
)


def full_disk(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_text_and_bytes_are_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, "Zürich")
    assert path.read_bytes() == "Zürich".encode()
    write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_leaves_the_old_content_and_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, "old")
    monkeypatch.setattr(durable.os, "fsync", full_disk)
    with pytest.raises(OSError) as caught:
        write_atomically(path, "new")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_missing_folder_and_a_folder_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "no" / "a", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "folder", "x")
    assert os.listdir(tmp_path) == ["folder"]


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", "x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_an_error_keeps_the_name_it_has(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, name_file_in_errors(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "full", "b")
    assert caught.value.filename == "b"
    with pytest.raises(OSError) as caught, name_file_in_errors(tmp_path / "a"):
        full_disk()
    assert caught.value.filename == str(tmp_path / "a")
    with pytest.raises(OSError) as caught, name_file_in_errors(tmp_path / "a", only=[errno.EIO]):
        full_disk()
    assert caught.value.filename is None


def test_folders_are_synced_and_an_unable_file_system_is_forgiven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("x")
    synced = []
    real = os.fsync
    monkeypatch.setattr(durable.os, "fsync", lambda descriptor: synced.append(descriptor) or real(descriptor))
    sync_tree(tmp_path)
    assert len(synced) == 3

    def unable(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(durable.os, "fsync", unable)
    sync_folder(tmp_path)
    monkeypatch.setattr(durable.os, "fsync", full_disk)
    with pytest.raises(OSError):
        sync_folder(tmp_path)


def test_two_names_are_exchanged_or_left(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not exchange_folders(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange two names")
    assert os.listdir(tmp_path / "a") == ["b"] and os.listdir(tmp_path / "b") == ["a"]
    assert not exchange_folders(tmp_path / "a", tmp_path / "missing")
    assert (tmp_path / "a").exists()


def test_the_lock_of_a_dead_process_is_free(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from celltron.core.durable import lock_folder; "
        "lock = lock_folder(Path(sys.argv[1])); print('held' if lock else 'free', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert child.stdout is not None and child.stdin is not None
    try:
        assert child.stdout.readline() == "held\n"
        assert lock_folder(tmp_path) is False
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
        child.stdin.close()
    lock = lock_folder(tmp_path)
    assert lock
    os.close(lock)


def test_a_file_is_hashed_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with HashedFile(path) as file:
        assert file.write(b"12") + file.write(memoryview(b"")) + file.write(bytearray(b"345")) == 5
        assert file.write(np.arange(6, dtype="<u2").reshape(2, 3)) == 12 and file.write(np.empty((0, 3))) == 0
        file.flush()
        assert file.tell() == 17 and not file.closed and path.stat().st_size == 17
    assert file.closed and path.read_bytes() == b"12345" + bytes([0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0])
    assert file.entry() == hash_file(path) == {"bytes": 17, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_a_full_disk_names_the_hashed_file(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    file = HashedFile(Path("/dev/full"))
    with pytest.raises(OSError) as caught:
        file.write(b"x" * 100_000)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/dev/full")


def test_without_sync_nothing_is_pushed_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)
    write_atomically(tmp_path / "a", "text", sync=False)
    assert (tmp_path / "a").read_text() == "text"
    with pytest.raises(OSError):
        write_atomically(tmp_path / "a", "other")
    assert (tmp_path / "a").read_text() == "text"


def test_folders_that_are_left_out_are_not_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("work/deep", "sub/work"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x").touch()
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    sync_tree(tmp_path, leave_out=["work"])
    names = {str(Path(name).relative_to(tmp_path)) for name in synced}
    assert names == {".", "sub", "sub/work", "sub/work/x"}
