"""The probe: sixteen questions, and what a model makes of them; by it a model is known again,
whatever holds it.

Publishing asks the model in memory and leaves its answers in the manifest. Who loads the model
later, from other files, in another engine or behind a server, asks once more and holds the two
against one another: what the template makes of each conversation, its tokens, how likely the tokens
of a fixed continuation are, what is answered, and what ends an answer.

Nothing here imports torch; `llmpipe.export.ask` asks a model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmpipe.errors import INTEGRITY, UserError

ANSWER_TOKENS = 8
"""Tokens of an answer at most: it is drawn again by every reader."""

DATE = {"date_string": "26 Jul 2024"}
"""What a template takes for today that asks for it, or another one would be written tomorrow."""

DECIMALS = 5
"""Of the numbers that a manifest keeps: less than what rounding moves in fp32."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a model is asked, and a text that might follow it."""

    name: str
    messages: list[dict[str, Any]]
    """None of a text to go on with."""
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    """What to go on with, where there are no messages: no template touches it."""
    continuation: str


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a model made of a question."""

    question: Question
    text: str | None
    """The question as the model sees it; None where its template refuses the conversation."""
    tokens: list[int]
    """Of `text`."""
    continuation: list[int]
    """Tokens of the continuation; none where they do not fit the model's context."""
    log_probs: list[float]
    """Of these tokens behind `tokens`, in nats."""
    answer: list[int]
    """The likeliest token, again and again, up to the one that ends the answer."""
    margins: list[float]
    """By how many nats each of them is likelier than the one that comes next."""
    words: str
    """The answer as text, without special tokens."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a model made of all questions."""

    precision: str
    """What it computed with: `float32`, `bfloat16`, `4 bits`."""
    stops: list[int]
    """Tokens that end an answer."""
    said: list[Said]

    @property
    def asked(self) -> list[Said]:
        """Of the questions that could be asked."""
        return [said for said in self.said if said.continuation]

    @property
    def unasked(self) -> str:
        """How many could not, in words; nothing where all could."""
        refused = sum(said.text is None for said in self.said)
        long = len(self.said) - len(self.asked) - refused
        parts = [f"its template refuses {refused}"] if refused else []
        parts += [f"{long} exceed its context"] if long else []
        return f"of {len(self.said)} questions {' and '.join(parts)}" if parts else ""


EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}
EPSILON |= dict.fromkeys(("f32", "fp32"), EPSILON["float32"])
EPSILON |= dict.fromkeys(("f16", "fp16"), EPSILON["float16"])
EPSILON |= {"bf16": EPSILON["bfloat16"]}
"""Of a number between 1 and 2: by precision, as torch, recipes and GGUF call it."""

SINGLE = 256
"""Epsilons that a log-probability may move by for each layer, in fp32: nothing is rounded on the
way, and sums are long and in another order on another device, in another batch, in another
engine."""

HALF = 2
"""The same where numbers were rounded to half precision: most of these errors cancel out. Of
SmolLM2-135M in bf16 1.1 were seen."""


