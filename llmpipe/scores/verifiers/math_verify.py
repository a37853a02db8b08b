r"""`math_verify`: what the library math-verify says of a mathematical answer.

A reference without delimiters that holds a backslash or a power is LaTeX as a whole: the library
would read the 2 of `2\pi` alone.
"""

from __future__ import annotations

import re
from typing import Any

from llmpipe.scores.check import Check, always

_DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed|\\begin")


def is_right(answer: str, reference: str, pattern: str) -> bool:
    from math_verify import parse, verify

    return bool(verify(_parsed(reference), parse(answer)))


def refuses(reference: str, pattern: str) -> str | None:
    return None if _parsed(reference) else "is nothing that math-verify can read"


def _parsed(reference: str) -> list[Any]:
    from math_verify import parse

    is_bare = re.search(r"[\\^]", reference) and not _DELIMITED.search(reference)
    expressions: list[Any] = parse(f"${reference}$" if is_bare else reference)
    return expressions


CHECK = Check(is_right, always, refuses, package="math_verify")
