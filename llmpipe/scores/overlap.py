"""Scores of the words that an answer and its reference share, as their libraries have them."""

from __future__ import annotations

import re
from functools import cache
from typing import Any


def rouge(answer: str, references: list[str]) -> dict[str, float]:
    """The F-measures of rouge1, rouge2 and rougeL (Lin 2004), each of the best reference."""
    scores = _scorer().score_multi(references, answer)
    return {name: float(value.fmeasure) for name, value in scores.items()}


def no_rouge(reference: str) -> str | None:
    """Why nothing shares a word with a reference: the library's words are of a-z and 0-9."""
    if re.search("[a-z0-9]", reference.lower()):
        return None
    return "has no letter from a to z and no digit, and rouge reads nothing else"


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(("rouge1", "rouge2", "rougeL"))
