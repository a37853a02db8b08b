"""What a row says is in its tokens, or the row is refused.

Against every template that lies here: those of five families, the shipped ones, and TRL's.
"""

from __future__ import annotations

import copy
import json
import random
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import tokenizers
from transformers.utils.chat_template_utils import render_jinja_template

from llmpipe.data.encode import NO_TOKEN, Encoder, Encoding
from llmpipe.data.formats import Rejected
from llmpipe.data.kinds.labels import LABELS
from llmpipe.data.kinds.pairs import PAIRS
from llmpipe.data.kinds.prompts import PROMPTS
from llmpipe.data.kinds.rows import ROWS
from llmpipe.data.prepare import prepare
from llmpipe.data.template import Template, choose, prompt, turns
from llmpipe.data.template.proof import CUT, EMPTY_THOUGHT, NO_DETAILS, NO_NAMES, UNMARKED
from llmpipe.data.template.shipped import shipped
from llmpipe.data.template.spans import CUT_BEFORE, LATE, OPENS_THOUGHT, UNASKED
from llmpipe.recipe.sections import Data, Pairs, Preparation, Prompts
from llmpipe.report.rows import show_rows

from .conftest import make_model, write

HERE = Path(__file__).parent / "templates"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
ENDS = (
    *("<|im_end|>", "<|eot_id|>", "</s>", "<end_of_turn>", "<|return|>", "<|end|>", "<turn|>"),
    *("<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>", "<|eot|>", "<|endoftext|>", "<|call|>"),
)
FAMILIES = {path.stem: path.read_text() for path in sorted(HERE.glob("*.jinja"))}
SHIPPED = {name: shipped(name) for name in ("chatml", "llama3", "alpaca")}


def of_trl() -> dict[str, str]:
    spec = find_spec("trl")
    assert spec and spec.origin
    folder = Path(spec.origin).parent / "chat_templates"
    return {f"trl-{path.stem}": path.read_text() for path in sorted(folder.glob("*.jinja"))}


def compiled(text: str, **kwargs) -> Template:
    return Template(text, SPECIAL, kwargs, ENDS)


def rendered(text: str, messages: list, tools=None, open_turn=False) -> str:
    """As transformers renders it."""
    texts, _ = render_jinja_template(
        [copy.deepcopy(messages)],
        tools=tools,
        chat_template=text,
        add_generation_prompt=open_turn,
        **SPECIAL,
    )
    return texts[0]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def call(name: str, number: int = 0, /, **arguments) -> dict:
    function = {"name": name, "arguments": arguments}
    return {"type": "function", "function": function, "id": f"call{number:05}"}


def result(text: str, number: int = 0, **more) -> dict:
    return {"role": "tool", "content": text, "tool_call_id": f"call{number:05}", **more}


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells how warm it is.",
        "parameters": {
            "type": "object",
            "properties": {
                "town": {"type": "string", "description": "Where to look."},
                "unit": {"type": "string", "enum": ["celsius", "kelvin"]},
            },
            "required": ["town"],
        },
    },
}


def refused(text: str, messages: list, tools=None, first: int = 0) -> str:
    with pytest.raises(Rejected) as error:
        turns(compiled(text), messages, tools, first)
    return str(error.value)


def learned(text: str, messages: list, tools=None) -> list[str]:
    reading = turns(compiled(text), messages, tools)
    return [reading.text[start:end] for start, end in reading.spans]


# --- what is dropped is named ---------------------------------------------------------------------

THOUGHT = [user("2 + 3?"), assistant("5", reasoning_content="Two and three make five.")]
CALLS = [
    user("How old is the bridge?"),
    assistant("Let me search for it.", tool_calls=[call("search", query="age of the bridge")]),
    result("120 years"),
    assistant("120 years."),
]
NO_TOOLS = "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
def test_thinking(field):
    row = [user("2 + 3?"), assistant("5", **{field: "Two and three make five."})]
    assert "template drops the thinking: turn 2" in refused(NO_TOOLS, row)
    assert learned(SHIPPED["chatml"], row) == [
        "<think>\nTwo and three make five.\n</think>\n\n5<|im_end|>"
    ]
    for name in ("llama3", "alpaca"):
        assert "template drops the thinking: turn 2" in refused(SHIPPED[name], row)


