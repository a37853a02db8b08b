"""Scores of answers: from reward models, Python functions and verifiers, weighted and added.

A reward model sees the text that a person would: the conversation is rendered with its own template and read through
its own tokenizer. Tokens are never passed from one model to another.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmpipe.data.formats import Rejected
from llmpipe.errors import NUMERIC, UserError
from llmpipe.evaluation.candidate import Candidate, batched, encoder_of
from llmpipe.evaluation.scores import score
from llmpipe.models.hardware import Hardware
from llmpipe.models.load import load_any
from llmpipe.models.pretrained import load_tokenizer
from llmpipe.rl.actors import Actors, ranker
from llmpipe.run.artifact import template_kwargs

Scores = list[float]
Source = Callable[[list[dict], list[str]], Scores]


class Rewards:
    """Every source of a recipe's `reward`."""

    def __init__(self, job: Any, hardware: Hardware, actors: Actors):
        self.sources: list[tuple[str, float, Source]] = []
        for i, wanted in enumerate(job.recipe.reward):
            name = wanted.model or wanted.function or wanted.verifier
            if wanted.model:
                at = f"reward.{i}.model"
                folder = job.models[at]
                tokenizer = load_tokenizer(folder)
                shared = ranker(actors, job, at, tokenizer)
                model = shared or load_any(folder, job.bases.get(at), tokenizer, bf16=hardware.bf16)
                if shared:
                    job.say(f"reward: {name} is one more adapter on the policy's base")
                how = template_kwargs(folder), hardware.micro_batch_size
                source = _model(Candidate(name, folder, model, tokenizer, True, *how))
            elif wanted.function:
                source = _function(name)
            else:
                source = _verifier(wanted.verifier, wanted.pattern)
            name += f" ({i + 1})" if any(name == known for known, *_ in self.sources) else ""
            self.sources.append((name, wanted.weight, source))

    def __call__(self, rows: list[dict], answers: list[str]) -> tuple[Scores, dict[str, Scores]]:
        """The sum for each answer, and every source's own score. `rows`: as Encoder.prompt makes them. Raises UserError
        when a source fails, gives another number of scores (2), or one that is not finite (4)."""
        each, total = {}, [0.0] * len(answers)
        for name, weight, source in self.sources:
            found = source(rows, answers)
            if len(found) != len(answers):
                raise UserError(
                    f"reward: {name} gave {len(found)} scores for {len(answers)} answers"
                )
            for value, row, answer in zip(found, rows, answers, strict=True):
                if not isinstance(value, int | float) or not math.isfinite(value):
                    code = NUMERIC if isinstance(value, float) else 2
                    raise UserError(
                        f"reward: {name} gave {value!r} for {_cut(answer)!r} to {_cut(row['prompt'])!r}",
                        code=code,
                    )
            each[name] = [float(value) for value in found]
            total = [a + weight * b for a, b in zip(total, each[name], strict=True)]
        return total, each


def _cut(text: Any) -> str:
    text = text if isinstance(text, str) else text[-1]["content"]
    return text if len(text) <= 60 else text[:57] + "..."


def _model(ranker: Candidate) -> Source:
    name = ranker.label
    most = getattr(ranker.model.config, "max_position_embeddings", math.inf)

    def scores(rows: list[dict], answers: list[str]) -> Scores:
        ids = []
        for row, answer in zip(rows, answers, strict=True):
            said = (
                answer
                if isinstance(row["prompt"], str)
                else [{"role": "assistant", "content": answer}]
            )
            try:
                ids.append(encoder_of(ranker).answered(row["prompt"], said, row.get("tools")))
            except Rejected as error:
                raise UserError(f"reward: {name}: {error}: {_cut(row['prompt'])!r}") from None
            if len(ids[-1]) > most:
                problem = f"reward: {name} takes {most:,} tokens, and a prompt with its answer has {len(ids[-1]):,}"
                raise UserError(problem, "lower data.max_length or rollout.max_new_tokens")
        with torch.autocast(ranker.model.device.type, enabled=False):
            return batched(ranker.rewards, ids, ranker.batch_size)

    return scores


def _function(name: str) -> Source:
    path, _, attribute = name.rpartition(":")
    spec = importlib.util.spec_from_file_location(
        f"llmpipe_rewards_{Path(path).stem}", Path(path).expanduser()
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as dataclasses expect
    try:
        spec.loader.exec_module(module)
        called = getattr(module, attribute)
    except Exception as error:  # the file is the user's: whatever it raises is named with its line
        raise UserError(f"reward: {name}: {_where(error, path)}") from error

    def scores(rows: list[dict], answers: list[str]) -> Scores:
        columns = {key for row in rows for key in row["columns"]}
        if taken := columns & {"prompts", "completions"}:
            raise UserError(
                f"reward: {name}: the rows have a column '{taken.pop()}', a name that the call has",
                "rename it",
            )
        more = {key: [row["columns"].get(key) for row in rows] for key in sorted(columns)}
        more |= {"reference": [row["reference"] for row in rows]} if "reference" not in more else {}
        try:
            found = called(
                prompts=[row["prompt"] for row in rows], completions=list(answers), **more
            )
            return [value.item() if hasattr(value, "item") else value for value in found]
        except Exception as error:  # as above
            raise UserError(f"reward: {name}: {_where(error, path)}") from error

    return scores


def _where(error: Exception, path: str) -> str:
    """An error of the user's file, with its line."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}"
    lines = [
        f.lineno
        for f in traceback.extract_tb(error.__traceback__)
        if os.path.basename(f.filename) == Path(path).name
    ]
    at = f"line {lines[-1]}: " if lines else ""
    return f"{at}{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _verifier(kind: str, pattern: str | None) -> Source:
    needing = {"exact_match", "contains", "number", "math_verify"} | (
        {"regex"} if re.compile(pattern or "").groups else set()
    )

    def scores(rows: list[dict], answers: list[str]) -> Scores:
        found = []
        for row, answer in zip(rows, answers, strict=True):
            right = row["reference"] or row["columns"].get("answer")
            if kind in needing and not (right is not None and str(right).strip()):
                raise UserError(
                    f"reward: verifier {kind}: no right answer beside {_cut(row['prompt'])!r}",
                    "give the rows a column `answer`, or an answer as sft has it",
                )
            found.append(score(kind, answer, None if right is None else str(right), pattern)[kind])
        return found

    return scores
