"""Where the scores of answers come from, for `ppo` and `grpo`: a section for each source."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from llmpipe.recipe.sections import Positive, Reference, Section
from llmpipe.scores.form import pattern_of
from llmpipe.scores.verifiers import VERIFIERS, Verifier
from llmpipe.scores.verifiers.regex import check_pattern


class AnswerLength(Section):
    """How long an answer should be: give one of `target` and `limit`."""

    unit: Literal["tokens", "characters"] = "tokens"
    """What is counted: tokens, as the policy's tokenizer reads the answer's text, or characters."""
    target: Positive | None = None
    """Scores 1 there, and less by the share of it that is missing or too much, down to 0."""
    limit: Positive | None = None
    """Scores 1 up to there, and less by the share of it that is too much, down to 0."""

    @model_validator(mode="after")
    def _one(self) -> AnswerLength:
        if (self.target is None) == (self.limit is None):
            raise ValueError("give one of target and limit")
        return self


SOURCES = ("model", "function", "verifier", "format", "length")


class Reward(Section):
    """One source of reward."""

    model: Reference | None = None
    """A reward model: `artifact:reward`, a folder or a Hub id. It reads the text through its own
    tokenizer and template."""
    function: str | None = None
    """`./rewards.py:name`: called with lists `prompts`, `completions`, `reference` (the answer that
    a row has, or None) and every column that is none of the format's, as keywords; returns a number
    for each. The file is part of the result's identity."""
    verifier: Verifier | None = None
    """1 for an answer that is right by the row's own, or its column `answer`, else 0. Of a list any
    is right; a row whose answer nothing can equal is rejected. exact_match, contains, json;
    number: what it says, exactly (llmpipe/scores/numbers.py has what a number is); math_verify."""
    pattern: str | None = None
    """The regular expression of `verifier: regex`, whose first match in an answer counts; with
    groups, what the first that took part holds is compared."""
    json_schema: str | None = Field(default=None, alias="schema")
    """`./schema.json`: the JSON Schema that an answer has to fit beside `verifier: json`. It refers
    to nothing outside itself. Part of the result's identity."""
    format: str | None = None
    """The form of an answer, `<think>...</think> <answer>...</answer>`: 1 for one that has it, else
    0. `...` stands for any text that is not empty and holds none of the tags; white space around
    these is free. With `rollout.think` the opening tag of the prompt is part of the answer."""
    length: AnswerLength | None = None
    """A score for the length of an answer."""
    weight: float = 1.0
    """What the source's score is multiplied by before scores are added."""

    @property
    def kind(self) -> str:
        """Which source it is: the name of its field."""
        return next(name for name in SOURCES if getattr(self, name) is not None)

    @property
    def tells_right(self) -> bool:
        """Whether its 1 says that an answer is right."""
        return self.verifier is not None

    @model_validator(mode="after")
    def _one(self) -> Reward:
        if sum(getattr(self, name) is not None for name in SOURCES) != 1:
            raise ValueError(f"give one of {', '.join(SOURCES[:-1])} and {SOURCES[-1]}")
        if self.function is not None and not re.fullmatch(r".+\.py:[A-Za-z_]\w*", self.function):
            raise ValueError(f"function: '{self.function}' is not ./file.py:name")
        if (self.verifier == "regex") != (self.pattern is not None):
            raise ValueError("pattern is for verifier: regex, which needs it")
        check_pattern(self.pattern)
        if self.json_schema is not None and self.verifier != "json":
            raise ValueError("schema is for verifier: json")
        if self.format is not None:
            pattern_of(self.format)
        return self

    def packages(self) -> Iterator[tuple[str, str]]:
        """Its fields that need a module which may be missing, each with that."""
        package = VERIFIERS[self.verifier].package if self.verifier else None
        if package:
            yield "verifier", package
        if self.json_schema is not None:
            yield "schema", "jsonschema"

    def files(self) -> Iterator[tuple[str, str]]:
        """Its fields that name a file whose content decides the result, each with the path."""
        if self.function is not None:
            yield "function", self.function.rpartition(":")[0]
        if self.json_schema is not None:
            yield "schema", self.json_schema