def test_thinking_that_stands_elsewhere_too():
    row = [user("Say hm"), assistant("hm", reasoning_content="hm")]
    assert "template drops the thinking" in refused(NO_TOOLS, row)


def test_a_call_whose_words_stand_in_the_text():
    """Name, key and value are all there, and yet nothing is called."""
    text = 'I search with query "age of the bridge".'
    row = [CALLS[0], assistant(text, tool_calls=CALLS[1]["tool_calls"]), *CALLS[2:]]
    assert "template drops tool calls: turn 2" in refused(NO_TOOLS, row)
    assert "template drops tool calls: turn 2" in refused(NO_TOOLS, CALLS)


@pytest.mark.parametrize(
    "written",
    [
        "c.function.name",
        "c.function.name + c.function.arguments.keys() | join(',')",
        "c.function.arguments | tojson",
        "c.function.name + c.function.arguments.values() | join(',')",
        "(c.function.name + c.function.arguments | tojson) if loop.first else ''",
        "(c.function.name + (c.function.arguments | tojson)[:20])",
    ],
)
def test_a_part_of_a_call(written):
    text = (
        "{% for m in messages %}{{ m.role + m.content }}{% for c in m.tool_calls or [] %}"
        "{{ " + written + " }}{% endfor %}{{ eos_token }}{% endfor %}"
    )
    two = [call("search", query="a"), call("find", 1, name="b", many=3, deep={"x": [1.5, "y"]})]
    row = [user("Go"), assistant("", tool_calls=two), result("1"), result("2", 1), assistant("So")]
    assert "template drops tool calls: turn 2" in refused(text, row)


@pytest.mark.parametrize(
    "written",
    [
        "m.content.replace('/no_think', '')",  # as SmolLM3 and Nemotron do
        "m.content | replace('day', 'night')",
        "m.content.split('/no_think') | join('\n')",
    ],
)
def test_words_that_are_taken_out_of_a_text(written):
    text = f"{{% for m in messages %}}{{{{ m.role + ({written}) + eos_token }}}}{{% endfor %}}"
    for turn, row in enumerate(
        [
            [user("Say day /no_think to me"), assistant("Hi.")],
            [user("Hi"), assistant("Good day /no_think you.")],
        ]
    ):
        assert f"template changes the {('user', 'assistant')[turn]}'s" in refused(text, row)
        assert f"turn {turn + 1} is rendered with other words" in refused(text, row)
    assert learned(text, [user("Say it"), assistant("Hi.")]) == ["assistantHi.</s>"]


