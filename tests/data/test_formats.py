from __future__ import annotations

from typing import get_args

import pytest

from llmpipe.data.formats import (
    FORMATS,
    Completion,
    Conversation,
    Document,
    MultipleChoice,
    Preference,
    Prompt,
    Rejected,
)
from llmpipe.data.layout import Layout, Rule, layout_of
from llmpipe.errors import UserError
from llmpipe.recipe.sections import Rows

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def themselves(columns: str) -> dict[str, str]:
    return {name: name for name in columns.split()}


# columns of the rows -> the format, and the columns that are read
DETECTED = [
    ("text", "text", themselves("text")),
    ("id instruction input output text", "alpaca", themselves("instruction input output")),
    ("conversations tools", "sharegpt", themselves("conversations tools")),
    ("messages source", "messages", themselves("messages")),
    (
        "messages system functions",
        "messages",
        {"messages": "messages", "system": "system", "functions": "tools"},
    ),
    ("messages functions tools", "messages", themselves("messages tools")),
    ("prompt completion", "prompt-completion", themselves("prompt completion")),
    ("prompt chosen rejected messages", "preference", themselves("chosen rejected prompt")),
    (
        "conversations chosen rejected",
        "preference",
        {"conversations": "prompt", "chosen": "chosen", "rejected": "rejected"},
    ),
    ("prompt question chosen rejected", "preference", themselves("chosen rejected prompt")),
    ("prompt", "prompt", themselves("prompt")),
    ("question answer", "alpaca", {"question": "instruction", "answer": "output"}),
    ("prompt response", "prompt-completion", {"prompt": "prompt", "response": "completion"}),
    (
        "instruction context response",
        "alpaca",
        {"instruction": "instruction", "response": "output", "context": "input"},
    ),
]


EVERY = (Document, Conversation, Completion, Preference, Prompt, MultipleChoice)


def layout(columns: str, format: str = "auto", mapping: dict[str, str] | None = None) -> Layout:
    """Of rows with these columns."""
    rule = Rule(format, tuple((mapping or {}).items()), EVERY)
    return layout_of([dict.fromkeys(columns.split(), "x")], rule, "d")


@pytest.mark.parametrize(("columns", "format", "used"), DETECTED)
def test_detect(columns, format, used):
    detected = layout(columns)
    assert (detected.format, detected.columns) == (format, used)


def test_detect_reads_columns_as_the_recipe_maps_them():
    mapping = {"Frage": "prompt", "Antwort": "completion"}
    detected = layout("Frage Antwort", mapping=mapping)
    assert (detected.format, detected.columns) == ("prompt-completion", mapping)


def test_detect_names_what_it_found_and_what_is_needed():
    with pytest.raises(UserError, match="no format fits the columns a, b") as error:
        layout("a b")
    assert "alpaca: instruction, output" in error.value.hint and "columns" in error.value.hint
    with pytest.raises(UserError, match="format alpaca does not fit the columns text"):
        layout("text", "alpaca")
    with pytest.raises(UserError, match="no column 'questoin'; did you mean 'question'"):
        layout("question answer", mapping={"questoin": "prompt"})
    with pytest.raises(UserError, match="two columns are called 'prompt'"):
        layout("question prompt", mapping={"question": "prompt"})


def same(format: str, row: dict):
    """A row of a format's own columns -> its example."""
    return layout_of([row], Rule(format, (), EVERY), "d").convert(row).example


def test_alpaca():
    row = {"instruction": "q", "input": "", "output": "a"}
    assert same("alpaca", row) == Conversation([U, A], None)
    assert same("alpaca", row | {"input": "more"}).messages[0]["content"] == "q\n\nmore"
    got = same("alpaca", row | {"system": "s", "history": [["q1", "a1"]]}).messages
    assert [m["content"] for m in got] == ["s", "q1", "a1", "q", "a"]


def test_sharegpt():
    call = '{"name": "f", "arguments": {"x": 1}}'
    turns = [("human", "q"), ("function_call", call), ("observation", "1"), ("gpt", "a")]
    row = {
        "conversations": [{"from": f, "value": v} for f, v in turns],
        "system": "s",
        "tools": '[{"name": "f"}]',
    }
    got = same("sharegpt", row)
    assert got.tools == [{"name": "f"}]
    assert got.messages == [
        {"role": "system", "content": "s"},
        U,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "1"},
        A,
    ]


def test_messages():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    got = same("messages", {"messages": [U, {"role": "assistant", "content": parts}]})
    assert got.messages[1]["content"] == "ab"
    text_arguments = {
        "type": "function",
        "id": "1",
        "function": {"name": "f", "arguments": '{"x": 1}'},
    }
    got = same(
        "messages",
        {"messages": [U, {"role": "assistant", "content": None, "tool_calls": [text_arguments]}]},
    )
    assert got.messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{**CALL, "id": "1"}],
    }
    cell = '[{"role": "assistant", "content": "a"}]'  # of a CSV file
    assert same("messages", {"messages": cell}).messages == [A]


def test_prompt_completion():
    texts = {"prompt": "q", "completion": "a"}
    assert same("prompt-completion", texts) == Completion("q", "a")
    got = same("prompt-completion", {"prompt": [U], "completion": [A]})
    assert got == Conversation([U, A], None, first=1)


def test_preference():
    texts = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert same("preference", texts) == Preference("q", "a", "b")
    b = {"role": "assistant", "content": "b"}
    whole = Preference([U], [A], [b], tools=None)
    assert same("preference", {"prompt": [U], "chosen": [A], "rejected": [b]}) == whole
    assert same("preference", {"chosen": [U, A], "rejected": [U, b]}) == whole  # implicit prompt
    assert (
        same("preference", {"prompt": "q", "chosen": [U, A], "rejected": [U, b]}) == whole
    )  # UltraFeedback
    dicts = {
        "prompt": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"role": "assistant", "content": "b"},
    }
    assert same("preference", dicts) == whole
    for row, reason in (
        (texts | {"rejected": "a"}, "chosen equals rejected"),
        ({"chosen": [U, A], "rejected": [A, b]}, "no common prompt"),
        (texts | {"chosen": ""}, "empty text"),
        ({"prompt": [U], "chosen": [U], "rejected": [b]}, "no assistant turn"),
        ({"prompt": [U, A], "chosen": [U, A], "rejected": [U, A, U, b]}, "no assistant turn"),
        ({"prompt": [U], "chosen": [A], "rejected": "a"}, "chosen equals rejected"),
        (
            {"prompt": "q", "chosen": [{"role": "system", "content": "s"}, U, A], "rejected": [b]},
            "system turn not first",
        ),
    ):
        with pytest.raises(Rejected) as error:
            same("preference", row)
        assert error.value.reason == reason


def test_prompt():
    assert same("prompt", {"prompt": "q"}) == Prompt("q")
    assert same("prompt", {"prompt": [U]}) == Prompt([U], tools=None)
    assert same("prompt", {"prompt": "q", "system": "s"}).prompt[0]["role"] == "system"


def test_choice():
    texts = {"prompt": "q", "choices": ["x", "y"]}
    right = MultipleChoice("q", ["x", "y"], 1)
    for answer in (1, "B", "y"):
        assert same("choice", texts | {"answer": answer}) == right
    arc = {"prompt": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answer": "2"}
    assert same("choice", arc) == right
    for answer in (2, True, "C", None):
        with pytest.raises(Rejected):
            same("choice", texts | {"answer": answer})


def test_a_format_is_called_as_its_file():
    names = get_args(Rows.model_fields["format"].annotation)
    assert set(names) == {"auto", *FORMATS}
