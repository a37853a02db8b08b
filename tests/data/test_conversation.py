"""What a message says, however it is written; and that nothing it says goes unread unsaid."""

from __future__ import annotations

import json
from datetime import datetime
from decimal import Decimal
from typing import Any

import pytest

from llmpipe.data.examples import Conversation, Example, Preference, is_learned
from llmpipe.data.fields import Rejected, Values
from llmpipe.data.formats import FORMATS

U = {"role": "user", "content": "q"}
A = {"role": "assistant", "content": "a"}
B = {"role": "assistant", "content": "b"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def read(format: str, row: dict[str, Any]) -> tuple[Example, Values]:
    values = Values(row)
    return FORMATS[format].example_of(values), values


def turn(**keys: Any) -> tuple[dict[str, Any], Values]:
    """What a conversation's last turn becomes, an assistant's unless it has another role."""
    example, values = read("messages", {"messages": [U, A, {**A, **keys}]})
    assert isinstance(example, Conversation)
    return example.messages[-1], values


# --- system prompt and tools, beside every format but texts to go on with ---

ROWS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "q", "output": "a"},
    "sharegpt": {"conversations": [U, A]},
    "messages": {"messages": [U, A]},
    "prompt-completion": {"prompt": "q", "completion": "a"},
    "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "prompt": {"prompt": "q"},
    "choice": {"prompt": "q", "choices": ["x", "y"], "answer": 0},
}


def test_formats_that_ask_are_called_as_here():
    assert ROWS.keys() <= FORMATS.keys()


@pytest.mark.parametrize("format", ROWS)
def test_system_and_tools_are_read_beside_it(format):
    assert {"system", "tools"} <= set(FORMATS[format].optional)
    for tools in (TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])]):
        example, _ = read(format, ROWS[format] | {"system": "s", "tools": tools})
        asked = example.messages if isinstance(example, Conversation) else example.prompt
        assert [turn["content"] for turn in asked][:2] == ["s", "q"]
        assert [turn["role"] for turn in asked][:2] == ["system", "user"]
        assert example.tools == TOOLS
        if format == "prompt-completion":
            assert example.first == 2  # the completion alone is learned


@pytest.mark.parametrize("format", ["messages", "sharegpt"])
def test_a_system_prompt_that_is_there_twice(format):
    (column,) = ROWS[format]
    row = {column: [{"role": "system", "content": "s"}, U, A]}
    assert len(read(format, row | {"system": "s "})[0].messages) == 3
    with pytest.raises(Rejected, match="two system turns"):
        read(format, row | {"system": "another"})


# --- which turns are learned ---

KEYS = ("weight", "train", "training", "trainable", "loss", "loss_mask")


@pytest.mark.parametrize("key", KEYS)
def test_a_turn_says_whether_it_is_learned(key):
    for no in (False, 0, 0.0, "false", "False", "0", "none"):
        assert not is_learned(turn(**{key: no})[0]), no
    for yes in (True, 1, 1.0, "true", "1", None):
        message, values = turn(**{key: yes})
        assert is_learned(message) and not values.unread
    for unclear in (0.5, 2, -1, "maybe", [1, 0], "last"):
        with pytest.raises(Rejected, match=f"loss of a turn: messages, message 3: {key} is"):
            turn(**{key: unclear})


def test_a_turn_that_says_both_is_refused():
    with pytest.raises(Rejected, match="weight and train contradict"):
        turn(weight=1, train=False)
    assert not is_learned(turn(weight=0, train=False)[0])


def test_other_turns_are_never_learned_and_it_is_said_when_they_ask_for_it():
    row = {"messages": [U | {"train": True}, A, U | {"train": False, "weight": 0}, A]}
    example, values = read("messages", row)
    assert [is_learned(message) for message in example.messages] == [False, True, False, True]
    assert values.unread == {"train of the user's messages"}


def test_an_answer_that_is_compared_is_learned_as_a_whole():
    with pytest.raises(Rejected, match="loss of a turn"):
        read("preference", {"prompt": "q", "chosen": [A | {"weight": 0}], "rejected": [B]})
    asked = [U, A | {"weight": 0}, U]
    example, _ = read("preference", {"prompt": asked, "chosen": [A], "rejected": [B]})
    assert isinstance(example, Preference)


