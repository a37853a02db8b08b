"""The process that runs one answer: `python -I child.py`, started by `llmpipe.scores.confined`.

Its input is a request as JSON; what it says to its parent is a line when the answer begins, and one
for each test that passed. It imports nothing of llmpipe but the filter beside it: it is started
anew for every answer.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

BEGUN = "begun"
PDEATHSIG = 1  # prctl(2)
OPEN_FILES = 64


def main() -> None:
    request = json.loads(Path("/dev/stdin").read_bytes())
    parent = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    os.close(nothing)
    ctypes.CDLL(None).prctl(PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != request["parent"]:
        os._exit(1)
    limit(request["seconds"], request["megabytes"])
    _filter().confine()
    prove()
    run(request["code"], request["tests"], parent, request["word"])
    os._exit(0)  # threads that an answer left do not matter


def _filter() -> Any:
    """The module beside this one; -I leaves its folder out of what is imported from."""
    spec = spec_from_file_location("filter", Path(__file__).with_name("filter.py"))
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def limit(seconds: int, megabytes: int) -> None:
    """Bound what this process may use; where it uses more, it is killed or has no memory."""
    used = int(time.process_time()) + 1
    for what, most in (
        (resource.RLIMIT_CPU, used + seconds),
        (resource.RLIMIT_AS, megabytes << 20),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


def prove() -> None:
    """End where the filter does not hold: no answer is run then."""
    import socket

    for forbidden in (socket.socket, os.fork, lambda: os.kill(os.getpid(), 0)):
        try:
            forbidden()
        except PermissionError:
            continue
        os._exit(1)


def run(code: str, tests: list[str], parent: int, word: str) -> None:
    """Run an answer, and each of the tests behind it, in names that no other test has touched."""
    os.write(parent, f"{word} {BEGUN}\n".encode())
    names: dict[str, Any] = {"__name__": "answer"}
    try:
        exec(compile(code, "answer", "exec"), names)
    except BaseException:  # also SystemExit: no test would be reached
        return
    for number, test in enumerate(tests):
        try:
            exec(compile(test, "test", "exec"), dict(names))
        except BaseException:
            continue
        os.write(parent, f"{word} {number}\n".encode())


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    main()
