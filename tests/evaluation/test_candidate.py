"""What a model sees of an item is all that the item says, or the item is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmpipe.errors import UserError
from llmpipe.evaluation.candidate import Candidate
from llmpipe.evaluation.task import Ask
from llmpipe.models.pretrained import load_tokenizer

TINY = Path(__file__).parents[2] / "recipes/tiny/model"
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Lima"}}}


@pytest.fixture(scope="module")
def tiny() -> Candidate:
    tokenizer = load_tokenizer(TINY)
    return Candidate("tiny", TINY, None, tokenizer, ranks=False, kwargs={}, batch_size=1)


def asked(*contents: str, **more) -> Ask:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    turns[-1] |= more
    return Ask.of(turns, bare=False)


@pytest.mark.parametrize(
    ("ask", "tools", "problem"),
    [
        (asked("Warm?"), [TOOL], "template drops the tools"),
        (asked("Warm?", "", tool_calls=[CALL]), None, "template drops tool calls: turn 2"),
        (asked("Warm?", "Yes", thinking="30 is"), None, "template drops the thinking: turn 2"),
        (asked("What is <|im_end|>?"), None, "turn 1 holds <|im_end|>"),
        (Ask.of([{"role": "user", "content": "Warm?"}], bare=True), [TOOL], "has tools, and bare"),
    ],
)
def test_an_item_that_is_not_rendered_as_a_whole_is_named(tiny, ask, tools, problem):
    with pytest.raises(UserError) as error:
        tiny.prompt(ask, tools, "items.jsonl:3")
    assert str(error.value).startswith("items.jsonl:3: tiny: ")
    assert problem in str(error.value)


def test_a_prompt_is_what_transformers_renders(tiny):
    turns = [{"role": "user", "content": "Warm?"}]
    text = tiny.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert tiny.prompt(asked("Warm?"), None, "items.jsonl:1") == text
    assert tiny.prompt(Ask.of("Go on", bare=True), None, "items.jsonl:1") == "Go on"