# --- what nobody reads ---


def test_what_nobody_reads_is_noted():
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}, "image": None}
    function = {"name": "f", "arguments": {}, "strict": True}
    call = {"type": "function", "index": 0, "function": function, "extra": None}
    _, values = turn(
        id=7, audio={"x": 1}, refusal=None, empty=[], content=[part], tool_calls=[call]
    )
    assert values.unread == {
        "id of messages",
        "audio of messages",
        "cache_control of parts of messages",
        "index of tool calls",
        "strict of tool calls",
    }


def test_two_names_of_one_thing_are_refused_where_they_differ():
    assert turn(value="a", **{"from": "assistant"})[0] == A
    with pytest.raises(Rejected, match="has both content and value"):
        turn(value="b")
    with pytest.raises(Rejected, match="has both role and from"):
        turn(**{"from": "gpt"})
    assert turn(content=None, value="b")[0] == B  # as a table has them


# --- tool calls ---

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    "keys",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
        {"tool_calls": [{"type": None, "id": None, "function": CALL["function"]}]},
        {"tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"tool_calls": [{"function": {"name": "f", "arguments": {"x": 1, "y": None}}}]},
        {"function_call": {"name": "f", "arguments": '{"x": 1}'}},  # OpenAI's before 2023-11
    ],
)
def test_a_call_is_the_same_however_it_is_written(keys):
    message, _ = turn(**keys)
    assert message == A | {"tool_calls": [CALL]}


@pytest.mark.parametrize(
    "call",
    [
        {"name": "f", "parameters": {"x": 1}},  # Llama's name for arguments
        {"type": "custom", "custom": {"name": "f", "input": "x"}},
        {"type": "function", "function": {"name": "f", "arguments": {}}, "id": 3},
        {"name": "f", "arguments": [1]},
        {"name": "f", "arguments": {"at": datetime(2024, 1, 2)}},
        {"name": "f", "arguments": {"price": Decimal("1.5")}},
        {"name": "f", "arguments": {"x": b"bytes"}},
        {"name": "f", "arguments": '{"x": NaN}'},
        {"name": "f", "arguments": {"x": {1: 2}}},
    ],
)
def test_a_call_that_says_more_than_is_read_is_refused(call):
    with pytest.raises(Rejected):
        turn(tool_calls=[call])


def test_nulls_are_left_out_at_every_depth_and_it_is_said():
    arguments = {"a": None, "b": [{"c": None, "d": [None, 1]}], "e": {"f": {"g": None}}}
    schema = {"name": "f", "parameters": {"default": None, "enum": ["x", None]}}
    call = {"function": {"name": "f", "arguments": arguments}}
    row = {"messages": [U, A | {"tool_calls": [call]}], "tools": [schema]}
    example, values = read("messages", row)
    assert isinstance(example, Conversation)
    (told,) = example.messages[1]["tool_calls"]
    assert told["function"]["arguments"] == {"b": [{"d": [None, 1]}], "e": {"f": {}}}
    assert example.tools == [{"name": "f", "parameters": {"enum": ["x", None]}}]
    assert values.noted == {"nulls in tools and tool calls are left out"}


def test_nesting_without_end_is_refused():
    deep: Any = {}
    for _ in range(100_000):
        deep = {"x": deep}
    with pytest.raises(Rejected, match="without end"):
        turn(tool_calls=[{"name": "f", "arguments": deep}])


# --- messages in a cell ---

