"""How a row is laid out: recognised by its columns, checked, and brought to one of six shapes.

A format is a file of this folder that defines its `FORMAT`, and no more: the file's name is what a
recipe calls it, and whatever takes its shape (see `llmpipe.data.examples`) takes its rows.
Validation refuses and never repairs: a row that is wrong is named (`Rejected`), not guessed at.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module

from llmpipe.data.examples import (
    Completion,
    Conversation,
    Document,
    Example,
    MultipleChoice,
    Preference,
    Prompt,
    is_of_texts,
    prompt_and_reference,
    question,
    taught_bytes,
)
from llmpipe.data.fields import Rejected
from llmpipe.data.format import Format
from llmpipe.recipe.formats import FORMAT_NAMES

__all__ = [
    "FORMATS",
    "Completion",
    "Conversation",
    "Document",
    "Example",
    "Format",
    "MultipleChoice",
    "Preference",
    "Prompt",
    "Rejected",
    "is_of_texts",
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
