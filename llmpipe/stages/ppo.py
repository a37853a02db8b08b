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

from llmpipe.errors import Mistake, UserError
from llmpipe.files import expanded
from llmpipe.recipe.functions import check_function
from llmpipe.recipe.ppo import PPORecipe
from llmpipe.recipe.reinforcement import RLRecipe
from llmpipe.scores.references import Comparison
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


def foresee(recipe: RLRecipe, outlook: Outlook) -> Iterator[Mistake]:
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


def shapes(recipe: RLRecipe) -> dict[str, tuple[type, ...]]:
    from llmpipe.data.kinds.prompts import PROMPTS
    from llmpipe.data.kinds.rows import ROWS

    return {
        field: ROWS.shapes if field.startswith("mixture") else PROMPTS.shapes
        for field in recipe.rows()
    }


def prepare(job: Job[RLRecipe]) -> PreparedRows:
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
