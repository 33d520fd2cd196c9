"""A Python that has imported megatron-core, pandas and the recipes once, and forks a copy of itself for every program.

A command line of celltron needs ten seconds to import what it uses; tests that try a hundred of them cannot pay that a
hundred times. Each copy is a process of its own, as if `python PROGRAM ARGUMENT ...` or `python -m MODULE ARGUMENT ...`
had been started: own arguments, environment, folder, output files, session and exit code. Requests are JSON lines on
stdin, answers JSON lines on the first stdout; tests talk to it through the fixture `warm_python` of conftest.py.
"""

import atexit
import json
import os
import resource
import runpy
import signal
import sys
import threading
import time
import traceback
from typing import Any

import anndata  # noqa: F401 - imported before the copies are forked
import numba
import pyarrow.dataset  # noqa: F401
import pydantic.dataclasses  # noqa: F401

import celltron.cells  # noqa: F401
import celltron.recipes.geneformer_pretrain  # noqa: F401

POLL_SECONDS = 0.005


def start(request: dict[str, Any]) -> int:
    """Fork; 0 in the copy, the copy's process id here."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, path, flags in [
        (0, os.devnull, os.O_RDONLY),
        (1, request["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ]:
        opened = os.open(path, flags, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["max_file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["max_file_bytes"], resource.RLIM_INFINITY))
    return 0


def become(arguments: list[str]) -> None:
    """Run a program or a module and end as `python` would, save that memory is not tidied up, which takes seconds."""
    code: object = None
    try:
        run(arguments)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def run(arguments: list[str]) -> None:
    """Run a program or a module as `python` would."""
    if arguments[0] == "-m":
        sys.argv, sys.path[0] = arguments[1:], os.getcwd()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.abspath(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


def wait(pid: int, timeout_seconds: float) -> int | None:
    """The exit code of a copy, the negative signal number if one ended it, None if it still runs."""
    end = time.monotonic() + timeout_seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(POLL_SECONDS)
    return None


def main() -> None:
    """Serve until stdin ends; a copy runs what was asked for and never returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    numba.njit(lambda: 0)()  # has numba load what it compiles with
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "arguments" not in request:
            answer = wait(request["pid"], request["timeout_seconds"])
        elif (answer := start(request)) == 0:
            become(request["arguments"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
