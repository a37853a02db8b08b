"""Where the recipe says what a mistake is about.

What is known ahead has its line at once (`front/ahead.py`). What a stage finds while it works names
fields and files: a worker reads the resolved recipe, which has other lines than the person's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from llmpipe.errors import UserError
from llmpipe.files.paths import expanded
from llmpipe.recipe.check import Located
from llmpipe.recipe.sections import Recipe

LONGEST = 60  # characters of a value that is shown

_FIELD = re.compile(r"(?<![\w./~-])[a-z_]+(?:\.\w+)+")
_MAGIC = re.compile(r"[*?\[]")


@contextmanager
def with_lines(located: Located) -> Iterator[None]:
    """Let a mistake be read with the line of every field that it names, or whose file it names."""
    try:
        yield
    except UserError as error:
        hint = "\n  ".join([*filter(None, [error.hint]), *lines_of(str(error), located)])
        raise UserError(error.message, hint or None, error.code) from error


def lines_of(text: str, located: Located) -> list[str]:
    """`file:line: field: value` of what a text is about, or the `--set` that gave it; the line of
    the section where the recipe leaves a field to its default."""
    values = located.recipe.model_dump(by_alias=True)
    written = located.recipe.model_dump(by_alias=True, exclude_unset=True)
    fields = dict.fromkeys([*_sources(text, located.recipe), *_FIELD.findall(text)])
    lines = []
    for field in filter(partial(_holds, values), fields):
        line = located.line(field)
        if not line.startswith(f"--set {field}="):
            default = "" if _holds(written, field) else " unless set"
            line += f": {field}: {_short(_at(values, field))}{default}"
        lines.append(line)
    return lines


def _short(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return f"{shown[:LONGEST]}..." if len(shown) > LONGEST else shown


def _sources(text: str, recipe: Recipe) -> Iterator[str]:
    """Fields that name a file or a folder which a text names, or something below it."""
    named = {f"{field}.path": source.path for field, source in recipe.rows().items()}
    for field, name in {**recipe.references(), **recipe.files(), **named}.items():
        if magic := _MAGIC.search(name):
            name = name[: magic.start()].rpartition("/")[0]
        spelled = {name, str(expanded(name))} - {"", ".", "/"}
        places = "|".join(map(re.escape, spelled))
        if spelled and re.search(rf"(?:^|[\s'(])(?:{places})(?:[:/,\s')]|$)", text):
            yield field


def _holds(values: Any, field: str) -> bool:
    """Whether there is such a field, and it does not only look like one."""
    try:
        _at(values, field)
    except (LookupError, TypeError, ValueError):
        return False
    return True


def _at(values: Any, field: str) -> Any:
    for part in field.split("."):
        values = values[int(part)] if isinstance(values, list) else values[part]
    return values
