"""`llmpipe ppo`: proximal policy optimization (Schulman 2017) of a language model (Ziegler 2019;
Ouyang 2022).

Inputs: a policy, mostly what `sft` or `lora` made, prompts, and one or several rewards. Makes: a
`model`, or an adapter. Every update draws answers, scores them, and learns from them for a few
epochs, held to the parent by a KL penalty.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Literal

from llmpipe.errors import Mistake, UserError
from llmpipe.files.paths import expanded
from llmpipe.recipe.functions import check_environment, check_function
from llmpipe.recipe.ppo import PPORecipe
from llmpipe.recipe.reinforcement import RLRecipe, Scored
from llmpipe.recipe.rewards import Reward
from llmpipe.scores import confined
from llmpipe.scores.environments import library_of
from llmpipe.scores.judge import key_of
from llmpipe.scores.references import Comparison
from llmpipe.scores.schemas import schema_check
from llmpipe.stages import CHECKPOINTS

if TYPE_CHECKING:  # they read the whole of a run, which checking a recipe does not need
    from llmpipe.data.prepared import PreparedRows
    from llmpipe.run.handoff import Asked
    from llmpipe.run.job import Job
    from llmpipe.run.made import Made
    from llmpipe.run.outlook import Outlook

ACCEPTS = {"model": ("model", "adapter"), "reward": ("reward-model",)}
MAKES = "model"  # or an adapter, with `adapter:`
PROGRESS = CHECKPOINTS


class Schema(PPORecipe):
    stage: Literal["ppo"] = "ppo"
    """Proximal policy optimization."""


def foresee(recipe: Scored, outlook: Outlook) -> Iterator[Mistake]:
    """What is wrong with what scores answers, as far as files tell."""
    for i, source in enumerate(recipe.reward):
        for field, check in _checks(source, recipe.seed, outlook):
            try:
                check()
            except UserError as error:
                yield Mistake(f"reward.{i}.{field}", error)


def _checks(
    source: Reward, seed: int, outlook: Outlook
) -> Iterator[tuple[str, Callable[[], object]]]:
    """The fields of a source that can be looked at ahead, and what raises UserError for each."""
    for field, path in source.files():
        if os.path.exists(expanded(path)):  # or that is said of the file
            yield field, partial(_check_file, source, field, path)
    if source.code and outlook.works:
        yield "code", confined.prove
    if source.judge and outlook.works:
        yield "judge.key_from", partial(key_of, source.judge.key_from)
    asks = source.asks and library_of(str(source.environment))
    if asks and importlib.util.find_spec(asks):  # or that is said of the field
        yield "environment", partial(source.opened, seed)


def _check_file(source: Reward, field: str, path: str) -> None:
    """Raises UserError for a file that is not what a source needs."""
    named = source.function or source.environment
    if named and field in ("function", "environment"):
        name = named.rpartition(":")[2]
        try:
            if field == "function":
                check_function(expanded(path), name, ("prompts", "completions", "reference"))
            else:
                check_environment(expanded(path), name)
        except UserError as error:
            raise UserError(f"{named}: {error.message}", error.hint) from None
    elif importlib.util.find_spec("jsonschema"):  # what is missing is said of the field
        schema_check(expanded(path))


def shapes(recipe: Scored) -> dict[str, tuple[type, ...]]:
    from llmpipe.data.kinds.prompts import PROMPTS
    from llmpipe.data.kinds.rows import ROWS

    return {
        field: ROWS.shapes if field.startswith("mixture") else PROMPTS.shapes
        for field in recipe.rows()
    }


def prepare(job: Job[RLRecipe]) -> PreparedRows:
    """Prompts -> tokens, and rows that are mixed in."""
    from llmpipe.data.kinds.rows import ROWS
    from llmpipe.run.handoff import tokenized

    prepared = prompts(job)
    if job.recipe.mixture:
        mixed = tokenized(job, job.recipe.mixture.data(job.recipe.data), ROWS)
        prepared = prepared.model_copy(update={"mixture": mixed})
    return prepared


def prompts(job: Job[Scored]) -> PreparedRows:
    """Prompts -> tokens, with what the recipe's rewards read of their rows."""
    from llmpipe.data.encode import encoder_of, refuse_no_reply
    from llmpipe.data.kinds.prompts import Needs, compared
    from llmpipe.run.context import of_folder, refuse_rollouts
    from llmpipe.run.handoff import tokens

    recipe = job.recipe
    comparisons = [
        Comparison(source.verifier, source.pattern) for source in recipe.reward if source.verifier
    ]
    all_read = not any(source.model or source.function or source.plays for source in recipe.reward)
    needs = Needs(
        thinks=recipe.rollout.think,
        tests=any(source.code for source in recipe.reward),
        turns=recipe.plays is not None,
    )
    kind = compared(comparisons, all_read=all_read, needs=needs)
    prepared = tokens(job, kind, _asked(job) if recipe.asks else None)
    if recipe.plays:
        tokenizer = prepared.folder(job.prepared) / "tokenizer"
        refuse_no_reply(encoder_of(tokenizer, recipe.data.chat_template_kwargs))
    if context := of_folder(job.weights):  # with the held-out ones, too, once a model is there
        refuse_rollouts(context.tokens, prepared.lengths.max, recipe.rollout.max_new_tokens)
    return prepared


def _asked(job: Job[Scored]) -> Asked:
    """The questions of the recipe's environment."""
    from llmpipe.data.asked import as_source
    from llmpipe.data.template import template_source
    from llmpipe.run.handoff import Asked

    recipe = job.recipe
    assert recipe.asks
    environment = recipe.asks.opened(recipe.seed)
    chats = template_source(job.model, recipe.data.template) is not None
    source = as_source(environment, job.prepared, chats=chats, system=recipe.asks.system)
    return Asked(*source)


def train(job: Job[Schema], prepared: PreparedRows) -> Made:
    """Train, publish `model/` and return what the manifest says of it."""
    from llmpipe.rl import ppo

    return ppo.train(job, prepared)
