"""Scores of one answer."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

_NUMBER = re.compile(r"(?<![\w.])-?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")


def number_in(text: str) -> float | None:
    """The last number of a text; thousands may be set apart by commas."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def is_json(text: str) -> bool:
    """Whether an answer is JSON, also in a fenced block."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)\n?```\s*", text, re.DOTALL)
    try:
        json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return True


def score(
    kind: str, answer: str, reference: str | None, pattern: str | None = None
) -> dict[str, float]:
    """The scores of one answer under one heading of `score:`; rouge has three."""
    wanted = (reference or "").strip()
    if kind == "exact_match":
        return {kind: float(answer.strip() == wanted)}
    if kind == "contains":
        return {kind: float(wanted in answer)}
    if kind == "json":
        return {kind: float(is_json(answer))}
    if kind == "number":
        right = number_in(wanted)
        return {kind: float(right is not None and number_in(answer) == right)}
    if kind == "regex":
        match = re.search(pattern or "", answer)
        if match and match.re.groups:
            return {kind: float((match[1] or "").strip() == wanted)}
        return {kind: float(bool(match))}
    if kind == "math_verify":
        from math_verify import parse, verify

        return {kind: float(verify(parse(wanted), parse(answer)))}
    names = ("rouge1", "rouge2", "rougeL")
    return {name: value.fmeasure for name, value in _rouge(names).score(wanted, answer).items()}


@cache
def _rouge(names: tuple[str, ...]) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(names)
