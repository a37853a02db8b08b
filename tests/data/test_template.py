"""What is learned is exactly the assistant's turns with their end-of-turn token.

And ids are those of transformers.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from llmpipe.data import encode
from llmpipe.data.template import Template, choose, sandbox
from llmpipe.errors import UserError

from .conftest import SMOL, learned, make, make_model, saved, talk, write

CHAT = talk("Hello", "Hi you!", "How are you?", "Fine.\n", system="Be kind.")
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}},
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Köln"}}}
CALLS = {
    "messages": [
        {"role": "user", "content": "Is it warm?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "30"},
        {"role": "assistant", "content": "Yes."},
    ],
    "tools": TOOLS,
}
CALL_IN_CHATML = '<tool_call>\n{"name": "weather", "arguments": {"town": "Köln"}}\n</tool_call>'
THOUGHTS = talk("Hello", "<think>\nhm\n</think>\n\nHi!", "Well?", "<think>\nhmm\n</think>\n\nFine.")
QWEN3 = """\
{%- set ns = namespace(last=0) %}
{%- for m in messages %}\
{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}\
{% endfor %}
{%- for m in messages %}
{%- set content = m.content %}
{%- if m.role == 'assistant' and loop.index0 < ns.last %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
MARKED = SMOL.replace(
    "{{'<|im_start|>'",
    "{% if message.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message.content }}{% endgeneration %}{{ '<|im_end|>\n' }}"
    "{% else %}{{'<|im_start|>'",
).replace("'\n'}}{% endfor %}", "'\n'}}{% endif %}{% endfor %}")
# Llama 3's first: the next header, whatever add_generation_prompt says.
LLAMA3_FIRST = (
    "{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content|trim }}"
    "{{ '<|eot_id|>' }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
COHERE = (
    "{% for m in messages %}"
    "{{ '<|turn|>' + m.role + '<|says|>' + m.content + '<|end_says|><|end_turn|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant<|says|>' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "row", "turns"),
    [
        ("chatml", CHAT, ["Hi you!<|im_end|>", "Fine.\n<|im_end|>"]),
        ("llama3", CHAT, ["Hi you!<|eot_id|>", "Fine.<|eot_id|>"]),
        ("alpaca", CHAT, ["Hi you!<|endoftext|>", "Fine.\n<|endoftext|>"]),
        (SMOL, CHAT, ["Hi you!<|im_end|>", "Fine.\n<|im_end|>"]),
        (SMOL, talk("Hello", "Hi"), ["Hi<|im_end|>"]),
        # the marker leaves the end-of-turn token out
        (MARKED, CHAT, ["Hi you!<|im_end|>", "Fine.\n<|im_end|>"]),
        (PHI, CHAT, ["Hi you!<|end|>", "Fine.\n<|end|>"]),  # and eos behind it is not learned
        (LLAMA3_FIRST, CHAT, ["Hi you!<|eot_id|>", "Fine.<|eot_id|>"]),
        (COHERE, CHAT, ["Hi you!<|end_says|><|end_turn|>", "Fine.\n<|end_says|><|end_turn|>"]),
        (QWEN3, THOUGHTS, ["Hi!<|im_end|>", "<think>\nhmm\n</think>\n\nFine.<|im_end|>"]),
        ("chatml", CALLS, [CALL_IN_CHATML + "<|im_end|>", "Yes.<|im_end|>"]),
        ("chatml", talk("Hi", "\n\n<im_start>é你🙂"), ["\n\n<im_start>é你🙂<|im_end|>"]),
    ],
)
@pytest.mark.parametrize("trims", [True, False])
def test_learned_is_what_the_assistant_said(here, template, row, turns, trims):
    built_in = template.isalnum()
    if not built_in:
        Path("own.jinja").write_text(template)
    model = make_model(here / "model", bos=None if trims else "<|start|>")
    write(Path("d.jsonl"), [row])
    record, train, _ = make(
        model, "d.jsonl", template=template if built_in else "./own.jinja", packing=False
    )
    tokenizer = saved()
    assert record["rows"]["rejected_by_reason"] == {}
    if trims or built_in:
        assert learned(tokenizer, train[0]) == turns
    assert all(
        label in (-100, token)
        for label, token in zip(train[0]["labels"], train[0]["input_ids"], strict=True)
    )
    if built_in and not trims:  # a base model that expects its first token gets it, once
        assert (
            tokenizer.decode(train[0]["input_ids"], skip_special_tokens=False).count("<|start|>")
            == 1
        )


EVERY_TEMPLATE = ("chatml", "llama3", "alpaca", SMOL, MARKED, QWEN3, PHI)


@pytest.mark.parametrize(
    ("template", "row"),
    [
        ("chatml", CALLS),  # the one of them that renders tools
        *(
            (t, row)
            for t in EVERY_TEMPLATE
            for row in (CHAT, THOUGHTS, talk("Ä  b\n\n", " 你好 \u2028 x"))
        ),
    ],
)
def test_ids_equal_transformers(here, template, row):
    from transformers import AutoTokenizer

    built_in = template.isalnum()
    if not built_in:
        Path("own.jinja").write_text(template)
    write(Path("d.jsonl"), [row])
    kwargs = {"enable_thinking": True}
    model = make_model(here / "model", bos="<|start|>")
    record, train, _ = make(
        model,
        "d.jsonl",
        template=template if built_in else "./own.jinja",
        packing=False,
        chat_template_kwargs=kwargs,
    )
    folder = next(Path("cache").glob("*/tokenizer"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [dict(m) for m in row["messages"]]
    ids = tokenizer.apply_chat_template(messages, tools=row.get("tools"), tokenize=True, **kwargs)[
        "input_ids"
    ]
    assert train[0]["input_ids"] == ids
    assert len(tokenizer) == record["vocab_size"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == (record["eos_token"], record["pad_token"])
    assert tokenizer.chat_template == folder.joinpath("chat_template.jinja").read_text()
    text = "Some text, ünd more"
    assert tokenizer(text)["input_ids"][0] == tokenizer.bos_token_id


def test_new_tokens_are_added_and_said(here, base):
    write(Path("d.jsonl"), [CHAT])
    said: list[str] = []
    record, _, _ = make(base, "d.jsonl", template="chatml", said=said)
    assert record["added_tokens"] == ["<|im_end|>", "<|im_start|>"]
    assert any("added to the tokenizer" in line and "<|im_start|>" in line for line in said)
    assert record["eos_token"] == "<|im_end|>" and record["stop_tokens"] == [
        "<|im_end|>",
        "<|endoftext|>",
    ]
    assert record["pad_token"] == "<|im_end|>" and any("no pad token" in line for line in said)
    tokenizer = saved()
    assert len(tokenizer.encode("<|im_start|>", add_special_tokens=False).ids) == 1
    assert record["vocab_size"] == tokenizer.get_vocab_size()


def test_alpaca_ends_with_the_tokenizers_own_eos(here, base):
    write(Path("d.jsonl"), [CHAT])
    record, _, _ = make(base, "d.jsonl", template="alpaca")
    assert record["added_tokens"] == [] and record["stop_tokens"] == ["<|endoftext|>"]


def test_no_template_and_conversations(here, base):
    write(Path("d.jsonl"), [CHAT])
    with pytest.raises(UserError, match="no chat template") as error:
        make(base, "d.jsonl")
    assert "data.template: chatml" in error.value.hint


def test_no_eos(here):
    model = make_model(here / "m", special=())
    Path("d.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(UserError, match="no end-of-sequence token"):
        make(model, "d.jsonl")


def test_template_that_drops_things_rejects_the_row(here, smol):
    write(Path("d.jsonl"), [CALLS, CHAT, talk("Hello", "Hi")])
    assert make(smol, "d.jsonl")[0]["rows"]["rejected_by_reason"] == {
        "template drops tool calls": 1
    }
    no_system = (
        "{% for m in messages if m.role != 'system' %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    )
    Path("own.jinja").write_text(no_system)
    got = make(smol, "d.jsonl", template="./own.jinja")[0]["rows"]["rejected_by_reason"]
    assert got == {"template drops the system turn": 1, "template drops tool calls": 1}


def test_template_that_never_ends_a_turn(here, smol):
    Path("own.jinja").write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    )
    write(Path("d.jsonl"), [CHAT])
    with pytest.raises(UserError, match="no end-of-turn token"):
        make(smol, "d.jsonl", template="./own.jinja")


def test_doubled_first_token(here):
    twice = "{{ bos_token }}{{ bos_token }}"
    turns = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    model = make_model(here / "m", bos="<|start|>", template=twice + turns)
    write(Path("d.jsonl"), [CHAT])
    with pytest.raises(UserError, match="first token twice"):
        make(model, "d.jsonl")


@pytest.mark.parametrize(
    "bomb",
    [
        "{{ 'a' * 10 ** 9 }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "{{ '%1000000000d' % 1 }}",
        "{{ 'a'.center(10000000000) }}",
        "{{ 'a'.ljust(3000000000) }}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set n = namespace(s='aaaaaaaa') %}"
        "{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% for m in messages %}",
    ],
)
def test_hostile_template_is_refused(tmp_path, bomb, monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.5)
    model = make_model(tmp_path / "m", template=bomb)
    started = time.monotonic()
    with pytest.raises(UserError, match="chat template"):
        choose(model, "auto", {})
    assert time.monotonic() - started < 5


def test_bomb_that_waits_for_a_row(here, monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.5)
    template = (
        "{% for m in messages %}{% if m.content == 'now' %}"
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        "{% endif %}{{ m.content + eos_token }}{% endfor %}"
    )
    model = make_model(here / "m", template=template)
    write(Path("d.jsonl"), [CHAT, talk("now", "Hi"), CHAT])
    assert make(model, "d.jsonl")[0]["rows"]["rejected_by_reason"] == {"template too large": 1}


def test_a_template_that_is_slow_on_every_row_ends_the_work(here, monkeypatch):
    """Each row stays within its own limit, and all together within none."""
    monkeypatch.setattr(encode, "SECONDS", 0.3)
    monkeypatch.setattr(encode, "SECONDS_PER_ROW", 0.01)
    slow = "{% for a in range(3000) %}{% for b in range(999) %}{% endfor %}{% endfor %}"
    template = f"{{% if messages[0].content == 'Hi there' %}}{slow}{{% endif %}}{SMOL}"
    model = make_model(here / "m", special=("<|im_end|>", "<|im_start|>"), template=template)
    write(Path("d.jsonl"), [talk("Hi there", f"answer {i}") for i in range(200)])
    with pytest.raises(UserError, match=r"takes too long: [\d.]+ s for \d+ rows, of which row"):
        make(model, "d.jsonl")


def test_saved_folder_holds_nothing_that_runs(here, smol):
    config = json.loads(smol.joinpath("tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["x.Y", None]}, "image_token": "<nowhere>"}
    hostile = make_model(
        here / "m", special=("<|im_end|>", "<|im_start|>"), template=SMOL, **config
    )
    write(Path("d.jsonl"), [CHAT])
    make(hostile, "d.jsonl")
    folder = next(Path("cache").glob("*/tokenizer"))
    assert {p.name for p in folder.iterdir()} == {
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert not {"auto_map", "image_token"} & set(
        json.loads(folder.joinpath("tokenizer_config.json").read_text())
    )
    assert (
        folder.joinpath("tokenizer.json").read_bytes()
        == hostile.joinpath("tokenizer.json").read_bytes()
    )


USES_TOOLS = (
    "\n  {% for t in tools %}{{ t | tojson }}{% endfor %}\n"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + m.content + '<|im_end|>' }}\n"
    "{% endfor %}\n"
)


@pytest.mark.parametrize("place", ["config", "folder"])
def test_conversations_with_tools_take_the_template_named_tool_use(here, place):
    """As transformers chooses; and whoever loads the artifact chooses the same."""
    from transformers import AutoTokenizer

    model = make_model(here / "model", special=("<|im_end|>", "<|im_start|>"))
    default = " \n" + SMOL + "\n"
    if place == "config":
        config = json.loads((model / "tokenizer_config.json").read_text())
        config["chat_template"] = [
            {"name": "tool_use", "template": USES_TOOLS},
            {"name": "default", "template": default},
        ]
        (model / "tokenizer_config.json").write_text(json.dumps(config))
    else:
        (model / "additional_chat_templates").mkdir()
        (model / "additional_chat_templates" / "tool_use.jinja").write_text(USES_TOOLS)
        (model / "chat_template.jinja").write_text(default)
    rows = [{**CHAT, "tools": TOOLS}, CHAT]
    write(Path("d.jsonl"), rows)
    _, train, _ = make(model, "d.jsonl", packing=False)
    theirs = AutoTokenizer.from_pretrained(model)
    ours = AutoTokenizer.from_pretrained(next(Path("cache").glob("*/tokenizer")))
    texts = []
    for row in rows:
        texts.append(
            theirs.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False)
        )
        again = ours.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False)
        assert again == texts[-1]
    assert "weather" in texts[0] and "weather" not in texts[1]
    decoded = [ours.decode(row["input_ids"]) for row in train]
    assert sorted(decoded) == sorted(texts)


def test_default_template_alone_in_the_config(tmp_path):
    named = [{"name": "rag", "template": "x"}, {"name": "default", "template": SMOL}]
    model = make_model(tmp_path / "m", special=("<|im_end|>", "<|im_start|>"), chat_template=named)
    assert choose(model, "auto", {}).template == SMOL


def test_syntax_error_has_a_line():
    with pytest.raises(UserError, match="line 2"):
        Template("{{ 1 }}\n{% if %}", {}, {})
