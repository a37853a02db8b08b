"""Scores of one answer, and of several answers to one prompt."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from typing import Any

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
    if kind == "exact_match":
        right = answer.strip() == expected
    elif kind == "contains":
        right = expected in answer
    elif kind == "json":
        right = is_json(answer)
    elif kind == "number":
        number = number_in(expected)
        right = number is not None and number_in(answer) == number
    elif kind == "regex":
        right = matches(pattern or "", answer, expected)
    else:
        from math_verify import parse, verify

        right = verify(parse(expected), parse(answer))
    return {kind: float(right)}


def number_in(text: str) -> float | None:
    """The last number of a text; thousands may be set apart by commas."""
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def is_json(text: str) -> bool:
    """Whether an answer is JSON, also in a fenced block."""
    fenced = _FENCED.fullmatch(text)
    try:
        json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return True


def matches(pattern: str, answer: str, expected: str) -> bool:
    """Whether an answer holds the pattern, and the pattern's group, if any, what is expected."""
    match = re.search(pattern, answer)
    if match and match.re.groups:
        return (match[1] or "").strip() == expected
    return match is not None


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(("rouge1", "rouge2", "rougeL"))


def pass_at(k: int, n: int, right: int) -> float:
    """Chance that at least one of k answers is right, given `right` of n.

    1 - C(n - c, k) / C(n, k) (Chen 2021, eq. 1).
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)
