"""The form of an answer: `<think>...</think> <answer>...</answer>`.

`...` stands for any text that is not empty and holds none of the form's other parts, so that each
of these comes once, in its place; all else stands for itself. White space around the parts is free.
"""

from __future__ import annotations

import re
from itertools import pairwise

GAP = "..."
_PARTS = re.compile(r"(\.\.\.|</?[\w-]+>)")  # gaps and tags; between them are words


def pattern_of(form: str) -> re.Pattern[str]:
    """What fits an answer of a form whole. Raises ValueError for a form that any answer has, or
    that does not say where a gap ends."""
    parts = [part.strip() for part in _PARTS.split(form) if part.strip()]
    words = [part for part in parts if part != GAP]
    if not words:
        raise ValueError(f"'{form}' is the form of any answer: it has no tag and no word")
    if any(a == b == GAP for a, b in pairwise(parts)):
        raise ValueError(f"'{form}': nothing tells where the first of two `...` ends")
    none_of = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    gap = rf"(?!{none_of})\S(?:(?!{none_of}).)*"
    source = r"\s*+".join(gap if part == GAP else re.escape(part) for part in parts)
    return re.compile(rf"\s*+{source}\s*", re.DOTALL)


def has_form(pattern: re.Pattern[str], answer: str) -> float:
    """1 for an answer of the form, else 0."""
    return float(pattern.fullmatch(answer) is not None)
