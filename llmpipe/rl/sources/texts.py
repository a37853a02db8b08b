"""What a text alone tells: verifiers, forms and lengths."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe.files import expanded
from llmpipe.recipe.rewards import AnswerLength
from llmpipe.rl.sources.source import Row, Score
from llmpipe.scores import score
from llmpipe.scores.form import has_form, pattern_of
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


def _each(scored: Callable[[str], float]) -> Score:
    """The score of each response, whatever was asked."""

    def scores(rows: list[Row], responses: list[str]) -> list[float]:
        return [float(scored(response)) for response in responses]

    return scores
