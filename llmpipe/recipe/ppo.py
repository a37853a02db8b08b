"""What `ppo` has beside the sections of `reinforcement`: a critic, and what its values are for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmpipe.recipe.reinforcement import KL, Algorithm, RLRecipe
from llmpipe.recipe.sections import Positive, Section


class Penalty(KL):
    """The parent, which the policy is held to by a penalty in the reward."""

    estimator: Literal["k1", "k3"] = "k1"
    """k1: log p/q; k3: q/p - 1 + log p/q, never negative (Schulman 2020). As a reward only k1 pulls
    the policy along the gradient of KL(p || q); that of k3 is KL(p || q)'s less KL(q || p)'s, and
    near the parent nothing."""


class Critic(Section):
    """What predicts the return."""

    start: Literal["auto", "policy", "reward", "trunk"] = "auto"
    """What it begins with: the reward model's weights where their shape is the policy's (Ouyang
    2022), the policy's, or a head alone on the policy's own trunk. With `adapter:` it is an adapter
    of its own on the same base, which begins as the parent's where there is one, or the head.
    `auto`: reward where it fits, else policy."""
    rank: Positive = 8
    """Rank of its own adapter, where that is new."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Its own peak learning rate; optim.learning_rate unless set."""
    coefficient: Annotated[float, Field(gt=0)] = 0.1
    """Weight of its loss beside the policy's."""
    clip: Annotated[float, Field(gt=0)] | None = 0.2
    """How far a value may move from what it was at the rollout before its loss stops counting."""


class Estimation(Algorithm):
    """How an update learns from its answers, by what the critic had expected."""

    discount: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Gamma: how much a reward one token later is worth."""
    smoothing: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Lambda of the generalized advantage estimate (Schulman 2016)."""
    whiten: bool = True
    """Bring advantages to mean 0 and deviation 1 over the whole batch."""
    normalize_scores: bool = False
    """Divide scores by their running deviation, less their running mean."""
    clip_scores: Annotated[float, Field(gt=0)] | None = None
    """Keep scores within plus and minus this."""


class PPORecipe(RLRecipe):
    """The stage adds its name and its inputs."""

    reference: Penalty = Field(default_factory=Penalty)
    """How the policy is held to its parent."""
    critic: Critic = Field(default_factory=Critic)
    """The value function."""
    algorithm: Estimation = Field(default_factory=Estimation)
    """How an update learns from them."""

    @model_validator(mode="after")
    def _critic_can(self) -> PPORecipe:
        if self.critic.start != "reward":
            return self
        if not any(source.model for source in self.reward):
            raise ValueError("critic.start: reward: there is no reward model")
        if self.adapter:
            raise ValueError("critic.start: reward: with an adapter the critic is one, too")
        return self
