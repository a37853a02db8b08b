"""`number`: the number that the answer says is the one that the reference says, exactly.

`llmpipe.scores.numbers` says what a number is, and which one a text says.
"""

from __future__ import annotations

from llmpipe.scores.check import Check, always
from llmpipe.scores.numbers import number_in


def is_right(answer: str, reference: str, pattern: str) -> bool:
    expected = number_in(reference)
    return expected is not None and number_in(answer) == expected


def refuses(reference: str, pattern: str) -> str | None:
    return "says no number" if number_in(reference) is None else None


CHECK = Check(is_right, always, refuses, reads_numbers=True)
