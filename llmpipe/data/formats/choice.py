"""`choice`: a question with answers to choose from, of which one is right.

{"prompt": "2 + 2?", "choices": ["3", "4"], "answer": 1}       the answer's index from 0,
{"prompt": "2 + 2?", "choices": ["3", "4"], "answer": "B"}     its letter,
{"prompt": "2 + 2?", "choices": ["3", "4"], "answer": "4"}     or the very text
{"question": ..., "choices": {"text": [...], "label": ["1", "2"]}, "answerKey": "2"}     as ARC
"""

from __future__ import annotations

from string import ascii_uppercase
from typing import Any

from llmpipe.data.examples import MultipleChoice
from llmpipe.data.fields import Rejected, Values, parsed_json, text_of
from llmpipe.data.format import Format
from llmpipe.data.formats import prompt

_LETTERS = list(ascii_uppercase)


def example_of(values: Values) -> MultipleChoice:
    labels, choices = _labelled(values["choices"])
    answer = _index(values["answer"], labels, choices)
    asked = prompt.example_of(values)
    return MultipleChoice(asked.prompt, choices, answer, asked.tools)


def _labelled(choices: Any) -> tuple[list[Any], list[str]]:
    """What each choice is called, and its text."""
    labels: Any = _LETTERS
    if isinstance(choices, str):  # in a CSV cell
        choices = parsed_json(choices, "wrong type", "choices")
    if isinstance(choices, dict):
        labels = choices.get("label")
        choices = choices.get("text")
    if not isinstance(choices, list) or len(choices) < 2 or not isinstance(labels, list):
        raise Rejected("wrong type", "choices is not a list of two or more")
    return labels, [text_of(choice, f"choice {i}") for i, choice in enumerate(choices, 1)]


def _index(answer: Any, labels: list[Any], choices: list[str]) -> int:
    """Which choice an index, a label or a choice's text means: exactly one."""
    shown = f"{str(answer)[:40]!r}"
    indices = {answer} if isinstance(answer, int | float) else set()
    if isinstance(answer, str):
        named = zip(labels, choices, strict=False)
        indices = {i for i, names in enumerate(named) if answer in names}
        if labels is _LETTERS:  # in a file of texts an index is one, too
            indices |= {i for i in range(len(choices)) if answer == str(i)}
    inside = [i for i in range(len(choices)) if i in indices]
    if len({choices[i].strip() for i in inside}) > 1:
        raise Rejected("bad answer", f"{shown} may be several of the choices; write its letter")
    if not inside or isinstance(answer, bool):
        raise Rejected("bad answer", f"{shown} is none of the {len(choices)} choices")
    right = choices[inside[0]].strip()
    if sum(choice.strip() == right for choice in choices) > 1:
        raise Rejected("bad answer", f"two choices are {right[:40]!r}, the right one")
    return inside[0]


FORMAT = Format(
    name="choice",
    precedence=60,
    required=("prompt", "choices", "answer"),
    optional=("system", "tools"),
    shape=MultipleChoice,
    example_of=example_of,
    synonyms=(
        {"question": "prompt", "choices": "choices", "answer": "answer"},
        {"question": "prompt", "choices": "choices", "answerKey": "answer"},
    ),
)