def test_roles_that_are_skipped():
    without = (
        "{{% for m in messages if m.role != '{}' %}}{{{{ m.role + m.content }}}}{}{{% endfor %}}"
    )
    calls = "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}{{ eos_token }}"
    assert "template drops tool results: turn 3" in refused(without.format("tool", calls), CALLS)
    assert "template drops the user's turn: turn 1" in refused(without.format("user", calls), CALLS)
    system = [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Be kind. Hello")]
    assert "template drops the system turn: turn 1" in refused(
        without.format("system", calls), system
    )


def test_only_the_first_of_parallel_results():
    text = (
        "{% for m in messages %}{% if m.role != 'tool' or loop.previtem.role != 'tool' %}"
        "{{ m.role + m.content }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}"
        "{{ eos_token }}{% endif %}{% endfor %}"
    )
    both = [call("weather", town="Lima"), call("weather", 1, town="Rome")]
    row = [user("Warm?"), assistant("", tool_calls=both), result("30"), result("30", 1)]
    assert "template drops tool results: turn 4" in refused(text, [*row, assistant("Yes, 30.")])


def named_call(name: str) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": {}}}


@pytest.mark.parametrize(
    ("calls", "results"),
    [
        ([call("warm", 1), call("warm", 2)], [result("30", 2), result("18", 1)]),
        ([call("warm", 1), call("warm", 2)], [result("18", 2)]),
        ([call("warm", 1)], [result("18", 9)]),
        ([call("warm", 1)], [result("18", 1), result("30", 2)]),
        (
            [named_call("warm"), named_call("hour")],
            [{"role": "tool", "name": name, "content": "9"} for name in ("hour", "warm")],
        ),
    ],
)
def test_results_in_the_place_of_another_call(calls, results):
    """Where a template tells by their order alone whose result it is."""
    row = [user("Warm?"), assistant("", tool_calls=calls), *results, assistant("Yes.")]
    assert "template drops ids: turn" in refused(SHIPPED["chatml"], row)
    if {it.get("tool_call_id", "") for it in results} <= {it.get("id") for it in calls}:
        assert learned(FAMILIES["mistral"], row)  # which writes ids


def test_results_in_the_order_of_calls():
    pair = [named_call("warm"), named_call("hour")]
    results = [{"role": "tool", "name": name, "content": "9"} for name in ("warm", "hour")]
    row = [user("?"), assistant("", tool_calls=pair), *results, assistant("Yes.")]
    assert len(learned(SHIPPED["chatml"], row)) == 2
    calls = [assistant("", tool_calls=[call("warm", i)]) for i in (1, 2)]
    row = [user("?"), *calls, result("30", 1), result("18", 2), assistant("Yes.")]
    assert len(learned(SHIPPED["chatml"], row)) == 3


@pytest.mark.parametrize(
    "written",
    [
        "",
        "{{ tools[0].function.name }}",
        "{{ tools[0].function.name + tools[0].function.description }}",
        "{{ tools[0].function.name }}{{ tools[0].function.parameters | tojson }}",
        "{% for t in tools %}{{ t.function.name + t.function.description }}"
        "{{ t.function.parameters.properties.keys() | list }}{% endfor %}",
    ],
)
def test_tools(written):
    assert "template drops the tools" in refused(
        written + NO_TOOLS,
        [user("The weather in town?"), assistant("I need the tool weather.")],
        [WEATHER],
    )


# as gpt-oss writes tools: what it finds among properties, and no more
PROPERTIES = (
    "{% for t in tools %}{{ t.function.name + t.function.description }}"
    "{% for name, it in (t.function.parameters.properties or {}).items() %}"
    "{{ name + it.type + (it.description or '') }}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    "parameters",
    [
        {"town": {"type": "str", "description": "Where to look."}},  # as xLAM has them
        {"town": {"type": "str"}},
        {"type": {"description": "Of the tram."}},
        json.dumps(WEATHER["function"]["parameters"]),
    ],
)
def test_parameters_that_are_no_schema(parameters):
    tool = {"type": "function", "function": {**WEATHER["function"], "parameters": parameters}}
    row = [user("Warm?"), assistant("Yes.")]
    assert "template drops the tools" in refused(PROPERTIES + NO_TOOLS, row, [tool])
    assert learned(SHIPPED["chatml"], row, [tool]) == ["Yes.<|im_end|>"]


@pytest.mark.parametrize("detail", [{"enum": [3, 7]}, {"default": "Lima"}, {"default": 7}])
def test_details_that_are_numbers_or_defaults_are_noted(detail):
    schema = {"properties": {"line": {"type": "integer", **detail}}}
    tool = {"function": {**WEATHER["function"], "parameters": schema}}
    row = [user("Warm?"), assistant("Yes.")]
    assert turns(compiled(PROPERTIES + NO_TOOLS), row, [tool]).notes == {NO_DETAILS}
    assert turns(compiled(SHIPPED["chatml"]), row, [tool]).notes == set()


def test_details_of_tools_are_noted():
    written = (
        "{% for t in tools %}{{ t.function.name + t.function.description }}"
        "{% for k, v in t.function.parameters.properties.items() %}{{ k + (v.description or '') }}"
        "{% endfor %}{% endfor %}"
    )
    reading = turns(compiled(written + NO_TOOLS), [user("Hi"), assistant("Ho")], [WEATHER])
    assert NO_DETAILS in reading.notes
    whole = turns(compiled(SHIPPED["chatml"]), [user("Hi"), assistant("Ho")], [WEATHER])
    assert NO_DETAILS not in whole.notes


def test_names_of_turns_are_noted():
    row = [{**user("Hi"), "name": "Ann"}, assistant("Ho")]
    assert turns(compiled(SHIPPED["chatml"]), row).notes == {NO_NAMES}
    named = "{% for m in messages %}{{ (m.name or m.role) + m.content + eos_token }}{% endfor %}"
    assert turns(compiled(named), row).notes == set()


def test_what_a_model_answered_is_not_held_against_the_template():
    reading = turns(compiled(NO_TOOLS), THOUGHT, proven=False)
    assert reading.text[slice(*reading.spans[0])] == "assistant5</s>"


# --- habits ---------------------------------------------------------------------------------------


def test_earlier_thinking_is_cut_and_noted():
    row = [*THOUGHT, user("And 1?"), assistant("6", reasoning_content="One more.")]
    reading = turns(compiled(FAMILIES["qwen"]), row)
    assert CUT in reading.notes
    spoken = [reading.text[start:end] for start, end in reading.spans]
    assert spoken == ["5<|im_end|>", "<think>\nOne more.\n</think>\n\n6<|im_end|>"]
    # between tags it is the same thought
    tags = [user("2 + 3?"), assistant("<think>\nTwo and three make five.\n</think>\n\n5"), *row[2:]]
    assert turns(compiled(FAMILIES["qwen"]), tags).text == reading.text
    assert CUT in turns(compiled(FAMILIES["qwen"]), tags).notes


def test_thinking_cut_from_every_turn_is_refused():
    tags = [user("2 + 3?"), assistant("<think>\nTwo and three make five.\n</think>\n\n5")]
    assert "template drops the thinking: turn 2" in refused(FAMILIES["deepseek"], tags)
    more = [*tags, user("And 1?"), assistant("6")]
    assert "template drops the thinking: turn 2" in refused(FAMILIES["deepseek"], more)


def test_thinking_that_inference_would_show():
    loop = [
        user("Warm?"),
        assistant("", tool_calls=[call("weather", town="Lima")], reasoning_content="I ask."),
        result("30"),
        assistant("Yes.", reasoning_content="30 is warm."),
        user("Thanks"),
        assistant("Welcome"),
    ]
    reading = turns(compiled(FAMILIES["qwen"]), loop, [WEATHER])
    assert reading.notes == {CUT, CUT_BEFORE, EMPTY_THOUGHT}


def test_prompt_that_opens_a_thought():
    assert turns(compiled(FAMILIES["deepseek"]), [user("Hi"), assistant("Ho")]).notes == {
        OPENS_THOUGHT
    }


def test_tools_before_the_last_question():
    row = [
        {"role": "system", "content": "Be kind."},
        user("Hi"),
        assistant("Ho"),
        user("So"),
        assistant("Yes"),
    ]
    assert turns(compiled(FAMILIES["mistral"]), row, [WEATHER]).notes == {LATE}
    assert turns(compiled(FAMILIES["mistral"]), row[:3], [WEATHER]).notes == set()
    # the last turn has them before it, and it alone is learned
    assert turns(compiled(FAMILIES["mistral"]), row, [WEATHER], first=4).notes == set()


def test_prefix_that_no_habit_explains():
    text = (
        "{{ messages | length }}" + NO_TOOLS + "{% if add_generation_prompt %}assistant{% endif %}"
    )
    row = [user("Hi"), assistant("Ho"), user("So"), assistant("Yes")]
    assert "template renders turns inconsistently: turn 2" in refused(text, row)


def test_template_that_refuses_what_stands_before_a_turn():
    text = (
        "{% if add_generation_prompt and messages | length > 1 %}"
        "{{ raise_exception('no') }}{% endif %}"
        + NO_TOOLS
        + "{% if add_generation_prompt %}assistant{% endif %}"
    )
    row = [user("Hi"), assistant("Ho"), user("So"), assistant("Yes")]
    assert turns(compiled(text), row).notes == {UNASKED}


def test_markers_that_leave_something_out():
    marked = (
        "{% for m in messages %}{{ m.role }}{{ m.reasoning_content or '' }}"
        "{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    assert "the thinking would not be learned" in refused(marked, THOUGHT)
    last = marked.replace("{% if m.role", "{% if loop.last and m.role").replace(
        "{{ m.content }}", "{{ m.content + eos_token }}"
    )
    reading = turns(compiled(last), [user("Hi"), assistant("Ho"), user("So"), assistant("Yes")])
    assert reading.notes == {UNMARKED}
    assert [reading.text[a:b] for a, b in reading.spans if a < b] == ["Yes</s>"]


# --- of every template ----------------------------------------------------------------------------

WORDS = 'rain Köln 你好 {x} "q" it\'s a\\b <b> 5 true None 🙂 &amp; line\nbreak'.split(" ")


def random_row(rng: random.Random) -> tuple[list, list | None]:
    def text() -> str:
        words = " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))
        return (
            rng.choice(["", "", " ", "\n"])
            + words
            + f" {rng.randint(0, 9)}"
            + rng.choice(["", " \n"])
        )

    def answer(**more) -> dict:
        thought = rng.random()
        if thought < 0.2:
            return assistant(text(), reasoning_content=text(), **more)
        return assistant(f"<think>\n{text()}\n</think>\n\n" * (thought > 0.85) + text(), **more)

    tools = [WEATHER] if rng.random() < 0.4 else None
    messages = [{"role": "system", "content": text()}] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 3)):
        messages.append(user(text()))
        if tools and rng.random() < 0.6:
            count = rng.choice([1, 1, 2])
            values = [
                {"town": text(), "days": rng.choice([0, 3, -1.5, True, None, [text(), {"a": 1}]])}
                for _ in range(count)
            ]
            messages.append(
                answer(tool_calls=[call("weather", i, **v) for i, v in enumerate(values)])
            )
            if rng.random() < 0.5:
                messages[-1]["content"] = ""
            messages += [result(text(), i, name="weather") for i in range(count)]
        messages.append(answer())
    return messages, tools


