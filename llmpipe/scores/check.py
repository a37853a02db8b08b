"""What a verifier is: how it tells a right answer, and which references an answer can equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def accepts(reference: str, pattern: str) -> str | None:
    """Any text: see `Check.refuses`."""


@dataclass(frozen=True)
class Check:
    """How an answer is verified."""

    is_right: Callable[[str, str, str], bool]
    """Of the answer, one reference, and the recipe's `pattern`."""
    compares: Callable[[str], bool]
    """Whether it needs something to compare with, by the recipe's `pattern`."""
    refuses: Callable[[str, str], str | None] = accepts
    """Why no answer can equal a reference, by the recipe's `pattern`; None where one can."""
    reads_numbers: bool = False
    """Whether a reference may be a number of JSON: 7 and 7.0 are two texts, and one number."""
    package: str | None = None
    """What has to be installed for it."""


def always(pattern: str) -> bool:
    """What compares whatever the pattern: see `Check.compares`."""
    return True


def never(pattern: str) -> bool:
    """What compares with nothing: see `Check.compares`."""
    return False
