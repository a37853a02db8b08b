"""How a row is laid out: recognised by its columns, checked, and brought to one of six shapes.

A format is a file of this folder that defines its `FORMAT`, and no more: the file's name is what a
recipe calls it, and whatever takes its shape (see `llmpipe.data.examples`) takes its rows.
Validation refuses and never repairs: a row that is wrong is named (`Rejected`), not guessed at.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from llmpipe.data.examples import (
    Completion,
    Conversation,
    Document,
    Example,
    MultipleChoice,
    Preference,
    Prompt,
    prompt_and_reference,
    question,
    taught_bytes,
)
from llmpipe.data.fields import Rejected
from llmpipe.data.format import Format
from llmpipe.errors import UserError, near
from llmpipe.recipe.formats import FORMAT_NAMES

__all__ = [
    "FORMATS",
    "Completion",
    "Conversation",
    "Document",
    "Example",
    "Format",
    "Layout",
    "MultipleChoice",
    "Preference",
    "Prompt",
    "Rejected",
    "convert",
    "detect",
    "formats_of",
    "prompt_and_reference",
    "question",
    "taught_bytes",
]


def _formats() -> Iterable[Format]:
    for name in FORMAT_NAMES:
        yield import_module(f"{__name__}.{name.replace('-', '_')}").FORMAT


# in the order in which `auto` tries them
FORMATS: dict[str, Format] = {
    format.name: format
    for format in sorted(_formats(), key=lambda format: format.precedence, reverse=True)
}

Renaming = dict[str, str]  # {your column: the format's}


@dataclass(frozen=True)
class Layout:
    """How the rows of a source are read."""

    format: str
    columns: Renaming
    """{your column: the format's} of each column that is read."""
    unused: list[str]
    """Your other columns."""

    @property
    def shape(self) -> type:
        """The shape of the examples that rows become; see `Format.shape`."""
        return FORMATS[self.format].shape


def detect(columns: list[str], format: str, mapping: Renaming, where: str) -> Layout:
    """The layout of rows with these columns. Raises UserError naming them and what is needed.

    `format` and `mapping` are the recipe's `format` and `columns`; `where` begins the message.
    """
    _check_mapping(columns, mapping, where)
    candidates = list(FORMATS.values()) if format == "auto" else [FORMATS[format]]
    renamings = [mapping] if mapping else [{}, *_synonyms(columns)]
    for candidate in candidates:
        if used := _columns_read(candidate, columns, renamings):
            unused = [column for column in columns if column not in used]
            return Layout(candidate.name, used, unused)
    fits = "no format fits" if format == "auto" else f"format {format} does not fit"
    needed = "; ".join(f"{it.name}: {', '.join(it.required)}" for it in candidates)
    example = "Map yours with columns, such as {frage: instruction, antwort: output}"
    problem = f"{where}: {fits} the columns {_shown(columns)}"
    raise UserError(problem, f"needed are {needed}. {example}")


def convert(row: dict[str, Any], layout: Layout) -> Example:
    """A row as it was read -> an example. Raises Rejected."""
    format = FORMATS[layout.format]
    for yours, name in layout.columns.items():
        if name in format.required and row.get(yours) is None:
            raise Rejected("null" if yours in row else "missing column", yours)
    return format.example_of({name: row.get(yours) for yours, name in layout.columns.items()})


def formats_of(shapes: Iterable[type]) -> list[str]:
    """The names of the formats whose rows become one of these shapes."""
    every = FORMATS.values()
    return [format.name for shape in shapes for format in every if format.shape is shape]


def _check_mapping(columns: list[str], mapping: Renaming, where: str) -> None:
    hint = f"found: {_shown(columns)}"
    for name in mapping:
        if name not in columns:
            problem = f"columns: there is no column '{name}'{near(name, columns)}"
            raise UserError(f"{where}: {problem}", hint)
    renamed = [mapping.get(name, name) for name in columns]
    for name in renamed:
        if renamed.count(name) > 1:
            raise UserError(f"{where}: two columns are called '{name}' after mapping", hint)


def _shown(columns: list[str]) -> str:
    return ", ".join(columns) or "none"


def _synonyms(columns: list[str]) -> Iterable[Renaming]:
    """Every format's synonyms that rows with these columns may mean.

    A name means the same whatever the format: pairs with a `question` serve as prompts, too.
    """
    for format in FORMATS.values():
        for names in format.synonyms:
            if names.keys() <= set(columns):
                yield names


def _columns_read(format: Format, columns: list[str], renamings: list[Renaming]) -> Renaming | None:
    """{your column: the format's} under the renaming that reads most columns, or None."""
    readings = []
    for names in renamings:
        yours = {names.get(column, column): column for column in columns}
        collide = len(yours) < len(columns)
        if not collide and yours.keys() >= set(format.required):
            known = (*format.required, *format.optional)
            readings.append({yours[name]: name for name in known if name in yours})
    return max(readings, key=len, default=None)
