"""Scores of one answer, and of several to one prompt: of `eval`, and of verifiers as rewards.

verifiers/   right or wrong, a file each
numbers      what a number is, and which one a text says
overlap      words that an answer shares with its reference
references   what an answer is compared with, and what nothing can equal

A new verifier is a file of `verifiers/`.
"""

from __future__ import annotations

import math

from llmpipe.scores.overlap import rouge
from llmpipe.scores.verifiers import VERIFIERS

VERSION = 3
"""Of what scores mean: lines of an evaluation that was begun under another one are not gone on
from."""


def score(
    kind: str, answer: str, references: list[str], pattern: str | None = None
) -> dict[str, float]:
    """The scores of one answer under one heading of `score:`; rouge has three.

    `references`: any of them is right, and none are given where the kind compares nothing.
    """
    if kind == "rouge":
        return rouge(answer, references)
    is_right = VERIFIERS[kind].is_right
    compared = references or [""]
    return {kind: float(any(is_right(answer, one, pattern or "") for one in compared))}


def pass_at(k: int, n: int, right: int) -> float:
    """Chance that at least one of k answers is right, given `right` of n.

    1 - C(n - c, k) / C(n, k) (Chen 2021, eq. 1).
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)
