"""How a worker ended: outcome.json, by which the command that started it knows."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from llmpipe.errors import DONE, SIGINT, SIGTERM, Stopped, UserError
from llmpipe.files import Record
from llmpipe.run.artifact import Artifact


class Outcome(Record):
    """Launchers swallow exit codes; this does not get lost."""

    code: int
    message: str = ""
    hint: str | None = None

    @classmethod
    def of(cls, error: UserError) -> Outcome:
        return cls(code=error.code, message=error.message, hint=error.hint)

    @classmethod
    def read(cls, artifact: Artifact) -> Outcome | None:
        """The last outcome, or None where there is none or it is damaged."""
        try:
            return cls.from_file(_path(artifact))
        except ValidationError:
            return None

    @classmethod
    def clear(cls, artifact: Artifact) -> None:
        """Forget how an earlier worker ended."""
        _path(artifact).unlink(missing_ok=True)

    def write(self, artifact: Artifact) -> None:
        self.to_file(_path(artifact))

    def check(self) -> None:
        """Raises what the worker ended with: UserError or Stopped; nothing where it is done."""
        if self.code in (SIGINT, SIGTERM):
            raise Stopped(self.code, self.message)
        if self.code != DONE:
            raise UserError(self.message, self.hint, self.code)


def _path(artifact: Artifact) -> Path:
    return artifact.path / "outcome.json"
