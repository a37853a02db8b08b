"""What a text alone is scored by: its form, its length, a JSON Schema, and what follows thought."""

import json

import pytest

from llmpipe.errors import UserError
from llmpipe.scores.form import has_form, pattern_of
from llmpipe.scores.lengths import near_target, within_limit
from llmpipe.scores.thinking import behind_thought

THOUGHT = "<think>...</think><answer>...</answer>"


@pytest.mark.parametrize(
    ("form", "answer", "right"),
    [
        (THOUGHT, "<think>a</think><answer>b</answer>", 1),
        (THOUGHT, " <think>\na\n\nb </think>\n\n<answer> 1 < 2 </answer>\n", 1),
        (THOUGHT, "<think>a</think> so <answer>b</answer>", 0),
        (THOUGHT, "<think>a</think><answer>b</answer> and more", 0),
        (THOUGHT, "well, <think>a</think><answer>b</answer>", 0),
        (THOUGHT, "<think></think><answer>b</answer>", 0),
        (THOUGHT, "<think>a</think><answer> \n </answer>", 0),
        (THOUGHT, "<think>a<think>b</think></think><answer>b</answer>", 0),
        (THOUGHT, "<think>a</think><answer>b</answer><answer>c</answer>", 0),
        (THOUGHT, "<think>a<answer>b</answer>", 0),
        (THOUGHT, "", 0),
        ("<think>...</think>...", "<think>a</think> It is 4.", 1),
        ("<think>...</think>...", "<think>a</think>", 0),
        ("...Answer: ...", "2 + 2 is 4.\nAnswer: 4", 1),
        ("...Answer: ...", "2 + 2 is 4.", 0),
        ("Yes", " Yes\n", 1),
        ("Yes", "Yes.", 0),
    ],
)
def test_form(form, answer, right):
    assert has_form(pattern_of(form), answer) == right


@pytest.mark.parametrize("form", ["", " ", "...", "<a>......</a>", "... ...<a>"])
def test_forms_that_say_nothing(form):
    with pytest.raises(ValueError, match=r"form of any answer|nothing tells"):
        pattern_of(form)


def test_a_form_is_read_in_time_that_grows_with_the_answer():
    for text in ("<think>" * 20_000, "<think>" + " " * 200_000, "<think>" + "<answer" * 20_000):
        assert not has_form(pattern_of(THOUGHT), text)


def test_lengths():
    assert [near_target(n, 10) for n in (0, 5, 10, 12, 20, 30)] == [0, 0.5, 1, 0.8, 0, 0]
    assert [within_limit(n, 10) for n in (0, 5, 10, 12, 20, 30)] == [1, 1, 1, 0.8, 0, 0]


def test_what_follows_a_thought():
    assert behind_thought("2 and 2\n</think>\n\n4\n") == "4"
    assert behind_thought("a</think>b</think>c") == "b</think>c"
    assert behind_thought("2 and 2 is 4") == "", "that is no answer yet"


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1}},
    "required": ["n"],
}


@pytest.fixture
def check(tmp_path):
    pytest.importorskip("jsonschema")
    from llmpipe.scores.schemas import schema_check

    def check(schema):
        path = tmp_path / "schema.json"
        path.write_text(schema if isinstance(schema, str) else json.dumps(schema))
        return schema_check(path)

    return check


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ('{"n": 3}', True),
        ('```json\n{"n": 3, "more": null}\n```', True),
        ('{"n": 0}', False),
        ('{"n": 1.5}', False),
        ('{"n": "3"}', False),
        ("{}", False),
        ("3", False),
        ('{"n": NaN}', False),
        ('{"n": ' + "9" * 10_000 + "}", False),
        ("[" * 100_000, False),
        ("no JSON", False),
    ],
)
def test_json_schema(check, answer, right):
    assert check(SCHEMA)(answer) is right


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "schema.json: .*JSON"),
        ("3", "a schema is an object"),
        ({"type": "integr"}, r"schema.json: \$.type: 'integr'"),
        ({"properties": []}, r"\$.properties"),
    ],
)
def test_what_is_no_schema(check, schema, message):
    with pytest.raises(UserError, match=message) as refused:
        check(schema)
    assert refused.value.code == 2


def test_a_schema_fetches_nothing(check):
    fits = check({"$ref": "http://127.0.0.1:9/schema.json"})
    with pytest.raises(UserError, match="is not in it, and nothing is fetched"):
        fits("{}")
