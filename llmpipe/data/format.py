"""What a format is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmpipe.data.examples import Example
from llmpipe.data.fields import Values


@dataclass(frozen=True)
class Format:
    """One layout of rows: by which columns it is recognised, and how a row becomes an example."""

    name: str
    """As in the recipe, `data.train.format`: the file's, with - for _."""
    precedence: int
    """Among the formats that fit, `auto` takes the one with the highest: one that needs much stands
    before one that needs little."""
    required: tuple[str, ...]
    """Columns that every row has; a row without one of them, or with null in it, is rejected."""
    optional: tuple[str, ...]
    """Columns that are read where they are."""
    shape: type
    """The shape of its examples. A `Completion` of messages is a `Conversation`, though."""
    example_of: Callable[[Values], Example]
    """A row under the format's column names -> an example. Raises Rejected."""
    synonyms: tuple[dict[str, str], ...] = ()
    """Column names that data sets have and that mean one thing only -> the format's names.

    One of these is tried on rows that have all of its columns. Anything else wants `columns:`.
    """
