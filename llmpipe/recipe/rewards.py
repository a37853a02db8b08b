"""Where the scores of answers come from, for `ppo`, `grpo` and `sample`: a section for each
source."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llmpipe.recipe.sections import Positive, Reference, Section, cosmetic
from llmpipe.scores.environments import NAME, Environment, library_of, opened
from llmpipe.scores.form import pattern_of
from llmpipe.scores.verifiers import VERIFIERS, Verifier
from llmpipe.scores.verifiers.regex import check_pattern
from llmpipe.secrets import is_secret_name


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


class Code(Section):
    """Programs, run."""

    seconds: Annotated[int, Field(ge=1, le=600)] = 5
    """Of the processor that an answer may take with its tests, and three times as many by the
    clock; what takes longer is ended, and counts as far as it came."""
    megabytes: Annotated[int, Field(ge=128, le=1 << 20)] = 512
    """Memory that it may take; where it asks for more, there is none."""


class JudgeModel(Section):
    """A model behind an address, which says what an answer is worth."""

    url: str = cosmetic(...)
    """Base address, `http://127.0.0.1:8000/v1`: `/chat/completions` below it is asked, as vLLM,
    llama.cpp and OpenAI have it, eight answers at a time."""
    model: str
    """What the server calls the model."""
    prompt: str
    """What it is asked. `{prompt}`, `{response}` and `{reference}` stand for what was asked, the
    answer, and the row's own; the last number of the reply is the score."""
    bounds: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    """`[1, 10]`: what a score has to lie between; another one is asked for again."""
    key_from: str | None = cosmetic(None)
    """The variable of the environment that holds the key: `JUDGE_API_KEY`. No recipe, no log and no
    artifact has the key itself."""
    timeout: Annotated[float, Field(gt=0, le=3600)] = cosmetic(60.0)
    """Seconds that a reply may take."""
    retries: Annotated[int, Field(ge=0, le=100)] = cosmetic(3)
    """Further tries where the server cannot be reached, is busy, or says no number; then training
    ends, to go on from its last checkpoint."""

    @model_validator(mode="after")
    def _can_be_asked(self) -> JudgeModel:
        if not re.fullmatch(r"https?://[^\s/?#]+[^\s?#]*", self.url):
            raise ValueError(f"url: '{self.url}' is not http://HOST/v1")
        if "{response}" not in self.prompt:
            raise ValueError(
                "prompt: holds no {response}, so that any answer would be judged alike"
            )
        if self.bounds and self.bounds[0] >= self.bounds[1]:
            raise ValueError(f"bounds: nothing lies between {self.bounds[0]} and {self.bounds[1]}")
        key = self.key_from
        if key is not None and not re.fullmatch(r"[A-Za-z_]\w*", key, re.ASCII):
            raise ValueError("key_from: is the name of a variable, such as JUDGE_API_KEY")
        if key is not None and not is_secret_name(key):
            raise ValueError(
                f"key_from: {key}: logs hide what is called a secret; "
                "name it so, such as JUDGE_API_KEY"
            )
        return self


QUESTIONS = 1000  # of an environment by name, where a recipe does not say how many
TURNS = 8  # of the policy in an episode, where a recipe does not say how many
FILE = r".+\.py:[A-Za-z_]\w*"  # a file and what it calls something
SOURCES = ("model", "function", "verifier", "format", "length", "code", "judge", "environment")


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
    code: Code | None = None
    """Runs an answer's last block of Python, or all of it, against the row's column `tests`, a text
    or a list of them; scores the share that raises nothing. What a model wrote is run only where a
    recipe has this, each answer in a process that the kernel lets compute and read, and no more: no
    other process, no network, no file written (Linux on x86-64 or arm64)."""
    judge: JudgeModel | None = None
    """Asks a model behind an address. It may answer otherwise when it is asked again, so that a
    training is no longer the same bit by bit."""
    environment: Annotated[str, Field(pattern=f"^({NAME}|{FILE})$")] | None = None
    """`reasoning_gym/chain_sum`: asks its own questions, in place of `data.train`, made with the
    recipe's seed, and scores answers itself: what stands in the last `<answer>...</answer>`, or all
    (`pip install 'llmpipe[rl]'`). `verifiers/NAME`: an installed taskset of the library verifiers,
    whose tasks ask once and are scored by the answer alone. `./game.py:Guess`: a class of yours
    that answers what the policy says, turn after turn, by `reset(row)` and `step(answer)`
    (llmpipe/rl/environment.py has their form); its rewards are added up. The file is part of the
    result's identity."""
    turns: Positive | None = None
    """How often the policy speaks in an episode of `./game.py:Guess`, at most; 8 unless set. Each
    turn has `rollout.max_new_tokens`. An episode that its environment has not ended by then, or
    that the model has no context left for, is unfinished."""
    questions: Positive | None = None
    """How many questions an environment by name asks; 1,000 unless set."""
    options: dict[str, Any] = {}
    """What an environment by name takes beside: `{min_terms: 2, max_terms: 3}`."""
    system: str | None = None
    """A system turn in front of each question of an environment by name, such as how to mark the
    answer."""
    weight: float = 1.0
    """What the source's score is multiplied by before scores are added."""

    @property
    def kind(self) -> str:
        """Which source it is: the name of its field."""
        return next(name for name in SOURCES if getattr(self, name) is not None)

    @property
    def tells_right(self) -> bool:
        """Whether its 1 says that an answer is right."""
        return any((self.verifier, self.code, self.environment))

    @property
    def asks(self) -> bool:
        """Whether it is an environment by name, which asks its own questions."""
        return self.environment is not None and not self.plays

    @property
    def plays(self) -> bool:
        """Whether it is an environment of the user's, which answers the policy's turns."""
        return self.environment is not None and ".py:" in self.environment

    def opened(self, seed: int) -> Environment:
        """Its environment by name. Raises UserError."""
        assert self.environment is not None
        return opened(self.environment, self.questions or QUESTIONS, seed, self.options)

    @model_validator(mode="after")
    def _one(self) -> Reward:
        if sum(getattr(self, name) is not None for name in SOURCES) != 1:
            raise ValueError(f"give one of {', '.join(SOURCES[:-1])} and {SOURCES[-1]}")
        if self.function is not None and not re.fullmatch(FILE, self.function):
            raise ValueError(f"function: '{self.function}' is not ./file.py:name")
        if (self.verifier == "regex") != (self.pattern is not None):
            raise ValueError("pattern is for verifier: regex, which needs it")
        check_pattern(self.pattern)
        if self.json_schema is not None and self.verifier != "json":
            raise ValueError("schema is for verifier: json")
        if not self.asks and (self.questions or self.options or self.system):
            raise ValueError("questions, options and system are for an environment by name")
        if not self.plays and self.turns:
            raise ValueError("turns are for an environment of a file, ./file.py:Name")
        if {"size", "seed"} & self.options.keys():
            raise ValueError("options: size is `questions`, and seed is the recipe's")
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
        if self.asks:
            yield "environment", library_of(str(self.environment))

    def files(self) -> Iterator[tuple[str, str]]:
        """Its fields that name a file whose content decides the result, each with the path."""
        if self.function is not None:
            yield "function", self.function.rpartition(":")[0]
        if self.environment is not None and self.plays:
            yield "environment", self.environment.rpartition(":")[0]
        if self.json_schema is not None:
            yield "schema", self.json_schema
