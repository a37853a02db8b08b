"""`llmpipe ppo`: proximal policy optimization (Schulman 2017) of a language model (Ziegler 2019;
Ouyang 2022).

Inputs: a policy, mostly what `sft` or `lora` made, prompts, and one or several rewards. Makes: a
`model`, or an adapter. Every update draws answers, scores them, and learns from them for a few
epochs, held to the parent by a KL penalty.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from llmpipe.errors import Mistake, UserError
from llmpipe.files import expanded
from llmpipe.recipe.functions import check_function
from llmpipe.recipe.reinforcement import PPORecipe
from llmpipe.recipe.sections import Rows
from llmpipe.scores.references import Comparison
from llmpipe.scores.verifiers import VERIFIERS
from llmpipe.stages import CHECKPOINTS

if TYPE_CHECKING:  # they read the whole of a run, which checking a recipe does not need
    from llmpipe.data.prepared import PreparedRows
    from llmpipe.run.job import Job
    from llmpipe.run.made import Made
    from llmpipe.run.outlook import Outlook

ACCEPTS = {"model": ("model", "adapter"), "reward": ("reward-model",)}
MAKES = "model"  # or an adapter, with `adapter:`
PROGRESS = CHECKPOINTS


class Schema(PPORecipe):
    stage: Literal["ppo"] = "ppo"
    """Proximal policy optimization."""

    @model_validator(mode="after")
    def _possible(self) -> Schema:
        if self.adapter and self.adapter.rewrites:
            raise ValueError(
                f"adapter.init: {self.adapter.init} rewrites the model, which is the reference"
            )
        if self.evaluation.keep_best or self.evaluation.patience:
            raise ValueError(
                "evaluation.keep_best and patience: "
                "a score that rises is no sign that the policy got better"
            )
        batch_size, minibatches = self.optim.batch_size, self.algorithm.minibatches
        if batch_size % minibatches:
            raise ValueError(
                f"optim.batch_size ({batch_size}) must be a multiple of "
                f"algorithm.minibatches ({minibatches})"
            )
        if self.critic.start == "reward" and not any(source.model for source in self.reward):
            raise ValueError("critic.start: reward: there is no reward model")
        if self.quantization and self.quantization.bits == 8:
            raise ValueError(
                "quantization.bits: 8 bits make an answer depend on those beside it; ppo takes 4"
            )
        if self.critic.start == "reward" and self.adapter:
            raise ValueError("critic.start: reward: with an adapter the critic is one, too")
        if self.adapter and self.adapter.embeddings == "all":
            raise ValueError("adapter.embeddings: ppo trains no embeddings")
        return self

    @model_validator(mode="after")
    def _vllm_can(self) -> Schema:
        if self.rollout.engine != "vllm":
            return self
        if self.rollout.is_partial:
            raise ValueError(
                "rollout.engine: vllm does not say which tokens top_k and top_p left to draw from, "
                "and what is learned would be of another distribution: "
                "take top_k 0 and top_p 1, or the engine local"
            )
        if self.quantization:
            raise ValueError(
                "rollout.engine: vllm is given merged weights, and those of a quantized model "
                "would be rounded anew at each update: take the engine local"
            )
        if self.launch.processes not in ("auto", 1):
            raise ValueError(
                f"rollout.engine: vllm draws in one process, and launch.processes is "
                f"{self.launch.processes}"
            )
        return self

    @property
    def longest(self) -> int:
        answered = self.data.max_length + self.rollout.max_new_tokens
        return max(answered, self.mixture.max_length if self.mixture else 0)

    @property
    def packs(self) -> bool:
        return True

    def rows(self) -> dict[str, Rows]:
        mixed = self.mixture.train if self.mixture else []
        return super().rows() | {f"mixture.train.{i}": source for i, source in enumerate(mixed)}

    def references(self) -> dict[str, str]:
        named = {f"reward.{i}.model": source.model for i, source in enumerate(self.reward)}
        return super().references() | {at: name for at, name in named.items() if name}

    def packages(self) -> list[tuple[str, str]]:
        named = super().packages()
        for i, source in enumerate(self.reward):
            package = VERIFIERS[source.verifier].package if source.verifier else None
            named += [(f"reward.{i}.verifier", package)] if package else []
        if self.rollout.engine == "vllm":
            named.append(("rollout.engine", "vllm"))
        return named

    def files(self) -> dict[str, str]:
        named = {f"reward.{i}.function": source.function for i, source in enumerate(self.reward)}
        return super().files() | {at: name.rpartition(":")[0] for at, name in named.items() if name}


def foresee(recipe: Schema, outlook: Outlook) -> Iterator[Mistake]:
    """What is wrong with the functions that score answers, as far as their files tell."""
    for i, source in enumerate(recipe.reward):
        path, _, name = (source.function or "").rpartition(":")
        if not os.path.exists(expanded(path)) or not path:
            continue  # which is said of the file
        try:
            check_function(expanded(path), name, ("prompts", "completions", "reference"))
        except UserError as error:
            problem = UserError(f"{source.function}: {error.message}", error.hint)
            yield Mistake(f"reward.{i}.function", problem)


def shapes(recipe: Schema) -> dict[str, tuple[type, ...]]:
    from llmpipe.data.kinds.prompts import PROMPTS
    from llmpipe.data.kinds.rows import ROWS

    return {
        field: ROWS.shapes if field.startswith("mixture") else PROMPTS.shapes
        for field in recipe.rows()
    }


def prepare(job: Job[Schema]) -> PreparedRows:
    """Prompts -> tokens."""
    from llmpipe.data.kinds.prompts import compared
    from llmpipe.data.kinds.rows import ROWS
    from llmpipe.run.context import of_folder, refuse_rollouts
    from llmpipe.run.handoff import tokenized, tokens

    recipe = job.recipe
    comparisons = [
        Comparison(source.verifier, source.pattern) for source in recipe.reward if source.verifier
    ]
    by_verifiers_alone = len(comparisons) == len(recipe.reward)
    prepared = tokens(job, compared(comparisons, all_read=by_verifiers_alone))
    if context := of_folder(job.weights):  # with the held-out ones, too, once a model is there
        refuse_rollouts(context.tokens, prepared.lengths.max, recipe.rollout.max_new_tokens)
    if recipe.mixture:
        mixed = tokenized(job, recipe.mixture.data(recipe.data), ROWS)
        prepared = prepared.model_copy(update={"mixture": mixed})
    return prepared


def train(job: Job[Schema], prepared: PreparedRows) -> Made:
    """Train, publish `model/` and return what the manifest says of it."""
    from llmpipe.rl import ppo

    return ppo.train(job, prepared)
