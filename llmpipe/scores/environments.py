"""Environments by name: they ask, and say what an answer is worth.

`reasoning_gym/NAME` is a data set of the library reasoning-gym (Stojanovski 2025): its questions
are made by a program, so that a seed and a number tell which one is meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmpipe.errors import INTEGRITY, UserError, first_line, near

PACKAGE = "reasoning_gym"
NAME = rf"{PACKAGE}/[a-z0-9_]+"
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True)
class Environment:
    """One that asks single questions."""

    name: str
    dataset: Any

    def questions(self) -> Iterator[str]:
        """All of them, in their order."""
        for number in range(len(self.dataset)):
            yield self.dataset[number]["question"]

    def score(self, number: int, asked: str, answer: str) -> float:
        """What an answer to a question is worth, by the environment: what stands in its last
        `<answer>...</answer>`, or all of it. Raises UserError (3) where the question is another
        one than was asked."""
        entry = self.dataset[number]
        if entry["question"] != asked:
            problem = f"{self.name}: asks otherwise than when its questions were prepared"
            raise UserError(
                problem, "install the version of then, or begin anew (--fresh)", INTEGRITY
            )
        tagged = _TAGGED.findall(answer)
        return float(self.dataset.score_answer((tagged[-1] if tagged else answer).strip(), entry))


def opened(name: str, questions: int, seed: int, options: Mapping[str, Any]) -> Environment:
    """An environment with so many questions of a seed. Raises UserError for a name or an option
    that it does not know."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    short = name.removeprefix(f"{PACKAGE}/")
    if short not in DATASETS:
        raise UserError(f"{name}: there is no such environment{near(short, DATASETS)}")
    try:
        dataset = reasoning_gym.create_dataset(short, size=questions, seed=seed, **options)
    except Exception as error:  # a TypeError of a name, an AssertionError of a value, and others
        raise UserError(f"{name}: options: {first_line(error)}") from None
    return Environment(name, dataset)