JSON_U, JSON_A, JSON_B = (json.dumps([message], indent=1) for message in (U, A, B))
CELLS = [
    ("messages", {"messages": json.dumps([U, A])}, {"messages": [U, A]}),
    ("sharegpt", {"conversations": " " + json.dumps([U, A])}, {"conversations": [U, A]}),
    (
        "prompt-completion",
        {"prompt": JSON_U, "completion": JSON_A},
        {"prompt": [U], "completion": [A]},
    ),
    (
        "prompt-completion",
        {"prompt": "q", "completion": json.dumps(A)},
        {"prompt": "q", "completion": A},
    ),
    (
        "preference",
        {"prompt": JSON_U, "chosen": JSON_A, "rejected": JSON_B},
        {"prompt": [U], "chosen": [A], "rejected": [B]},
    ),
    (
        "preference",
        {"chosen": json.dumps([U, A]), "rejected": json.dumps([U, B])},
        {"chosen": [U, A], "rejected": [U, B]},
    ),
    ("prompt", {"prompt": JSON_U}, {"prompt": [U]}),
    (
        "choice",
        {"prompt": JSON_U, "choices": '["x", "y"]', "answer": "1"},
        {"prompt": [U], "choices": ["x", "y"], "answer": 1},
    ),
    (
        "alpaca",
        {"instruction": "q", "output": "a", "history": '[["q", "a"]]'},
        {"instruction": "q", "output": "a", "history": [["q", "a"]]},
    ),
]


@pytest.mark.parametrize(("format", "cells", "row"), CELLS)
def test_messages_in_a_cell_are_messages(format, cells, row):
    assert read(format, cells)[0] == read(format, row)[0]


BEGIN = [  # like a list of messages, and are none
    JSON_A[:-3],  # cut off, as by a spreadsheet
    str([A]),  # Python's, as pandas writes it
    JSON_A.replace('"', '""'),  # quoted twice
    JSON_A.replace('"', '\\"'),
    "[{role: assistant, content: a}]",
    '[{"content": "a", "role": "assistant"',
    '[{"from": "gpt", "value": "a",}]',
    json.dumps([A, "b"]),
    json.dumps([{"role": "asistant", "content": "a"}]),
    json.dumps([A, {"role": "assistant"}]),
    json.dumps([{"content": "a"}]),
]


@pytest.mark.parametrize("cell", BEGIN)
def test_a_cell_that_begins_like_messages_and_is_none_is_refused(cell):
    for format, row in (
        ("messages", {"messages": cell}),
        ("prompt", {"prompt": cell}),
        ("prompt-completion", {"prompt": "q", "completion": cell}),
        ("preference", {"prompt": "q", "chosen": cell, "rejected": "b"}),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": cell}),
    ):
        with pytest.raises(Rejected):
            read(format, row)


TEXTS = [  # which begin like JSON, or are JSON, and say no message
    "[1] See the first footnote.",
    "[laughs] Hi!",
    "[]",
    '[{"name": "f", "arguments": {"x": 1}}]',  # what a function-calling model says
    '[{"person": "Ada", "role": "CEO"}]',
    '{"role": "admin"}',
    '{"answer": 42}',
    '[{"title": "A day", "content": "Sun."}]',
    '{"content": "Sun."}',
    '[{"value": 3}]',
    "{x | x > 0}",
    "[{x}, {y}] are sets",
    "{ from: 1, to: 2 }",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_that_begins_like_json_stays_text(text):
    example, values = read("prompt-completion", {"prompt": "q", "completion": text})
    assert example.completion == text and not values.noted
    pair, _ = read("preference", {"prompt": "q", "chosen": text, "rejected": "b"})
    assert pair.chosen == text


def test_a_column_of_texts_refuses_messages_in_a_cell():
    with pytest.raises(Rejected, match="instruction is messages in JSON, not text"):
        read("alpaca", {"instruction": JSON_U, "output": "a"})


# --- choices ---


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [
        (["3", "4"], "4", 1),  # its text; there is no fifth choice
        (["x", "y"], "1", 1),
        (["x", "y"], 1.0, 1),
        (["1", "0"], "1", None),  # its text, or the other's index
        (["x", "x"], "x", None),
        (["x", "y"], "2", None),
        (["x", "y"], 0.5, None),
        (["x", "y"], False, None),
        ({"text": ["x", "y"], "label": ["1", "2"]}, "1", 0),  # a label of its own
    ],
)
def test_an_answer_means_one_choice(choices, answer, right):
    row = {"prompt": "q", "choices": choices, "answer": answer}
    if right is None:
        with pytest.raises(Rejected, match="bad answer"):
            read("choice", row)
    else:
        assert read("choice", row)[0].answer == right