def tolerance(probe: Probe, layers: int, *kinds: str) -> float | None:
    """Nats that a log-probability may move by, and with it by how much one token may be likelier
    than another and yet not be the answer, where weights or sums are rounded to these `kinds` of
    numbers, and to that of the probe; None where one of them has fewer bits.

    Each layer rounds what it adds, and the errors add up like steps of a random walk; they are
    relative to the largest logit.
    """
    every = {*kinds, probe.precision}
    if not every <= set(EPSILON):
        return None
    least = min((min(said.log_probs, default=0.0) for said in probe.said), default=0.0)
    walk = math.sqrt(layers + 1) * max(-least, 1.0)
    single = EPSILON["float32"]
    return walk * max(
        EPSILON[kind] * (SINGLE if EPSILON[kind] == single else HALF) for kind in every
    )


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far another one, asked the same, said the same."""

    log_prob_difference: float
    """The greatest of a token of a continuation, in nats."""
    mean_log_prob_difference: float
    equal_answers: int
    answers: int
    """How many questions were asked."""

    @property
    def greedy(self) -> float:
        """The share of equal answers."""
        return self.equal_answers / self.answers if self.answers else 1.0


def as_clients_say(message: dict[str, Any]) -> dict[str, Any]:
    """A message in OpenAI's form: arguments are text, and calls and answers have an id."""
    said = {name: value for name, value in message.items() if name != "tool_calls"}
    if calls := message.get("tool_calls"):
        said["tool_calls"] = [
            {
                "id": "call_0",
                "type": "function",
                "function": {
                    "name": call["function"]["name"],
                    "arguments": json.dumps(call["function"]["arguments"]),
                },
            }
            for call in calls
        ]
    if message["role"] == "tool":
        said["tool_call_id"] = "call_0"
    return said


# --- two of them, held against one another --------------------------------------------------------


def compare(expected: Probe, seen: Probe, reader: str, most: float | None) -> Agreement:
    """How far what a `reader` said is what was `expected`.

    `most`: nats that a log-probability may differ by; None where weights were rounded, so that it
    is for others to say how far that may go. An answer may differ from where two tokens are as
    likely as `most` can tell. Raises UserError (3) naming the first thing that differs.
    """
    refuse_another_text(expected, seen, reader)
    refuse_another_end(expected, seen, reader)
    agreement = agreement_of(expected, seen)
    if most is None:
        return agreement
    if not agreement.log_prob_difference <= most:  # NaN as well
        what = f"log-probabilities differ by {agreement.log_prob_difference:.2e} nats"
        raise _differs(reader, f"{what}, and at most {most:.2e} may come of rounding")
    for before, after in _pairs(expected, seen):
        if problem := _other_answer(before, after, most):
            raise _differs(reader, f"{before.question.name}: {problem}")
    return agreement


def agreement_of(expected: Probe, seen: Probe) -> Agreement:
    """How far two of the same questions agree."""
    pairs = list(_pairs(expected, seen))
    differences = [
        abs(one - other)
        for before, after in pairs
        for one, other in zip(before.log_probs, after.log_probs, strict=True)
    ]
    finite = all(map(math.isfinite, differences))
    return Agreement(
        log_prob_difference=max(differences, default=0.0) if finite else math.inf,
        mean_log_prob_difference=sum(differences) / max(len(differences), 1),
        equal_answers=sum(before.answer == after.answer for before, after in pairs),
        answers=len(pairs),
    )


def refuse_another_text(expected: Probe, seen: Probe, reader: str) -> None:
    """Raise UserError (3) where a template writes a question otherwise, or it becomes other
    tokens."""
    for before, after in zip(expected.said, seen.said, strict=True):
        name = before.question.name
        if before.text != after.text:
            problem = f"its template writes the question '{name}' otherwise"
            raise _differs(reader, f"{problem}: {first_difference(before.text, after.text)}")
        if before.tokens != after.tokens:
            at = _first(before.tokens, after.tokens)
            here, now = before.tokens[at : at + 5], after.tokens[at : at + 5]
            problem = f"its tokenizer splits the question '{name}' otherwise"
            raise _differs(reader, f"{problem}: token {at} on is {here} here, and {now} there")


def refuse_another_end(expected: Probe, seen: Probe, reader: str) -> None:
    """Raise UserError (3) where another token ends an answer."""
    if missing := sorted(set(expected.stops) - set(seen.stops)):
        shown = ", ".join(map(str, missing))
        problem = f"it does not stop at token {shown}, which ends an answer"
        raise _differs(reader, problem)


def first_difference(one: str | None, other: str | None) -> str:
    """Where two texts part, in words."""
    if one is None or other is None:
        return f"{'refused' if one is None else 'written'} here, and not so there"
    at = _first(one, other)
    return f"from character {at}, {one[at : at + 40]!r} here, and {other[at : at + 40]!r} there"


