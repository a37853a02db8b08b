"""Reward models.

One sees the text that a person would: the conversation is rendered with its own template and read
through its own tokenizer. Tokens are never passed from one model to another.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from llmpipe.data.formats import Rejected
from llmpipe.errors import UserError
from llmpipe.evaluation.candidate import Candidate
from llmpipe.models.hardware import Hardware
from llmpipe.models.load import load_any
from llmpipe.models.pretrained import load_tokenizer
from llmpipe.recipe.reinforcement import RLRecipe, Scored
from llmpipe.rl.actors import Actors
from llmpipe.rl.passes import PassSize
from llmpipe.rl.shared_reward import SharedRanker, shared_ranker
from llmpipe.rl.sources.source import Row, Score, shortened
from llmpipe.run.artifact import template_kwargs
from llmpipe.run.context import tokens_of
from llmpipe.run.job import Job
from llmpipe.run.machine import full_pass


def of_model(
    job: Job[Scored], i: int, name: str, hardware: Hardware, actors: Actors
) -> tuple[Score, Any]:
    """The reward model that the recipe has as its source `i`, and what its weights lie in."""
    at = f"reward.{i}.model"
    folder = job.models[at]
    tokenizer = load_tokenizer(folder)
    model: Any = shared_ranker(actors, job, at, tokenizer)
    if model:
        job.say(f"reward: {name} is one more adapter on the policy's base")
    else:
        base = job.bases.get(at)
        if base and hardware.sharded:
            problem = (
                f"launch.strategy: fsdp: {at}: {name} is an adapter, and not on the policy's base"
            )
            raise UserError(problem, "merge it (adapter.merge: true) and take NAME-merged")
        model = load_any(folder, base, tokenizer, bf16=hardware.bf16, spread=hardware.spread)
    full = _full_pass(job.recipe, hardware)
    ranker = Candidate(
        label=name,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        ranks=True,
        kwargs=template_kwargs(folder),
        batch_size=_most(job.recipe, hardware, full),
        say=job.say,
    )
    longest = tokens_of(model.config.to_dict()) or math.inf

    def scores(rows: list[Row], responses: list[str]) -> list[float]:
        texts = [_as_read(ranker, *pair) for pair in zip(rows, responses, strict=True)]
        too_long = next((len(text) for text in texts if len(text) > longest), None)
        if too_long:
            raise UserError(
                f"reward: {name} takes {longest:,} tokens, "
                f"and a prompt with its answer has {too_long:,}",
                "lower data.max_length or rollout.max_new_tokens",
            )
        with torch.autocast(model.device.type, enabled=False):
            return ranker.rewards(texts, full)

    return scores, model.actors.causal if isinstance(model, SharedRanker) else model


def _full_pass(recipe: Scored, hardware: Hardware) -> int | None:
    """Tokens that a GPU is filled by, those of like length together; None on a CPU."""
    if hardware.device != "cuda":
        return None
    if isinstance(recipe, RLRecipe):
        return PassSize.of(recipe.launch, hardware).tokens
    return full_pass(on_gpu=True)


def _most(recipe: Scored, hardware: Hardware, full: int | None) -> int:
    """Texts that are read at once at most."""
    if full is None or not isinstance(recipe, RLRecipe):
        return hardware.micro_batch_size
    return recipe.optim.batch_size


def _as_read(ranker: Candidate, row: Row, response: str) -> list[int]:
    """Token ids of a prompt and a response to it, as a reward model reads them."""
    turns = [{"role": "assistant", "content": response}]
    answer = response if isinstance(row["prompt"], str) else turns
    try:
        tools = row.get("tools")
        return ranker.encoder.answered(row["prompt"], answer, tools, proven=False).ids
    except Rejected as error:
        problem = f"reward: {ranker.label}: {error}: {shortened(row['prompt'])!r}"
        raise UserError(problem) from None