def texts_of(messages: list) -> list[tuple]:
    """Paths to every text of a conversation."""
    paths = []

    def walk(value, path):
        if isinstance(value, dict):
            for name, item in value.items():
                if name not in ("role", "type", "id", "tool_call_id") and (name, path[2:]) != (
                    "name",
                    (),
                ):
                    walk(item, (*path, name))
        elif isinstance(value, list):
            for i, item in enumerate(value):
                walk(item, (*path, i))
        elif isinstance(value, str) and value.strip():
            paths.extend([path, (path[0], "thought")] if value.startswith("<think>") else [path])

    walk(messages, ())
    return paths


def changed(messages: list, path: tuple) -> list:
    """The conversation with one more word in one of its texts."""
    messages = copy.deepcopy(messages)
    *way, last = path
    if last == "thought":
        message = messages[way[0]]
        message["content"] = message["content"].replace("<think>\n", "<think>\nchanged ", 1)
        return messages
    at = messages
    for step in way:
        at = at[step]
    before, after = at[last].rsplit(" ", 1) if " " in at[last].strip() else ("", at[last])
    at[last] = f"{before} changed {after}"
    return messages


EVERY = {**FAMILIES, **SHIPPED, **of_trl()}


@pytest.mark.parametrize("name", EVERY)
def test_what_is_accepted_is_rendered_and_what_is_dropped_is_refused(name):
    """Checked by other means: whether transformers' rendering changes with a text."""
    text = EVERY[name]
    rng = random.Random(name)
    template = compiled(text)
    for _ in range(12):
        messages, tools = random_row(rng)
        try:
            reading = turns(template, messages, tools)
        except Rejected as error:
            if not error.reason.startswith("template drops"):
                continue
            if error.reason == "template drops the tools":
                assert "how warm it is" not in rendered(text, messages, tools)
                continue
            whole = rendered(text, messages, tools)
            turn = int(error.detail.split()[1]) - 1
            of_turn = [path for path in texts_of(messages) if path[0] == turn]
            assert any(rendered(text, changed(messages, p), tools) == whole for p in of_turn)
            continue
        whole = rendered(text, messages, tools)
        assert reading.text == whole
        assert prompt(template, messages[:-1], tools).text == rendered(
            text, messages[:-1], tools, open_turn=True
        )
        for path in texts_of(messages):
            if rendered(text, changed(messages, path), tools) == whole:
                assert CUT in reading.notes and path[-1] in ("reasoning_content", "thought"), path
        spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i, (start, end) in zip(spoken, reading.spans, strict=True):
            if reading.notes <= {CUT, EMPTY_THOUGHT, NO_DETAILS}:
                assert whole[:start] == rendered(text, messages[:i], tools, open_turn=True)
            assert start < end and (i == spoken[-1] or end < len(whole))


