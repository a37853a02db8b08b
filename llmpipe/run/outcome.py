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
from typing import Literal, get_args

from llmpipe.errors import DONE, SIGINT, SIGTERM, Stopped, UserError
from llmpipe.files.json import read_json, write_json
from llmpipe.run.artifact import Artifact

EAR = "LLMPIPE_OUTCOME"
"""The variable that names where a worker says how it ended if it cannot write it down."""
LAUNCH = "LLMPIPE_LAUNCH"
"""The variable with the word by which a command knows its workers from earlier ones."""

BEGUN: dict[str, object] = {"now": "begun"}
ENDING: dict[str, object] = {"now": "ending"}
"""What a worker says when it begins, and when it has nothing more to do."""

Kind = Literal["told", "bug", "peer"]
"""Of a failure: one that somebody can mend, a bug, or that another process was lost."""
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Outcome:
    code: int
    """The exit code."""
    message: str = ""
    hint: str | None = None
    kind: Kind = "told"

    @classmethod
    def of(cls, error: UserError, kind: Kind = "told") -> Outcome:
        return cls(error.code, error.message, error.hint, kind)

    @classmethod
    def read(cls, artifact: Artifact, launch: str | None = None) -> Outcome | None:
        """The last outcome, or None where there is none, it is damaged, or of another launch than
        the one that is asked for.
        """
        values = read_json(_path(artifact))
        if not isinstance(values, dict) or launch not in (None, values.get("launch")):
            return None
        return cls.of_values(values)

    @classmethod
    def of_values(cls, values: object) -> Outcome | None:
        """The outcome that parsed JSON holds, or None."""
        if not isinstance(values, dict) or not isinstance(values.get("code"), int):
            return None
        kind: Kind = next((name for name in KINDS if name == values.get("kind")), "told")
        return cls(values["code"], str(values.get("message", "")), values.get("hint"), kind)

    @classmethod
    def clear(cls, artifact: Artifact) -> None:
        """Forget how an earlier worker ended."""
        _path(artifact).unlink(missing_ok=True)

    def write(self, artifact: Artifact, launch: str | None = None) -> None:
        write_json(_path(artifact), self.values() | ({"launch": launch} if launch else {}))

    def deliver(self, artifact: Artifact, launch: str | None = None) -> None:
        """Write it; where that is not possible, say it to the command that waits."""
        try:
            self.write(artifact, launch)
        except OSError:
            say_to_command(self.values())

    def values(self) -> dict[str, object]:
        """What JSON holds of it."""
        values = {"code": self.code, "message": self.message, "hint": self.hint}
        known = {name: value for name, value in values.items() if value not in ("", None)}
        return known if self.kind == "told" else known | {"kind": self.kind}

    @property
    def was_stopped(self) -> bool:
        """Whether a signal was served."""
        return self.code in (SIGINT, SIGTERM)

    def check(self) -> None:
        """Raises what the worker ended with: UserError or Stopped; nothing where it is done."""
        if self.was_stopped:
            raise Stopped(self.code, self.message)
        if self.code != DONE:
            raise UserError(self.message, self.hint, self.code)


class Ear:
    """Memory of this process, in which its workers and theirs can write, by a path."""

    def __init__(self, descriptor: int):
        self.environment = {EAR: f"/proc/{os.getpid()}/fd/{descriptor}"}
        self._descriptor = descriptor

    def said(self) -> list[object]:
        """What was said of ends, in the order in which it was."""
        return [value for value in self._lines() if value not in (BEGUN, ENDING)]

    def has_heard(self, what: dict[str, object]) -> bool:
        """Whether a worker has said BEGUN, or ENDING."""
        return sys.platform != "linux" or what in self._lines()

    def _lines(self) -> list[object]:
        lines = os.pread(self._descriptor, 1 << 20, 0).splitlines()
        return [json.loads(line) for line in lines]

    def heard(self) -> Outcome | None:
        """The first end that was said, or None."""
        said = self.said()
        return Outcome.of_values(said[0]) if said else None


def say_to_command(values: dict[str, object]) -> None:
    """Say something to the command that waits for this worker, if there is one, in a line."""
    with suppress(KeyError, OSError), open(os.environ[EAR], "a", encoding="utf-8") as ear:
        ear.write(json.dumps(values) + "\n")


def new_launch() -> str:
    """A word that no other launch has."""
    return os.urandom(8).hex()


def this_launch() -> str:
    """The word of the launch that this worker is of."""
    return os.environ.get(LAUNCH, "")


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
