"""`alpaca`: an instruction, perhaps with an input to it, and the answer (Taori et al. 2023).

{"instruction": "Name the colour.", "input": "grass", "output": "Green."}

`history`, as in LLaMA-Factory, holds the [question, answer] pairs of earlier turns.
"""

from __future__ import annotations

from typing import Any

from llmpipe.data.conversation import text_column, tools_of, with_system
from llmpipe.data.examples import Conversation, Messages
from llmpipe.data.fields import Rejected, Values, optional_text, parsed_json, text_of
from llmpipe.data.format import Format


def example_of(values: Values) -> Conversation:
    if isinstance(values["output"], list):
        remedy = "where any of several answers is right, call the two prompt and answer in columns:"
        raise Rejected("wrong type", f"output is a list, not text; {remedy}")
    instruction = text_column(values, "instruction")
    output = text_column(values, "output")
    if more := optional_text(values, "input"):
        instruction = f"{instruction}\n\n{more}"
    messages: Messages = []
    for question, answer in (*_history(values), (instruction, output)):
        messages.append({"role": "user", "content": text_of(question, "history")})
        messages.append({"role": "assistant", "content": text_of(answer, "history")})
    return Conversation(with_system(values, messages), tools_of(values))


def _history(values: Values) -> list[Any]:
    history = values.get("history") or []
    if isinstance(history, str):  # in a CSV cell
        history = parsed_json(history, "wrong type", "history")
    if not isinstance(history, list) or not all(map(_is_pair, history)):
        raise Rejected("wrong type", "history is not a list of pairs")
    return history


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


FORMAT = Format(
    name="alpaca",
    precedence=30,
    required=("instruction", "output"),
    optional=("input", "system", "tools", "history"),
    shape=Conversation,
    example_of=example_of,
    synonyms=(
        # asked and answered: turns of a chat, not text to go on with
        {"question": "instruction", "answer": "output"},
        {"query": "instruction", "response": "output"},
        {"instruction": "instruction", "response": "output", "context": "input"},
        {"instruction": "instruction", "response": "output"},
    ),
)