# --- characters without a token -------------------------------------------------------------------


@pytest.mark.parametrize("unknown", ["<unk>", None])
def test_characters_that_the_tokenizer_has_no_token_for(here, unknown):
    """They become one that says nothing, or none at all."""
    pieces = sorted({*CHAT_TOKENS, *"<>|_/\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLM.!?"})
    vocabulary = {piece: i for i, piece in enumerate([*([unknown] if unknown else []), *pieces])}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token=unknown))
    bpe.add_special_tokens(list(CHAT_TOKENS))
    folder = here / "bpe"
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<|im_end|>", **({"unk_token": unknown} if unknown else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "chat_template.jinja").write_text(SHIPPED["chatml"])
    rows = [
        {"messages": [user("Hi"), assistant("日本")]},
        {"messages": [user("a 😀"), assistant("b")]},
        {"prompt": [user("c")], "completion": [assistant("d é")]},
        GOOD,
    ]
    ready, rejected = prepared(ROWS, rows, Data, folder, packing=False)
    assert ready.rows.rejected_by_reason == {"no token": 2, "missing column": 1}
    assert "'日'" in rejected[0]["detail"] and "'😀'" in rejected[1]["detail"]
    pair = {"prompt": [user("Hi")], "chosen": [assistant("é")], "rejected": [assistant("e")]}
    good = {**pair, "chosen": [assistant("a")]}
    ready, _ = prepared(PAIRS, [pair, good], Pairs, folder)
    assert ready.rows.rejected_by_reason == {"no token": 1}
    ready, _ = prepared(PROMPTS, [{"prompt": [user(text)]} for text in "aé"], Prompts, folder)
    assert ready.rows.rejected_by_reason == {"no token": 1}
    ready, _ = prepared(ROWS, [{"text": "a é"}, {"text": "b"}], Data, folder)
    assert ready.sources[0].noted[NO_TOKEN] == 1


