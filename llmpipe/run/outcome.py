"""How a worker ended: outcome.json, by which the command that started it knows.

Launchers swallow exit codes; a file does not get lost. (No `Record`: `llmpipe show` reads it, and
does without pydantic.)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmpipe.errors import DONE, SIGINT, SIGTERM, Stopped, UserError
from llmpipe.files import read_json, write_json
from llmpipe.run.artifact import Artifact


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
        values = read_json(_path(artifact))
        if not isinstance(values, dict) or not isinstance(values.get("code"), int):
            return None
        return cls(values["code"], str(values.get("message", "")), values.get("hint"))

    @classmethod
    def clear(cls, artifact: Artifact) -> None:
        """Forget how an earlier worker ended."""
        _path(artifact).unlink(missing_ok=True)

    def write(self, artifact: Artifact) -> None:
        values = {"code": self.code, "message": self.message, "hint": self.hint}
        known = {name: value for name, value in values.items() if value not in ("", None)}
        write_json(_path(artifact), known)

    def check(self) -> None:
        """Raises what the worker ended with: UserError or Stopped; nothing where it is done."""
        if self.code in (SIGINT, SIGTERM):
            raise Stopped(self.code, self.message)
        if self.code != DONE:
            raise UserError(self.message, self.hint, self.code)


def _path(artifact: Artifact) -> Path:
    return artifact.path / "outcome.json"