def _pairs(expected: Probe, seen: Probe) -> Iterator[tuple[Said, Said]]:
    by_name = {said.question.name: said for said in seen.asked}
    return ((said, by_name[said.question.name]) for said in expected.asked)


def _first(one: Any, other: Any) -> int:
    """Where two texts, or lists, part."""
    pairs = zip(one, other, strict=False)
    shorter = min(len(one), len(other))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)


def _other_answer(before: Said, after: Said, most: float) -> str:
    """How an answer differs where no rounding explains it, in words; else nothing."""
    if before.answer == after.answer:
        return ""
    at = _first(before.answer, after.answer)
    margin = before.margins[at] if at < len(before.margins) else math.inf
    if margin <= most:
        return ""
    return f"the answer is {before.words!r} here, and {after.words!r} there"


def _differs(reader: str, problem: str) -> UserError:
    hint = "what was read is not the model that was published"
    return UserError(f"{reader}: {problem}", hint, INTEGRITY)


# --- the questions --------------------------------------------------------------------------------


def _ask(*turns: str, system: str | None = None) -> list[dict[str, Any]]:
    """Turns of a user and an assistant, one after the other."""
    roles = ("user", "assistant")
    begin = [{"role": "system", "content": system}] if system else []
    return begin + [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name"}},
            "required": ["city"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Bern"}}}
PLAIN = "The answer is simple: it is 42, and nothing else."
CODE = 'def f(x):\n    return x * 2  # "twice"\n'
BRIEF = "You are brief.\nAnswer in one sentence."

QUESTIONS = [
    Question(name="one turn", messages=_ask("What is 2 + 2?"), continuation="2 + 2 is 4."),
    Question(name="a fact", messages=_ask("Name a primary colour."), continuation="Red is one."),
    Question(name="lines", messages=_ask("List:\n\n- one\n- two"), continuation="1. one\n2. two"),
    Question(name="code", messages=_ask(f"Explain:\n{CODE}"), continuation=CODE),
    Question(name="numbers", messages=_ask("3.14 * 1,000 = ? 12345"), continuation="3140.0"),
    Question(
        name="Chinese", messages=_ask("你好！今天天气怎么样？"), continuation="今天天气很好。"
    ),
    Question(name="accents", messages=_ask("Où est l'été? Wäre es hier?"), continuation="Là-bas."),
    Question(name="emoji", messages=_ask("What is \U0001f642 + \u2764\ufe0f?"), continuation=PLAIN),
    Question(name="blanks", messages=_ask("  spaces \t around  "), continuation="  so\tbe it "),
    Question(name="system", messages=_ask("Why is it so?", system=BRIEF), continuation=PLAIN),
    Question(
        name="several turns",
        messages=_ask("Hi.", "Hello!\nHow are you?", "Well, and you?"),
        continuation="I am well, too.",
    ),
    Question(
        name="system and turns",
        messages=_ask("Say a.", "a", "Say b.", "b", "Say c.", system="You repeat letters."),
        continuation="c",
    ),
    Question(
        name="tools", messages=_ask("Is it warm in Bern?"), tools=[WEATHER], continuation=PLAIN
    ),
    Question(
        name="system and tools",
        messages=_ask("Is it warm in Rome?", system=BRIEF),
        tools=[WEATHER],
        continuation="I shall look it up.",
    ),
    Question(
        name="a tool's answer",
        messages=[
            *_ask("Is it warm in Bern?"),
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "get_weather", "content": '{"celsius": 21}'},
        ],
        tools=[WEATHER],
        continuation="It is 21 degrees in Bern.",
    ),
    Question(
        name="a text",
        messages=[],
        text="The capital of France is",
        continuation=" Paris, and that of Italy is Rome.",
    ),
]