# --- texts that spell special tokens --------------------------------------------------------------

CHAT_TOKENS = ("<|im_end|>", "<|im_start|>", "<|fim|>")


def prepared(kind, rows: list, data: type, model: Path, said: list | None = None, **fields):
    write(Path("d.jsonl"), rows)
    recipe = data.model_validate({"train": [{"path": "d.jsonl"}], "max_rejected": 1.0, **fields})
    said = [] if said is None else said
    ready = prepare(recipe, kind, model, Path("cache"), seed=0, say=said.append)
    lines = ready.folder(Path("cache")).joinpath("rejected.jsonl").read_text().splitlines()
    return ready, [json.loads(line) for line in lines]


@pytest.fixture
def model(here) -> Path:
    return make_model(here / "model", special=CHAT_TOKENS, template=SHIPPED["chatml"])


GOOD = {"messages": [user("Hi"), assistant("Ho")]}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("What is <|im_end|>?"), assistant("A token.")]},
        {"messages": [user("What is <|fim|>?"), assistant("A token.")]},
        {"messages": [user("Hi"), assistant("It is <|im_end|>")]},
        {"messages": [user("Hi"), assistant("So", reasoning_content="a <|im_start|>")]},
        {"messages": [{"role": "system", "content": "<|im_start|>"}, *GOOD["messages"]]},
        {"messages": [*CALLS[:2], result("<|im_end|>"), *CALLS[3:]]},
        {
            "messages": [
                CALLS[0],
                assistant("", tool_calls=[call("find", what={"a": ["<|im_end|>"]})]),
                *CALLS[2:],
            ]
        },
        {**GOOD, "tools": [json.loads(json.dumps(WEATHER).replace("Where", "<|im_end|>"))]},
    ],
)
def test_turns_that_spell_a_special_token_are_refused(model, row):
    ready, rejected = prepared(ROWS, [row, GOOD], Data, model, packing=False)
    assert ready.rows.rejected_by_reason == {"text spells a special token": 1}
    assert "which the tokenizer reads as a token" in rejected[0]["detail"]


