"""What Ollama takes from a repository of the Hub beside a GGUF file, made of the Modelfile that
`export` wrote: the files `template`, `system` and `params`
(https://huggingface.co/docs/hub/ollama). Without them it takes the template for one that it knows.
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

_TEXT = re.compile(
    r"FROM (?P<file>[^\n]+)\n"
    r'(?:TEMPLATE """(?P<template>.*?)"""\n)?'
    r'(?:SYSTEM """(?P<system>.*?)"""\n)?'
    r"(?P<stops>(?:PARAMETER stop [^\n]+\n)*)",
    re.S,
)


@dataclass(frozen=True)
class Modelfile:
    """What a Modelfile says."""

    file: str
    template: str | None
    """In Go's language."""
    system: str | None
    stops: list[str]

    @classmethod
    def of(cls, path: Path) -> Modelfile:
        """Raises UserError (3) for a file that `export` has not written so."""
        try:
            said = _TEXT.fullmatch(read_text(path))
            lines = said["stops"].splitlines() if said else []
            stops = [str(json.loads(line.removeprefix("PARAMETER stop "))) for line in lines]
        except (OSError, ValueError):
            said = None
        if said is None:
            problem = f"{path}: is no Modelfile as export writes it"
            raise UserError(problem, "export again with --fresh", INTEGRITY)
        return cls(said["file"], said["template"], said["system"], stops)

    def files(self, gguf: str) -> Iterator[RepoFile]:
        """The files of the repository, for a GGUF file of this name."""
        yield RepoFile.of_text(NAME, self._text(f"./{gguf}"))
        if self.template is not None:
            yield RepoFile.of_text("template", self.template)
        if self.system is not None:
            yield RepoFile.of_text("system", self.system)
        if self.stops:
            params = json.dumps({"stop": self.stops}, ensure_ascii=False, indent=2)
            yield RepoFile.of_text("params", f"{params}\n")

    def _text(self, file: str) -> str:
        lines = [f"FROM {file}"]
        lines += [f'TEMPLATE """{self.template}"""'] if self.template is not None else []
        lines += [f'SYSTEM """{self.system}"""'] if self.system is not None else []
        lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in self.stops]
        return "\n".join(lines) + "\n"

    def says_the_same(self, other: Modelfile) -> bool:
        """Whether another one differs by the name of its file alone."""
        return replace(self, file="") == replace(other, file="")
