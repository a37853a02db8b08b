"""Environments by name: they ask, and say what an answer is worth.

`reasoning_gym/NAME` is a data set of the library reasoning-gym (Stojanovski 2025): its questions
are made by a program, so that a seed and a number tell which one is meant. `verifiers/NAME` is a
taskset of the library verifiers (Brown 2025) that is installed; see `tasksets`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from llmpipe.errors import UserError, first_line, near
from llmpipe.scores import tasksets

GYM = "reasoning_gym"
LIBRARIES = (GYM, tasksets.PACKAGE)
NAME = rf"(?:{'|'.join(LIBRARIES)})/[A-Za-z0-9_.-]+"
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)

Question = str | list[dict[str, str]]
"""What is asked: a text, or turns, of which the last one is the user's."""


class Environment(Protocol):
    """One that asks single questions."""

    @property
    def name(self) -> str: ...

    def questions(self) -> Iterator[Question]:
        """All of them, in their order."""
        ...

    def score(self, number: int, asked: str, answer: str) -> float:
        """What an answer to a question is worth, by the environment. `asked`: the text of its last
        turn. Raises UserError (3) where the question is another one than was asked."""
        ...


def library_of(name: str) -> str:
    """The package that an environment by name is of."""
    return name.partition("/")[0]


def opened(name: str, questions: int, seed: int, options: Mapping[str, Any]) -> Environment:
    """An environment with so many questions of a seed, at most. Raises UserError for a name or an
    option that it does not know."""
    if library_of(name) == tasksets.PACKAGE:
        return tasksets.opened(name, questions, seed, options)
    return _gym(name, questions, seed, options)


@dataclass(frozen=True)
class Gym:
    """A data set of reasoning-gym."""

    name: str
    dataset: Any

    def questions(self) -> Iterator[str]:
        for number in range(len(self.dataset)):
            yield self.dataset[number]["question"]

    def score(self, number: int, asked: str, answer: str) -> float:
        """By the data set: what stands in an answer's last `<answer>...</answer>`, or all of it."""
        entry = self.dataset[number]
        tasksets.refuse_another(self.name, entry["question"], asked)
        tagged = _TAGGED.findall(answer)
        return float(self.dataset.score_answer((tagged[-1] if tagged else answer).strip(), entry))


def _gym(name: str, questions: int, seed: int, options: Mapping[str, Any]) -> Gym:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    short = name.removeprefix(f"{GYM}/")
    if short not in DATASETS:
        raise UserError(f"{name}: there is no such environment{near(short, DATASETS)}")
    try:
        dataset = reasoning_gym.create_dataset(short, size=questions, seed=seed, **options)
    except Exception as error:  # a TypeError of a name, an AssertionError of a value, and others
        raise UserError(f"{name}: options: {first_line(error)}") from None
    return Gym(name, dataset)
