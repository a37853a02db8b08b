"""What Ollama takes from a repository of the Hub beside a GGUF file, made of the Modelfile that
`export` wrote: the files `template` and `params` (https://huggingface.co/docs/hub/ollama). Without
them it takes the template for one that it knows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files.json import read_text
from llmpipe.front.push.contents import RepoFile

NAME = "Modelfile"

FILES = (NAME, "template", "system", "params")
"""What Ollama looks for."""

_STOP = re.compile(r'PARAMETER stop (?:"""(?P<long>.*?)"""|"(?P<short>[^"]*)")\n', re.S)
_TEXT = re.compile(
    r"FROM (?P<file>[^\n]+)\n"
    r'(?P<rest>(?:TEMPLATE """(?P<template>[^\n]*)"""\n)?'
    r'(?:PARAMETER stop (?:""".*?"""|"[^"]*")\n)*)',
    re.S,
)


@dataclass(frozen=True)
class Modelfile:
    """What a Modelfile says."""

    file: str
    rest: str
    """All that follows its first line."""
    template: str | None
    """In Go's language."""
    stops: list[str]

    @classmethod
    def of(cls, path: Path) -> Modelfile:
        """Raises UserError (3) for a file that `export` has not written so."""
        try:
            said = _TEXT.fullmatch(read_text(path))
        except (OSError, ValueError):
            said = None
        if said is None:
            problem = f"{path}: is no Modelfile as export writes it"
            raise UserError(problem, "export again with --fresh", INTEGRITY)
        rest = said["rest"]
        stops = [stop["short"] or stop["long"] or "" for stop in _STOP.finditer(rest)]
        return cls(said["file"], rest, said["template"], stops)

    def files(self, gguf: str) -> Iterator[RepoFile]:
        """The files of the repository, for a GGUF file of this name."""
        yield RepoFile.of_text(NAME, f"FROM ./{gguf}\n{self.rest}")
        if self.template is not None:
            yield RepoFile.of_text("template", self.template)
        if self.stops:
            params = json.dumps({"stop": self.stops}, ensure_ascii=False, indent=2)
            yield RepoFile.of_text("params", f"{params}\n")

    def says_the_same(self, other: Modelfile) -> bool:
        """Whether another one differs by the name of its file alone."""
        return replace(self, file="") == replace(other, file="")