def test_what_the_assistant_may_write(model):
    """A special token that no template writes, tags of thinking, and tokens that are none."""
    rows = [
        {"messages": [user("Fill"), assistant("a <|fim|> b")]},
        {"messages": [user("Think"), assistant("<think>\nhm\n</think>\n\nSo <im_end> [INST]")]},
    ]
    said: list[str] = []
    ready, rejected = prepared(ROWS, rows, Data, model, said, packing=False)
    assert rejected == []
    note = "the assistant's turns hold <|fim|>, which is learned as a token"
    assert ready.sources[0].noted[note] == 1
    assert any(f"{note}: 1 row" in line for line in said)


def test_plain_texts_may_spell_tokens_and_it_is_noted(model):
    note = "texts hold <|im_end|>, which is read as that token"
    rows = [{"text": "one<|im_end|>two"}, {"text": "three<|im_end|>"}, {"text": "four"}]
    assert prepared(ROWS, rows, Data, model)[0].sources[0].noted[note] == 1
    rows = [{"prompt": "<|im_start|>user\nHi<|im_end|>\n", "completion": "Ho"}]
    ready, _ = prepared(ROWS, rows, Data, model)
    assert ready.sources[0].noted["texts hold <|im_start|>, which is read as that token"] == 1


def test_pairs_and_prompts_are_proven_too(here):
    bare = make_model(
        here / "bare", special=CHAT_TOKENS, template=NO_TOOLS.replace("eos_token", "'<|im_end|>'")
    )
    thought = assistant("5", reasoning_content="Two and three.")

    def pair(asked: str, better: dict, worse: str = "6", **more) -> dict:
        return {"prompt": [user(asked)], "chosen": [better], "rejected": [assistant(worse)], **more}

    rows = [
        pair("2 + 3?", thought),
        pair("<|im_end|>", assistant("5")),
        pair("2 + 3?", assistant("5"), "<|im_end|>"),
        pair("?", assistant("5"), tools=[WEATHER]),
        pair("2 + 3?", assistant("5")),
    ]
    ready, _ = prepared(PAIRS, rows, Pairs, bare)
    assert ready.rows.kept == 1
    assert ready.rows.rejected_by_reason == {
        "template drops the thinking": 1,
        "template drops the tools": 1,
        "text spells a special token": 2,
    }
    prompts = [
        {"prompt": [user("2 + 3?"), thought, user("More")]},
        {"prompt": [user("<|im_start|>")]},
        {"prompt": [user("?")], "tools": [WEATHER]},
        {"prompt": [user("?")]},
    ]
    ready, _ = prepared(PROMPTS, prompts, Prompts, bare)
    assert ready.rows.kept == 1
    assert ready.rows.rejected_by_reason == {
        "template drops the thinking": 1,
        "template drops the tools": 1,
        "text spells a special token": 1,
    }


def test_only_what_the_assistant_says_of_an_answer_is_learned(model):
    """Users and tools speak between its turns, in pairs and in judged responses alike."""
    asked, better, again = user("How old is it?"), assistant("Old."), user("In years?")
    rows = [
        {"prompt": [asked], "chosen": CALLS[1:], "rejected": [assistant("I forgot.")]},
        {
            "chosen": [asked, better, again, assistant("120")],
            "rejected": [asked, assistant("New."), user("Really?"), assistant("So it is.")],
        },
    ]
    turn = "<|im_end|>\n<|im_start|>"
    between = f"{turn}user\n<tool_response>\n120 years\n</tool_response>{turn}assistant\n"
    ready, _ = prepared(PAIRS, rows, Pairs, model)
    shown = "\n".join(show_rows(ready, Path("cache"), 2, colour=False))
    assert (
        f"</tool_call><|im_end|>]]{between[len('<|im_end|>') :]}[[120 years.<|im_end|>]]" in shown
    )
    assert "[[Old.<|im_end|>]]\n<|im_start|>user\nIn years?" in shown
    assert "[[New.<|im_end|>]]\n<|im_start|>user\nReally?" in shown
    judged = [{"prompt": [asked], "completion": row["chosen"][-3:], "label": 1} for row in rows]
    ready, _ = prepared(LABELS, judged, Pairs, model)
    shown = "\n".join(show_rows(ready, Path("cache"), 2, colour=False))
    assert "<|im_end|>]]\n<|im_start|>user\n<tool_response>" in shown
    assert "[[Old.<|im_end|>]]\n<|im_start|>user\nIn years?" in shown


