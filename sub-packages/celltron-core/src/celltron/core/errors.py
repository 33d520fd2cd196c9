"""The one error a user is meant to see, and how a command turns it into a sentence and an exit code."""

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence

from celltron.core.output import drop_unread_output

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_READER_LEFT = 141
"""128 and the number of SIGPIPE: what shells report of a tool whose output nobody reads any more."""

_OSERROR_ADVICE = {
    errno.ENOSPC: "free some space or choose another folder, then run again",
    errno.EDQUOT: "free some space or choose another folder, then run again",
    errno.EACCES: "check the permissions or choose another folder",
    errno.EPERM: "check the permissions or choose another folder",
    errno.EROFS: "choose a folder that can be written",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "give a file, not a folder",
}


class InputError(ValueError):
    r"""Something a user can mend; its text is one sentence that says what, where, what was wanted, and what to do.

    Line breaks and control characters, which may come from untrusted names, never reach the text.

    >>> str(InputError("bad name 'a\nb'"))
    "bad name 'a b'"
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(_one_line(sentence))


class BeingWrittenError(InputError):
    """An artefact that another process is writing now."""


def _one_line(text: str) -> str:
    """Fold line breaks into single spaces and show other control characters as escapes."""
    folded = re.sub(r"\s*[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]+\s*", " ", text).strip()
    # A file name may hold terminal escapes; printed raw they could rewrite the user's screen.
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in folded)


def _sentence_of(error: OSError) -> str:
    """Say in one sentence what the operating system refused and for which file."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    subject = " -> ".join(names) if names else "a file"
    reason = error.strerror or str(error) or type(error).__name__
    advice = _OSERROR_ADVICE.get(error.errno or 0)
    return _one_line(f"{subject}: {reason}; {advice}" if advice else f"{subject}: {reason}")


def run_command(main: Callable[[Sequence[str]], None], arguments: Sequence[str] | None = None) -> int:
    """Run `main` and turn what a user can cause into one sentence on stderr and an exit code.

    Args:
        main: the command; it gets the words of the command line.
        arguments: the words; None takes them from `sys.argv`.

    Returns:
        0 when `main` returned, 2 for an `InputError` or an `OSError`, 130 after Ctrl-C; 141, without a sentence, when
        who read its output has left, as `head` does. Every other exception is a defect of the program and goes up
        unchanged. With CELLTRON_DEBUG=1 the traceback is printed too.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        main(words)
        if sys.stdout is not None:  # the shell may have closed it
            sys.stdout.flush()
    except InputError as error:
        return _report(str(error), EXIT_BAD_INPUT)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and drop_unread_output():
            return EXIT_READER_LEFT
        return _report(_sentence_of(error), EXIT_BAD_INPUT)
    except KeyboardInterrupt as error:
        return _report(_one_line(str(error)) or "interrupted", EXIT_INTERRUPTED)
    return 0


def _report(sentence: str, code: int) -> int:
    """Print the sentence of the exception being handled and hand back the exit code."""
    if os.environ.get("CELLTRON_DEBUG") == "1":
        traceback.print_exc()
    print(f"celltron: error: {sentence}", file=sys.stderr)
    return code
