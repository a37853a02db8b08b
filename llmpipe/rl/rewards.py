"""Scores of responses: from reward models, Python functions and verifiers, weighted and added.

A reward model sees the text that a person would: the conversation is rendered with its own template
and read through its own tokenizer. Tokens are never passed from one model to another.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmpipe.data.formats import Rejected
from llmpipe.data.prepared import PreparedRows
from llmpipe.errors import DATA, NUMERIC, UserError
from llmpipe.evaluation.candidate import Candidate
from llmpipe.files import expanded
from llmpipe.models.hardware import Hardware
from llmpipe.models.load import load_any
from llmpipe.models.pretrained import load_tokenizer
from llmpipe.parallel import World, gathered
from llmpipe.recipe.places import portable
from llmpipe.recipe.reinforcement import RLRecipe
from llmpipe.rl.actors import Actors
from llmpipe.rl.passes import PassSize
from llmpipe.rl.shared_reward import SharedRanker, shared_ranker
from llmpipe.run.artifact import template_kwargs
from llmpipe.run.context import tokens_of
from llmpipe.run.job import Job
from llmpipe.scores import score
from llmpipe.scores.verifiers import Verifier

Row = dict[str, Any]  # a prompt as the kind of data `prompts` has it
Score = Callable[[list[Row], list[str]], list[Any]]  # a number for each response, if all is well


@dataclass(frozen=True)
class Source:
    """One source of reward."""

    name: str
    weight: float
    score: Score
    model: Any = None
    """What its weights lie in, of a reward model."""


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
        self, job: Job[RLRecipe], hardware: Hardware, actors: Actors, prepared: PreparedRows
    ):
        columns = {name for source in prepared.sources for name in source.kept_columns}
        self.sources: list[Source] = []
        for i, section in enumerate(job.recipe.reward):
            model = None
            if section.model:
                name = job.plan.models[f"reward.{i}.model"].reference
                call, model = _of_model(job, i, name, hardware, actors)
            elif section.function:
                name = portable(section.function)
                call = _of_function(section.function, columns)
            else:
                assert section.verifier  # the recipe names one of the three
                name, call = section.verifier, _of_verifier(section.verifier, section.pattern)
            if any(name == source.name for source in self.sources):
                name += f" ({i + 1})"
            self.sources.append(Source(name, section.weight, call, model))

    def summed(self, scores: dict[str, list[float]], count: int) -> Scores:
        """What `count` responses are worth, by every source's scores."""
        by_source = {source.name: scores[source.name] for source in self.sources}
        total = [0.0] * count
        for source in self.sources:
            weighted = zip(total, by_source[source.name], strict=True)
            total = [so_far + source.weight * value for so_far, value in weighted]
        return Scores(total, by_source)


def scored_together(
    rewards: Rewards, rows: list[Row], responses: list[str], world: World
) -> Scores:
    """Scores of this process's responses. Raises UserError in all processes, since none may wait
    for another, when a source of one fails, gives another number of scores (2), or one that is not
    finite (4).

    A reward model that is in parts is whole while it scores, one after the other; functions come
    last, since the next model's weights would wait for them.
    """
    scores: dict[str, list[float]] = {}
    error = None
    for source in sorted(rewards.sources, key=lambda source: source.model is None):
        with gathered(source.model) if source.model is not None else nullcontext():
            try:
                if rows and error is None:
                    scores[source.name] = _checked(source, rows, responses)
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
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(
                f"reward: {source.name} gave {value!r} "
                f"for {_shortened(response)!r} to {_shortened(row['prompt'])!r}",
                code=NUMERIC if isinstance(value, float) else DATA,
            )
    return [float(value) for value in scores]


def _shortened(text: str | list[dict[str, Any]]) -> str:
    """A text, or the last turn of a conversation, for a message."""
    words: str = text if isinstance(text, str) else text[-1]["content"]
    return words if len(words) <= 60 else words[:57] + "..."


# --- reward models ---


def _of_model(
    job: Job[RLRecipe], i: int, name: str, hardware: Hardware, actors: Actors
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
    # a GPU is filled by tokens, those of like length together
    full = PassSize.of(job.recipe.launch, hardware).tokens if hardware.device == "cuda" else None
    ranker = Candidate(
        label=name,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        ranks=True,
        kwargs=template_kwargs(folder),
        batch_size=hardware.micro_batch_size if full is None else job.recipe.optim.batch_size,
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


def _as_read(ranker: Candidate, row: Row, response: str) -> list[int]:
    """Token ids of a prompt and a response to it, as a reward model reads them."""
    turns = [{"role": "assistant", "content": response}]
    answer = response if isinstance(row["prompt"], str) else turns
    try:
        tools = row.get("tools")
        return ranker.encoder.answered(row["prompt"], answer, tools, proven=False).ids
    except Rejected as error:
        problem = f"reward: {ranker.label}: {error}: {_shortened(row['prompt'])!r}"
        raise UserError(problem) from None


# --- functions ---


def _of_function(name: str, every: set[str]) -> Score:
    """A function of the user's file, `./file.py:name`, and the columns that any row has."""
    path, _, attribute = name.rpartition(":")
    function = _imported(name, path, attribute)

    def scores(rows: list[Row], responses: list[str]) -> list[Any]:
        columns = _columns(name, rows, every)
        prompts = [row["prompt"] for row in rows]
        try:
            values = function(prompts=prompts, completions=list(responses), **columns)
            return [value.item() if hasattr(value, "item") else value for value in values]
        except Exception as error:  # the user's: whatever it raises is named with its line
            raise UserError(f"reward: {name}: {_where(error, path)}") from error

    return scores


def _imported(name: str, path: str, attribute: str) -> Callable[..., Any]:
    """What the user's file calls `attribute`; it runs once, here."""
    file = expanded(path)
    module_name = f"llmpipe_rewards_{file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec and spec.loader  # the recipe takes only names that end in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as dataclasses expect
    try:
        spec.loader.exec_module(module)
        function: Callable[..., Any] = getattr(module, attribute)
    except Exception as error:  # the user's: whatever it raises is named with its line
        raise UserError(f"reward: {name}: {_where(error, path)}") from error
    return function


def _columns(name: str, rows: list[Row], every: set[str]) -> dict[str, list[Any]]:
    """What a function is given beside prompts and completions: a list for each column of any row,
    with None for the rows that have it not."""
    names = every.union(*(row["columns"] for row in rows))
    if taken := names & {"prompts", "completions"}:
        raise UserError(
            f"reward: {name}: the rows have a column '{taken.pop()}', a name that the call has",
            "rename it",
        )
    columns = {column: [row["columns"].get(column) for row in rows] for column in sorted(names)}
    if "reference" not in columns:
        columns["reference"] = [row["reference"] for row in rows]
    return columns


def _where(error: Exception, path: str) -> str:
    """An error of the user's file, with its line."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    name = Path(path).name
    lines = [frame.lineno for frame in frames if os.path.basename(frame.filename) == name]
    at = f"line {lines[-1]}: " if lines else ""
    text = str(error)
    return f"{at}{type(error).__name__}: {text.splitlines()[0] if text else ''}"


# --- verifiers ---


def _of_verifier(kind: Verifier, pattern: str | None) -> Score:
    """1 for a response that is right by one of the row's answers, else 0.

    Rows are prepared with the verifiers of the recipe: see `llmpipe.data.references`.
    """

    def scores(rows: list[Row], responses: list[str]) -> list[float]:
        pairs = zip(rows, responses, strict=True)
        return [score(kind, response, row["right"], pattern)[kind] for row, response in pairs]

    return scores
