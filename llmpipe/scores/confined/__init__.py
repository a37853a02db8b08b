"""Answers that are programs, run against tests: each in a process of its own that may do nothing
but compute.

`child` is that process; `filter` is what the kernel refuses it. It has no other process, no
network, no environment, and writes no file; its memory and its processor's time are bounded, and so
is what is read of it. However it ends, it is killed and waited for.

An answer shares its process with the tests, as in any test suite: one that is written to deceive
them can. It may read what this user may, though it has nobody to tell; nothing else is within its
reach.
"""

from __future__ import annotations

import ast
import json
import os
import re
import secrets
import select
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpipe.errors import RESOURCES, UserError

CHILD = Path(__file__).with_name("child.py")
START = 60.0  # seconds that a process has to begin in, on a machine that is busy
WALL = 3  # times as long by the clock as by the processor: a machine may be busy
MOST = 1 << 16  # bytes that are read of a process

ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # so that an answer runs as it did
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}

_BLOCK = re.compile(r"^```[ \t]*(\w*)[ \t]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE)
_PYTHON = ("python", "py", "python3", "")


@dataclass(frozen=True)
class Limits:
    """What one answer may use."""

    seconds: int
    """Of the processor; three times as many by the clock."""
    megabytes: int


def code_in(answer: str) -> str:
    """The program that an answer says: its last fenced block of Python, or all of it."""
    blocks = [code for language, code in _BLOCK.findall(answer) if language.lower() in _PYTHON]
    return blocks[-1] if blocks else answer


def tests_of(value: Any) -> list[str]:
    """The tests of a row, as its column `tests` has them: a text, or a list of texts, also as JSON.
    Raises ValueError for what is none."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    tests = value if isinstance(value, list) else [value]
    if value is None or not any(tests):
        raise ValueError("there are no tests: give the row a column `tests`, of Python")
    for number, test in enumerate(tests, 1):
        if not isinstance(test, str) or not test.strip():
            raise ValueError(f"test {number} is no text")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what Python thinks of their style
                ast.parse(test)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = (
                f"line {error.lineno}: {error.msg}" if isinstance(error, SyntaxError) else error
            )
            raise ValueError(f"test {number} is no Python: {reason}") from None
    return tests


def shares_passed(
    answers: Sequence[str], tests: Sequence[list[str]], limits: Limits
) -> list[float]:
    """Of each answer, the share of its tests that pass; as many run at a time as there are
    cores."""

    def share(answer: str, tests: list[str]) -> float:
        return passed_of(answer, tests, limits) / len(tests)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(share, answers, tests))


def passed_of(answer: str, tests: list[str], limits: Limits) -> int:
    """How many tests an answer passes. Raises UserError (5) where no answer can be confined."""
    if sys.platform != "linux":
        raise _not_here()
    word = secrets.token_hex(16)
    request = {
        "code": code_in(answer),
        "tests": tests,
        "word": word,
        "parent": os.getpid(),
        "seconds": limits.seconds,
        "megabytes": limits.megabytes,
    }
    said = _said(json.dumps(request).encode(), word, limits)
    lines = said.decode(errors="replace").split("\n")
    if f"{word} begun" not in lines:
        raise _not_here()
    return sum(f"{word} {number}" in lines for number in range(len(tests)))


def _not_here() -> UserError:
    return UserError(
        "code: answers cannot be confined on this machine",
        "it takes Linux on x86-64 or arm64 with seccomp, and memory for Python to start",
        RESOURCES,
    )


def prove() -> None:
    """Raise UserError (5) where no answer can be confined here."""
    passed_of("", [], Limits(seconds=1, megabytes=512))


def _said(request: bytes, word: str, limits: Limits) -> bytes:
    """What a process writes until it ends, or is ended."""
    begun = f"{word} begun".encode()
    output = b""
    with _process(request) as process:
        assert process.stdout
        pipe = process.stdout.fileno()
        ends, is_begun = time.monotonic() + START, False
        while len(output) < MOST:
            left = ends - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                break
            part = os.read(pipe, MOST)
            if not part:
                break
            output += part
            if not is_begun and begun in output:
                ends, is_begun = time.monotonic() + WALL * limits.seconds, True
    return output


@contextmanager
def _process(request: bytes) -> Iterator[subprocess.Popen[bytes]]:
    """A process that was given a request; killed in the end, and waited for."""
    memory = os.memfd_create("request")
    with open(memory, "wb+") as file:
        file.write(request)
        file.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", str(CHILD)],
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=ENVIRONMENT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()
