import errno
import os
import subprocess
import sys

import pytest

from celltron.core.errors import InputError, run_command


def test_a_sentence_is_one_printable_line() -> None:
    assert str(InputError("first\r\n  second\x1b[2J\tthird\u2028end ")) == "first second\\x1b[2J\\tthird end"
    assert isinstance(InputError("x"), ValueError)


def test_success_passes_the_words_and_returns_zero() -> None:
    seen: list[list[str]] = []
    assert run_command(lambda words: seen.append(list(words)), ["a", "b"]) == 0
    assert seen == [["a", "b"]]


def test_words_come_from_the_command_line_only_when_none_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["celltron", "x"])
    seen: list[list[str]] = []
    run_command(lambda words: seen.append(list(words)))
    run_command(lambda words: seen.append(list(words)), [])
    assert seen == [["x"], []]


def fail_with(error: BaseException):
    def main(words):
        raise error

    return main


def test_bad_input_is_one_sentence_and_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(fail_with(InputError("the seed\nis odd")), []) == 2
    captured = capsys.readouterr()
    assert captured.err == "celltron: error: the seed is odd\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/a"), "/data/a: No space left on device; free some"),
        (PermissionError(errno.EACCES, "Permission denied", "b"), "b: Permission denied; check the permissions"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "c"), "c: No such file or directory; check the"),
        (OSError(errno.EXDEV, "Invalid cross-device link", "d", None, "e"), "d -> e: Invalid cross-device link"),
        (OSError(errno.EIO, "Input/output error"), "a file: Input/output error"),
        (OSError("odd\nthing"), "a file: odd thing"),
    ],
)
def test_an_oserror_names_the_file(error: OSError, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(fail_with(error), []) == 2
    text = capsys.readouterr().err
    assert text.startswith(f"celltron: error: {sentence}")
    assert text.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_device_ends_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    def main(words):
        with open("/dev/full", "w") as stream:
            stream.write("x")

    assert run_command(main, []) == 2
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("num_lines", [1, 100_000])
def test_it_ends_in_silence_when_its_reader_leaves(name: str, num_lines: int) -> None:
    program = (
        "import sys; from celltron.core.errors import run_command; sys.stdin.read()\n"
        f"sys.exit(run_command(lambda words: print('a line\\n' * {num_lines}, file=sys.{name}), []))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        left, read = (process.stdout, process.stderr) if name == "stdout" else (process.stderr, process.stdout)
        left.close()
        process.stdin.close()
        assert read.read() == b""
    assert process.returncode == 141


def test_what_prints_nothing_may_have_no_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert run_command(print, ["a word"]) == 0
    assert run_command(fail_with(BrokenPipeError(errno.EPIPE, "Broken pipe")), []) == 2
    assert "Broken pipe" in capsys.readouterr().err


def test_another_broken_pipe_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(fail_with(BrokenPipeError(errno.EPIPE, "Broken pipe")), []) == 2
    assert "Broken pipe" in capsys.readouterr().err


def test_interruption_is_130_and_defects_go_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(fail_with(KeyboardInterrupt()), []) == 130
    with pytest.raises(ZeroDivisionError):
        run_command(fail_with(ZeroDivisionError()), [])
    with pytest.raises(SystemExit):
        run_command(fail_with(SystemExit(0)), [])
    with pytest.raises(ValueError, match="a defect"):
        run_command(fail_with(ValueError("a defect")), [])


def test_debug_prints_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_command(fail_with(InputError("odd")), [])
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("CELLTRON_DEBUG", "1")
    run_command(fail_with(InputError("odd")), [])
    assert "Traceback" in capsys.readouterr().err
