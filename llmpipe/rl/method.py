"""What a method of learning from rewards is: `ppo` and `grpo` differ in this, and in nothing else.

The loop draws, scores and measures answers, the learner cuts them into minibatches and passes; the
method says which answers are wanted, what is learned from each, and what a pass adds to the
gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from llmpipe.models.drawing.draw import Episode
from llmpipe.models.hardware import Hardware
from llmpipe.parallel.world import World
from llmpipe.recipe.reinforcement import RLRecipe
from llmpipe.rl.actors import Actors
from llmpipe.rl.experience import Experience, Measured
from llmpipe.rl.sources.source import Row
from llmpipe.rl.watch import Metrics

R_co = TypeVar("R_co", bound=RLRecipe, covariant=True)


@dataclass(frozen=True)
class Ground(Generic[R_co]):
    """What a training stands on."""

    recipe: R_co
    actors: Actors
    hardware: Hardware
    world: World


@dataclass(frozen=True)
class Answer:
    """An answer of an update, with its scores."""

    place: int
    """In the update's batch, that of all processes; the answers to a prompt lie side by side."""
    row: Row
    episode: Episode
    response: str
    """As a person reads it."""
    score: float
    """The weighted sum."""
    by_source: dict[str, float]
    """Every source's own score, before its weight."""


def worths(answers: Sequence[Answer], recipe: RLRecipe) -> Tensor:
    """Scores with what their lengths cost, float32 [answers]: `unfinished`, and the soft penalty of
    `overlong` (DAPO, Yu 2025, eq. 13), from 0 to -1 over the last so many tokens."""
    rollout = recipe.rollout
    scores = torch.tensor([answer.score for answer in answers])
    ended = torch.tensor([float(answer.episode.ended) for answer in answers])
    scores = scores + rollout.unfinished * (1 - ended)
    if rollout.overlong:
        lengths = torch.tensor([float(len(answer.episode.response)) for answer in answers])
        over = lengths - (recipe.max_response - rollout.overlong)
        scores = scores - over.clamp(min=0) / rollout.overlong
    return scores


@dataclass(frozen=True)
class Batch:
    """This process's answers of an update."""

    answers: list[Answer]
    """That are measured and learned from, by their places."""
    drawn: list[Answer]
    """All, of which some may have been drawn in the place of others."""
    metrics: Metrics
    """What there is to say of drawing them, in all processes."""


Draw = Callable[[Sequence[int], int], list[Answer]]
"""Answers of this process to further prompts, one for each of these slots of the batch; also told
how many prompts of the update were asked before. Collective."""


@dataclass(frozen=True)
class Total:
    """Of a minibatch, in all processes."""

    tokens: float
    """Of its responses."""
    answers: float


class Method(Protocol):
    """PPO, or GRPO."""

    watched: tuple[str, ...]
    """What `learn` returns; those that begin with loss/ have to be finite."""

    def rollout(self, draw: Draw) -> Batch:
        """The answers of an update. Collective."""
        ...

    def judge(
        self, measured: Measured, answers: Sequence[Answer], worth: Tensor
    ) -> tuple[dict[int, Experience], Metrics]:
        """What is learned from each answer of this process, by its place, and what is worth
        watching in all processes; `worth` [answers]. Collective."""
        ...

    def learn(self, chosen: Sequence[Experience], total: Total) -> dict[str, Tensor]:
        """Add the gradients of one pass over answers of a minibatch; sums over their tokens, of
        losses so that by the minibatch's tokens they are its loss."""
        ...

    def loss(self, means: Metrics) -> float:
        """What is minimized, of the means over tokens that `watched` names."""
        ...
