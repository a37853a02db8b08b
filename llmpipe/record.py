"""A JSON file with known fields. Apart from `files`, which does not import pydantic."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

from llmpipe.files import read_json, write_json


class Record(BaseModel):
    """A JSON file with known fields, none of which changes."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    @classmethod
    def from_file(cls, path: Path) -> Self | None:
        """The record in a file, or None when the file is absent or not whole."""
        values = read_json(path)
        return None if values is None else cls.model_validate(values)

    def to_file(self, path: Path) -> None:
        """Write it atomically; fields that were never set are left out."""
        write_json(path, self.model_dump(exclude_unset=True))
