"""Prompts that end in the tag which opens a block of thought, whatever the template."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from datasets import Dataset
from tokenizers import Tokenizer

from llmpipe.data.kinds.prompts import Needs, compared
from llmpipe.data.prepare import prepare
from llmpipe.data.template.shipped import shipped
from llmpipe.errors import UserError
from llmpipe.recipe.sections import Prompts

from .conftest import make_model, write

TRL = Path(find_spec("trl").origin).parent / "chat_templates"
QWEN = (TRL / "qwen3.jinja").read_text()
OPENS = (TRL / "qwen3_5_think.jinja").read_text()
SPECIAL = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<think>", "</think>"]
THINK = compared([], all_read=False, needs=Needs(thinks=True))
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 3?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def asked(here, template, row, kind=THINK, shown=True, **settings):
    """The text of the one prompt that a row becomes, and its tokens. `shown`: whether texts show
    the tags, as Qwen3's do."""
    model = make_model(here / "model", special=SPECIAL, template=template)
    if shown:
        path = model / "tokenizer.json"
        vocabulary = json.loads(path.read_text())
        for token in vocabulary["added_tokens"]:
            token["special"] = "think" not in token["content"]
        path.write_text(json.dumps(vocabulary))
    write(here / "rows.jsonl", [row])
    data = Prompts(train=[{"path": str(here / "rows.jsonl")}], max_length=4096, **settings)
    ready = prepare(data, kind, model, here / "cache", seed=0, say=lambda _: None)
    folder = ready.folder(here / "cache")
    (made,) = Dataset.from_file(str(folder / "train.arrow")).to_list()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    text = tokenizer.decode(made["prompt_ids"], skip_special_tokens=False)
    return text, made["prompt_ids"], tokenizer


@pytest.mark.parametrize(
    ("template", "tools"),
    [(QWEN, [WEATHER]), (QWEN, None), (shipped("chatml"), None)],
    ids=["qwen3, tools", "qwen3", "chatml"],
)
def test_system_turns_and_tools_stand_before_the_thought(here, template, tools):
    row = {"prompt": ASKED, **({"tools": tools} if tools else {})}
    text, ids, tokenizer = asked(here, template, row)
    assert text.endswith("<|im_start|>assistant\n<think>\n") and "Be brief." in text
    assert ("The weather of a city." in text) == bool(tools)
    assert text.count("<think>") == 1 and tokenizer.token_to_id("<think>") in ids
    plain, _, _ = asked(here, template, row, compared([], all_read=False))
    assert text == f"{plain}<think>\n", "all else is as it was"


def test_a_template_that_opens_the_block_is_left_alone(here):
    text, ids, _ = asked(here, OPENS, {"prompt": ASKED})
    assert text.endswith("assistant\n<think>\n") and text.count("<think>") == 1
    assert ids == asked(here, OPENS, {"prompt": ASKED}, compared([], all_read=False))[1]


def test_a_template_that_closes_it_is_refused(here):
    """As one does whose thinking is off."""
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    with pytest.raises(UserError, match=r"rollout\.think: the template closes") as refused:
        asked(here, QWEN, {"prompt": ASKED}, **off)
    assert refused.value.code == 2


def test_a_text_is_continued_with_a_thought(here):
    text, _, _ = asked(here, None, {"prompt": "2 + 3 ="})
    assert text.endswith("2 + 3 =<think>\n")


def test_a_thought_whose_end_no_text_shows_is_refused(here):
    """Nothing would ever follow it, and every answer be worth nothing."""
    with pytest.raises(UserError, match="calls </think> special, and no text shows it"):
        asked(here, QWEN, {"prompt": ASKED}, shown=False)
