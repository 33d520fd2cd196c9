"""A Python that has imported a program once and forks a copy of itself for every call of one of its functions.

`python forks.py PROGRAM` takes requests as JSON lines on stdin and answers each with a JSON line on stdout:
`{"function": NAME, "arguments": {...}, "kill_after": SECONDS or null, "here": false}` runs the function in a copy and
kills the copy (SIGKILL) when that time is up. The answer has the "code" that it ended with (-9 when it was killed), the
"seconds" it took, and the "result" that the function returned or the "error" that it raised, a traceback. With "here",
the function runs in this process: it loads what the copies then have from the start.
"""

import json
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.001
LONGEST_SECONDS = 60.0


def run_copy(function: Any, request: dict[str, Any], result: Path) -> dict[str, Any]:
    """Run a function in a forked copy and kill it if and when that is asked for."""
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            result.write_text(json.dumps({"result": function(**request["arguments"])}))
            code = 0
        except BaseException:
            result.write_text(json.dumps({"error": traceback.format_exc()}))
        finally:
            os._exit(code)
    end = began + (LONGEST_SECONDS if request["kill_after"] is None else request["kill_after"])
    is_killed = False
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        if time.monotonic() >= end and not is_killed:
            os.kill(pid, signal.SIGKILL)
            is_killed = True
        time.sleep(POLL_SECONDS)
    answer = {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - began}
    if answer["code"] >= 0:
        answer |= json.loads(result.read_text())
    return answer


def main() -> None:
    """Serve until stdin ends."""
    program = runpy.run_path(sys.argv[1])
    print(json.dumps("ready"), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            request = json.loads(line)
            function = program[request["function"]]
            if request["here"]:
                answer = {"result": function(**request["arguments"])}
            else:
                answer = run_copy(function, request, Path(folder) / "result")
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
