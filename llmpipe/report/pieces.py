"""What the sections of the page are made of: facts, tables, cards, folds.

`pieces.html.j2` has a macro for each.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmpipe.report.plots import Strip
from llmpipe.report.text import Clipped


@dataclass(frozen=True)
class Fact:
    name: str
    value: str


def known_facts(values: dict[str, str | None]) -> list[Fact]:
    """What is not known is left out."""
    return [Fact(name, value) for name, value in values.items() if value is not None]


@dataclass(frozen=True)
class Answer:
    """A text under its name, with a note below it."""

    name: str
    text: Clipped
    note: str | None = None
    is_right: bool | None = None
    """None: nothing tells."""


@dataclass(frozen=True)
class Card:
    """A prompt with answers side by side."""

    prompt: Clipped
    answers: list[Answer]
    expected: Clipped | None = None


@dataclass(frozen=True)
class Fold:
    """Cards that are shown on request."""

    title: str
    cards: list[Card]


@dataclass(frozen=True)
class Heading:
    """Of a column."""

    name: str
    is_number: bool = False


@dataclass(frozen=True)
class Noted:
    """A number with what belongs under it."""

    text: str
    note: str


Content = str | Clipped | Noted | Strip | None  # of a cell


@dataclass(frozen=True)
class Group:
    """Rows of a table with one heading."""

    name: str
    rows: list[list[Content]]
    note: str | None = None
    """Under the name."""


@dataclass(frozen=True)
class Table:
    label: str
    headings: list[Heading]
    groups: list[Group]
