"""How a worker ended: outcome.json, by which the command that started it knows.

Launchers swallow exit codes; a file does not get lost. Where the disk takes no file, the end is
said into memory of the command that waits for it. (No `Record`: `llmpipe show` reads it, and does
without pydantic.)
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from llmpipe.errors import DONE, SIGINT, SIGTERM, Stopped, UserError
from llmpipe.files import read_json, write_json
from llmpipe.run.artifact import Artifact

EAR = "LLMPIPE_OUTCOME"
"""The variable that names where a worker says how it ended if it cannot write it down."""


@dataclass(frozen=True)
class Outcome:
    code: int
    """The exit code."""
    message: str = ""
    hint: str | None = None

    @classmethod
    def of(cls, error: UserError) -> Outcome:
        return cls(error.code, error.message, error.hint)

    @classmethod
    def read(cls, artifact: Artifact) -> Outcome | None:
        """The last outcome, or None where there is none or it is damaged."""
        return cls.of_values(read_json(_path(artifact)))

    @classmethod
    def of_values(cls, values: object) -> Outcome | None:
        """The outcome that parsed JSON holds, or None."""
        if not isinstance(values, dict) or not isinstance(values.get("code"), int):
            return None
        return cls(values["code"], str(values.get("message", "")), values.get("hint"))

    @classmethod
    def clear(cls, artifact: Artifact) -> None:
        """Forget how an earlier worker ended."""
        _path(artifact).unlink(missing_ok=True)

    def write(self, artifact: Artifact) -> None:
        write_json(_path(artifact), self._values())

    def deliver(self, artifact: Artifact) -> None:
        """Write it; where that is not possible, say it to the command that waits."""
        try:
            self.write(artifact)
        except OSError:
            with suppress(KeyError, OSError), open(os.environ[EAR], "a", encoding="utf-8") as ear:
                ear.write(json.dumps(self._values()) + "\n")

    def _values(self) -> dict[str, object]:
        values = {"code": self.code, "message": self.message, "hint": self.hint}
        return {name: value for name, value in values.items() if value not in ("", None)}

    def check(self) -> None:
        """Raises what the worker ended with: UserError or Stopped; nothing where it is done."""
        if self.code in (SIGINT, SIGTERM):
            raise Stopped(self.code, self.message)
        if self.code != DONE:
            raise UserError(self.message, self.hint, self.code)


class Ear:
    """Memory of this process, in which its workers and theirs can write, by a path."""

    def __init__(self, descriptor: int):
        self.environment = {EAR: f"/proc/{os.getpid()}/fd/{descriptor}"}
        self._descriptor = descriptor

    def heard(self) -> Outcome | None:
        """The first that was said, or None."""
        said = os.pread(self._descriptor, 1 << 20, 0).splitlines()
        return Outcome.of_values(json.loads(said[0])) if said else None


@contextmanager
def listening() -> Iterator[Ear]:
    """Be ready to hear of workers that cannot write."""
    linux = sys.platform == "linux"
    descriptor = os.memfd_create("outcome") if linux else os.open(os.devnull, os.O_RDWR)
    try:
        yield Ear(descriptor)
    finally:
        os.close(descriptor)


def _path(artifact: Artifact) -> Path:
    return artifact.path / "outcome.json"
