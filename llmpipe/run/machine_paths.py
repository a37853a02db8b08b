"""This machine's paths in what is said, and what stands for them in what is kept.

A person reads paths in full. log.txt and outcome.json, which travel with the run, hold as much of
them as the recipe of the artifact does (`places.portable`).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llmpipe.errors import UserError
from llmpipe.recipe.places import is_narrow, portable
from llmpipe.recipe.sections import ELSEWHERE
from llmpipe.run.artifact import Artifact
from llmpipe.run.plan import Plan
from llmpipe.run.whereabouts import cache
from llmpipe.secrets import redacted

AROUND = ELSEWHERE.rstrip("/")

CODE = str(Path(__file__).parent.parent.parent)
"""The checkout, or where packages are installed."""


class MachinePaths:
    """The paths that a command deals with."""

    def __init__(self, run: Path, named: Iterable[str]):
        """`named`: what a recipe and its models name."""
        places = [os.path.abspath(run), *filter(os.path.isabs, named)]
        in_full = {portable(path): path for path in reversed(places)}
        self._in_full = _Words(
            {kept: path for kept, path in in_full.items() if kept.startswith(ELSEWHERE)}
        )
        around = [sys.prefix, sys.base_prefix, CODE, *sys.path]
        every = {alias for path in places for alias in (path, os.path.realpath(path))}
        around += [str(parent) for path in every for parent in Path(path).parents]
        kept = dict.fromkeys(filter(is_narrow, filter(os.path.isabs, around)), AROUND)
        for path in places:
            kept |= dict.fromkeys((path, os.path.realpath(path)), portable(path))
        kept[os.path.expanduser("~")] = "~"
        kept[os.path.abspath(cache())] = "~/.cache/llmpipe"
        if is_narrow(os.getcwd()):
            kept[os.getcwd()] = "."
        kept.pop("/", None)
        self._kept = _Words(kept)

    @classmethod
    def of(cls, artifact: Artifact) -> MachinePaths:
        """Of what an artifact is made from, once there is a plan that can be read. What is wrong
        with one is said where it is used."""
        try:
            plan = Plan.read(artifact.path)
        except (UserError, OSError):
            plan = None
        return cls(artifact.run, plan.paths if plan else [])

    def kept(self, text: str) -> str:
        """A text as it is kept, without secrets as well."""
        return self._kept.put_into(redacted(text))

    def in_full(self, text: str) -> str:
        """A text that was kept, as a person reads it here, as far as that can be told."""
        return self._in_full.put_into(text)


class _Words:
    """Paths, and what takes their place."""

    def __init__(self, words: dict[str, str]):
        self.words = words
        longest_first = sorted(filter(None, words), key=len, reverse=True)
        # a whole path, or the beginning of a longer one; not the middle of a name
        pattern = "|".join(map(re.escape, longest_first)) or "(?!)"
        self.pattern = re.compile(rf"(?<![\w~-])(?:{pattern})(?![\w-]|\.\w)")

    def put_into(self, text: str) -> str:
        return self.pattern.sub(lambda match: self.words[match[0]], text)


@contextmanager
def said_in_full(artifact: Artifact) -> Iterator[None]:
    """Let a mistake that a worker left in outcome.json be read with the paths of this machine."""
    try:
        yield
    except UserError as error:
        paths = MachinePaths.of(artifact)
        hint = paths.in_full(error.hint) if error.hint else None
        raise UserError(paths.in_full(error.message), hint, error.code) from error
