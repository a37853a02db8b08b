"""A JSON file with known fields. Apart from `files`, which does not import pydantic."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files.json import read_json, write_json


class Record(BaseModel):
    """A JSON file with known fields, none of which changes."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    @classmethod
    def from_file(cls, path: Path) -> Self | None:
        """The record in a file, or None when the file is absent or not whole.

        Raises UserError (3) naming a field that is not what it may be.
        """
        values = read_json(path)
        if values is None:
            return None
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            at = ".".join(map(str, first["loc"])) or "it"
            problem = f"{path}: {at}: {first['msg'].lower()}"
            hint = "another version wrote it, or it was changed; --fresh starts anew"
            raise UserError(problem, hint, INTEGRITY) from None

    @classmethod
    def if_readable(cls, path: Path) -> Self | None:
        """The record in a file, or None: also when another version wrote it."""
        try:
            return cls.from_file(path)
        except UserError:
            return None

    def to_file(self, path: Path) -> None:
        """Write it atomically; fields that were never set are left out."""
        write_json(path, self.model_dump(exclude_unset=True))
