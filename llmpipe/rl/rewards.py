"""Scores of responses, by every source of a recipe's `reward`, weighted and added."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe.data.prepared import PreparedRows
from llmpipe.errors import DATA, NUMERIC, UserError
from llmpipe.models.hardware import Hardware
from llmpipe.models.pretrained import load_tokenizer
from llmpipe.parallel.parts import gathered
from llmpipe.parallel.world import World
from llmpipe.recipe.places import portable
from llmpipe.recipe.reinforcement import Scored
from llmpipe.recipe.rewards import Reward
from llmpipe.rl.actors import Actors
from llmpipe.rl.sampling import Said
from llmpipe.rl.sources.functions import UserFiles, of_function
from llmpipe.rl.sources.models import of_model
from llmpipe.rl.sources.source import Row, Score, Source, is_score, shortened
from llmpipe.rl.sources.texts import (
    of_code,
    of_environment,
    of_form,
    of_judge,
    of_length,
    of_schema,
    of_turns,
    of_verifier,
)
from llmpipe.run.job import Job
from llmpipe.scores.thinking import OPENING, behind_thought


@dataclass(frozen=True)
class Scores:
    """What responses are worth."""

    total: list[float]
    """The weighted sum for each response."""
    by_source: dict[str, list[float]]
    """Every source's own score, before its weight."""


class Rewards:
    """Every source of a recipe's `reward`."""

    def __init__(
        self, job: Job[Scored], hardware: Hardware, actors: Actors, prepared: PreparedRows
    ):
        self.thinks = job.recipe.rollout.think
        self.sources: list[Source] = []
        self.files = UserFiles()
        tokenizer = load_tokenizer(prepared.folder(job.prepared) / "tokenizer")
        ground = _Ground(prepared, tokenizer, job.recipe.seed, self.files)
        for i, section in enumerate(job.recipe.reward):
            model = None
            if section.model:
                name = job.plan.models[f"reward.{i}.model"].reference
                call, model = of_model(job, i, name, hardware, actors)
            else:
                name, call = _of_section(section, ground)
            if any(name == source.name for source in self.sources):
                name += f" ({i + 1})"
            sees_thought = section.kind in ("format", "length")
            self.sources.append(Source(name, section.weight, call, model, sees_thought))

    def seen(self, source: Source, responses: list[str]) -> list[str]:
        """What a source looks at."""
        if not self.thinks:
            return responses
        if source.sees_thought:
            return [f"{OPENING}{response}" for response in responses]
        return [behind_thought(response) for response in responses]

    def summed(self, scores: dict[str, list[float]], count: int) -> Scores:
        """What `count` responses are worth, by every source's scores."""
        by_source = {source.name: scores[source.name] for source in self.sources}
        total = [0.0] * count
        for source in self.sources:
            weighted = zip(total, by_source[source.name], strict=True)
            total = [so_far + source.weight * value for so_far, value in weighted]
        return Scores(total, by_source)


@dataclass(frozen=True)
class _Ground:
    """What sources may need beside their section."""

    prepared: PreparedRows
    tokenizer: Tokenizer
    """The policy's."""
    seed: int
    files: UserFiles


def _of_section(section: Reward, ground: _Ground) -> tuple[str, Score]:
    """A source that is no model: what it is called, and how it scores."""
    if section.function:
        columns = {name for rows in ground.prepared.sources for name in rows.kept_columns}
        return portable(section.function), of_function(section.function, columns, ground.files)
    if section.format:
        return section.kind, of_form(section.format)
    if section.length:
        return section.kind, of_length(section.length, ground.tokenizer)
    if section.code:
        return section.kind, of_code(section.code)
    if section.environment and section.plays:
        return portable(section.environment), of_turns()
    if section.environment:
        return section.environment, of_environment(section.opened(ground.seed))
    if section.judge:
        return section.kind, of_judge(section.judge)
    assert section.verifier  # the recipe names one of them
    if section.json_schema:
        return section.verifier, of_schema(section.json_schema)
    return section.verifier, of_verifier(section.verifier, section.pattern)


def scored_together(rewards: Rewards, said: Sequence[Said], world: World) -> Scores:
    """Scores of what was said in this process. Raises UserError in all processes, since none may
    wait for another, when a source of one fails, gives another number of scores (2), or one that is
    not finite (4).

    A reward model that is in parts is whole while it scores, one after the other; functions come
    last, since the next model's weights would wait for them.
    """
    rows, responses = [each.row for each in said], [each.response for each in said]
    scores: dict[str, list[float]] = {}
    error = None
    for source in sorted(rewards.sources, key=lambda source: source.model is None):
        with gathered(source.model) if source.model is not None else nullcontext():
            try:
                if rows and error is None:
                    scores[source.name] = _checked(source, rows, rewards.seen(source, responses))
            except UserError as problem:
                error = problem
    world.agree(error)
    return rewards.summed(scores, len(rows)) if rows else Scores([], {})


def _checked(source: Source, rows: list[Row], responses: list[str]) -> list[float]:
    """What a source gives, where it is a finite number for each response."""
    scores = source.score(rows, responses)
    if len(scores) != len(responses):
        raise UserError(
            f"reward: {source.name} gave {len(scores)} scores for {len(responses)} answers"
        )
    for value, row, response in zip(scores, rows, responses, strict=True):
        if not is_score(value):
            raise UserError(
                f"reward: {source.name} gave {value!r} "
                f"for {shortened(response)!r} to {shortened(row['prompt'])!r}",
                code=NUMERIC if isinstance(value, float) else DATA,
            )
    return [float(value) for value in scores]
