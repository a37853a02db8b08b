"""What a text tells, alone or with its row: verifiers, forms, lengths, programs, judges,
environments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe.data.asked import NUMBER
from llmpipe.data.references import COLUMN
from llmpipe.files.paths import expanded
from llmpipe.recipe.rewards import AnswerLength, Code, JudgeModel
from llmpipe.rl.sources.source import Row, Score
from llmpipe.scores import score
from llmpipe.scores.confined import Limits, shares_passed
from llmpipe.scores.environments import Environment
from llmpipe.scores.form import has_form, pattern_of
from llmpipe.scores.judge import Judge, in_words, key_of
from llmpipe.scores.lengths import near_target, within_limit
from llmpipe.scores.schemas import schema_check
from llmpipe.scores.verifiers import Verifier


def of_verifier(kind: Verifier, pattern: str | None) -> Score:
    """1 for a response that is right by one of the row's answers, else 0.

    Rows are prepared with the verifiers of the recipe: see `llmpipe.data.references`.
    """

    def scores(rows: list[Row], responses: list[str]) -> list[float]:
        pairs = zip(rows, responses, strict=True)
        return [score(kind, response, row["right"], pattern)[kind] for row, response in pairs]

    return scores


def of_schema(path: str) -> Score:
    """1 for a response that is JSON as the schema of a file allows it, else 0."""
    return _each(schema_check(expanded(path)))


def of_form(form: str) -> Score:
    """1 for a response that has the form, else 0."""
    return _each(partial(has_form, pattern_of(form)))


def of_length(length: AnswerLength, tokenizer: Tokenizer) -> Score:
    """How near a response's length is to what is asked."""

    def count(response: str) -> int:
        if length.unit == "characters":
            return len(response)
        return len(tokenizer(response, add_special_tokens=False)["input_ids"])

    def scored(response: str) -> float:
        if length.target is not None:
            return near_target(count(response), length.target)
        assert length.limit is not None  # the recipe has one of the two
        return within_limit(count(response), length.limit)

    return _each(scored)


def of_code(code: Code) -> Score:
    """The share of the row's tests that a response passes as a program."""
    limits = Limits(code.seconds, code.megabytes)

    def scores(rows: list[Row], responses: list[str]) -> list[float]:
        return shares_passed(responses, [row["tests"] for row in rows], limits)

    return scores


def of_judge(section: JudgeModel) -> Score:
    """What a model behind an address says."""
    judge = Judge(
        section.url,
        section.model,
        section.prompt,
        key_of(section.key_from),
        (section.bounds[0], section.bounds[1]) if section.bounds else None,
        section.timeout,
        section.retries,
    )

    def scores(rows: list[Row], responses: list[str]) -> list[float]:
        questions = [
            {
                "prompt": in_words(row["prompt"]),
                "response": response,
                "reference": row["reference"] or str(row["columns"].get(COLUMN) or ""),
            }
            for row, response in zip(rows, responses, strict=True)
        ]
        return judge.scores(questions)

    return scores


def of_environment(environment: Environment) -> Score:
    """What the environment says of answers to its questions."""

    def scores(rows: list[Row], responses: list[str]) -> list[float]:
        return [
            environment.score(row["columns"][NUMBER], _question(row["prompt"]), response)
            for row, response in zip(rows, responses, strict=True)
        ]

    return scores


def of_turns() -> Score:
    """What an environment of turns gave while the answers were drawn; see `llmpipe.rl.turns`."""

    def scores(rows: list[Row], responses: list[str]) -> list[float]:
        return [row["earned"] for row in rows]

    return scores


def _question(prompt: str | list[dict[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _each(scored: Callable[[str], float]) -> Score:
    """The score of each response, whatever was asked."""

    def scores(rows: list[Row], responses: list[str]) -> list[float]:
        return [float(scored(response)) for response in responses]

    return scores
