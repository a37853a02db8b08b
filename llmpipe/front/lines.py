"""Where the recipe says what a mistake is about.

What is known ahead has its line at once (`front/ahead.py`). What a stage finds while it works names
fields and files: a worker reads the resolved recipe, which has other lines than the person's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llmpipe.errors import UserError
from llmpipe.files import expanded
from llmpipe.recipe.check import Located
from llmpipe.recipe.sections import Recipe
from llmpipe.recipe.yaml import dotted

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
    """`file:line: field: value` of what a text is about; the line of the section where the recipe
    leaves a field to its default."""
    values = located.recipe.model_dump(by_alias=True)
    written = {dotted(loc) for loc in located.where}
    fields = [*_sources(text, located.recipe), *_FIELD.findall(text)]
    lines = []
    for field in dict.fromkeys(fields):
        try:
            value = _at(values, field)
        except (LookupError, TypeError, ValueError):
            continue  # it only looks like a field
        shown = json.dumps(value, ensure_ascii=False, default=str)
        shown = f"{shown[:LONGEST]}..." if len(shown) > LONGEST else shown
        default = "" if field in written else " unless set"
        lines.append(f"{located.line(field)}: {field}: {shown}{default}")
    return lines


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


def _at(values: Any, field: str) -> Any:
    for part in field.split("."):
        values = values[int(part)] if isinstance(values, list) else values[part]
    return values