@pytest.mark.parametrize("name", [*FAMILIES, *SHIPPED])
def test_tokens_are_those_of_transformers_and_learned_is_what_inference_has_to_write(here, name):
    from transformers import AutoTokenizer

    tokens = (
        "</s>",
        "<|im_end|>",
        "<|im_start|>",
        "<|eot_id|>",
        "<end_of_turn>",
        "<start_of_turn>",
    )
    folder = make_model(here / "model", special=tokens, bos="<s>")
    Path("own.jinja").write_text(EVERY[name])
    choice = choose(folder, name if name in SHIPPED else "./own.jinja", {})
    choice.tokenizer.save(here / "saved", choice.template)
    preparation = Preparation(max_length=1 << 40)
    encoder = Encoder(Encoding(here / "saved", choice.ends, choice.text_eos, preparation))
    theirs = AutoTokenizer.from_pretrained(here / "saved")
    rng = random.Random(name)
    kept = 0
    for _ in range(20):
        messages, tools = random_row(rng)
        encoder.noted.clear()
        try:
            row = encoder.conversation(messages, tools)
        except Rejected:
            continue
        kept += 1
        whole = theirs.apply_chat_template(messages, tools=tools)["input_ids"]
        assert row.ids == whole
        assert (
            encoder.prompt(messages[:-1], tools)
            == (
                theirs.apply_chat_template(messages[:-1], tools=tools, add_generation_prompt=True)[
                    "input_ids"
                ]
            )
        )
        ends = [theirs.convert_tokens_to_ids(choice.stop_tokens[0])]
        begin, stop = row.spoken()[-1]
        assert whole[stop - 1] in ends
        if not encoder.noted & {OPENS_THOUGHT, LATE, CUT_BEFORE}:
            asked = theirs.apply_chat_template(
                messages[:-1], tools=tools, add_generation_prompt=True
            )["input_ids"]
            assert whole[:begin] == asked
    assert kept >= 4


@pytest.mark.parametrize(
    ("content", "learned_text"),
    [
        ("<think>\nhm\n</think>\n\nHi", "<think>\nhm\n</think>\n\nHi<|im_end|>"),
        ("hm\n</think>\n\nHi", "<think>\nhm\n</think>\n\nHi<|im_end|>"),  # the prompt opened it
        ("<think>\n\n</think>\n\nHi", "<think>\n\n</think>\n\nHi<|im_end|>"),
        (" \n<think> hm </think> Hi \n", "<think>\n hm \n</think>\n\n Hi \n<|im_end|>"),
        ("<b>Hi</b> \n", "<think>\n\n</think>\n\n<b>Hi</b> \n<|im_end|>"),
        ("First <think>hm</think>Hi", None),  # Qwen leaves out what stands before the tag
        ("<think>a</think>b<think>c</think>Hi", None),
    ],
)
def test_thinking_between_tags(content, learned_text):
    row = [user("Hello"), assistant(content)]
    if learned_text is None:
        assert refused(FAMILIES["qwen"], row).startswith("template ")
    else:
        assert learned(FAMILIES["qwen"], row) == [learned_text]
    assert learned(SHIPPED["chatml"], row) == [content + "<|im_end|>"]


def test_long_runs_of_white_space_and_tags_take_no_time():
    text = " " * 50_000 + "<a>" * 20_000 + "x" + "<b> " * 20_000 + " " * 50_000
    started = time.process_time()
    turns(compiled(FAMILIES["qwen"]), [user(text), assistant(f"{text}</think>{text}")])
    turns(
        compiled("{{ 'S' if messages[0].content[0] == ' ' }}" + NO_TOOLS),
        [user(text), assistant("x")],
    )
    assert time.process_time() - started < 2
