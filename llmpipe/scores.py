"""Scores of one answer, and of several answers to one prompt: of `eval`, and PPO's verifiers.

A new one is a function here, its line in `VERIFIERS` and its name in `Verifier`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

Verifier = Literal["exact_match", "contains", "number", "regex", "json", "math_verify"]

_NUMBER = re.compile(r"(?<![\w.])-?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")

_FENCED = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?```\s*", re.DOTALL)


def score(
    kind: str, answer: str, reference: str | None, pattern: str | None = None
) -> dict[str, float]:
    """The scores of one answer under one heading of `score:`; rouge has three."""
    expected = (reference or "").strip()
    if kind == "rouge":
        scores = _rouge().score(expected, answer)
        return {name: value.fmeasure for name, value in scores.items()}
    right = VERIFIERS[kind].is_right(answer, expected, pattern or "")
    return {kind: float(right)}


def is_equal(answer: str, expected: str, _: str) -> bool:
    return answer.strip() == expected


def is_contained(answer: str, expected: str, _: str) -> bool:
    return expected in answer


def has_number(answer: str, expected: str, _: str) -> bool:
    """Whether the last number of the answer is the one that is expected."""
    number = number_in(expected)
    return number is not None and number_in(answer) == number


def number_in(text: str) -> float | None:
    """The last number of a text; thousands may be set apart by commas."""
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def is_json(answer: str, _: str = "", __: str = "") -> bool:
    """Whether an answer is JSON, also in a fenced block."""
    fenced = _FENCED.fullmatch(answer)
    try:
        json.loads(fenced[1] if fenced else answer)
    except (ValueError, RecursionError):
        return False
    return True


def matches(answer: str, expected: str, pattern: str) -> bool:
    """Whether an answer holds the pattern, and the pattern's group, if any, what is expected."""
    match = re.search(pattern, answer)
    if match and match.re.groups:
        return (match[1] or "").strip() == expected
    return match is not None


def is_verified(answer: str, expected: str, _: str) -> bool:
    """What math-verify says of a mathematical answer."""
    from math_verify import parse, verify

    return bool(verify(parse(expected), parse(answer)))


@dataclass(frozen=True)
class Check:
    """How an answer is verified."""

    is_right: Callable[[str, str, str], bool]
    """Of the answer, what is expected, and the recipe's `pattern`."""
    compares: bool = True
    """Whether it needs something to compare with; a pattern does where it has a group."""
    package: str | None = None
    """What has to be installed for it."""

    def needs_reference(self, pattern: str | None) -> bool:
        return self.compares or bool(re.compile(pattern or "").groups)


VERIFIERS: dict[str, Check] = {
    "exact_match": Check(is_equal),
    "contains": Check(is_contained),
    "number": Check(has_number),
    "regex": Check(matches, compares=False),
    "json": Check(is_json, compares=False),
    "math_verify": Check(is_verified, package="math_verify"),
}


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(("rouge1", "rouge2", "rougeL"))


def pass_at(k: int, n: int, right: int) -> float:
    """Chance that at least one of k answers is right, given `right` of n.

    1 - C(n - c, k) / C(n, k) (Chen 2021, eq. 1).
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)
