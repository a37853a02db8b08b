"""What `sample` is asked for: prompts, rewards, how answers are drawn, and what is made of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmpipe.recipe.reinforcement import Drawn, Scored
from llmpipe.recipe.sections import Crowd, Machine, Positive, cosmetic


class Group(Drawn):
    """How answers are drawn."""

    group: Annotated[int, Field(ge=1, le=10_000)] = 8
    """Answers to each prompt. Each is drawn with random numbers of its own, of the recipe's seed,
    the prompt's place and its own number."""


class Machines(Machine):
    processes: Crowd | Literal["auto"] = "auto"
    """Processes that draw and score, each its share of the prompts, with the same answers as one
    alone; `auto` is one per GPU, and one on a CPU."""
    batch_size: Positive = 64
    """Answers drawn at once, and texts that a reward model reads at once."""


class SampleRecipe(Scored):
    """The stage adds its name and its inputs."""

    rollout: Group = Field(default_factory=Group)
    """Sampling."""
    write: Literal["pairs", "best", "accepted"] = "pairs"
    """What is made of the answers to a prompt. pairs: a preference, the best of them against the
    worst, for dpo, simpo, reward (on-policy DPO, Guo 2024); none where all score alike. best: the
    best of them as an answer to learn, for sft (best of n; rejection sampling, Touvron 2023; RAFT,
    Dong 2023). accepted: every different one that scores `at_least` so much, for sft (STaR,
    Zelikman 2022; RFT, Yuan 2023). What never ended, or is no text, has no part in it."""
    at_least: float | None = None
    """Least score of what is to be learned: of the better answer of a pair, of the best one, of
    every accepted one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the weights and the arithmetic; `auto` is bf16 where the hardware has it and fp32
    elsewhere."""
    launch: Machines = cosmetic(default_factory=Machines)
    """The machine: never part of the result's identity."""

    @property
    def format(self) -> str:
        """The format of the rows that it makes, as `data/formats` calls it."""
        return "preference" if self.write == "pairs" else "prompt-completion"

    @model_validator(mode="after")
    def _makes_something(self) -> SampleRecipe:
        if self.data.eval.holdout or self.data.eval.sources:
            raise ValueError("data.eval: every prompt is answered: leave it out, or use eval")
        if self.plays:
            raise ValueError(
                f"reward: {self.plays.environment} takes turns, and {self.stage} keeps one answer"
            )
        if self.write == "pairs" and self.rollout.group < 2:
            raise ValueError("rollout.group: a pair takes 2 answers")
        if self.write == "accepted" and self.at_least is None:
            raise ValueError("at_least: required by write: accepted")
        return self
