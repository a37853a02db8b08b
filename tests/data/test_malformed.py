"""Every kind of broken row is named by file and row, with a reason, and stops the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmpipe.errors import UserError

from .conftest import make, talk

GOOD = json.dumps(talk("Hello", "Hi"))


def messages(*pairs) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in pairs]})


USER = ("user", "Hello")
LINES = {
    "bad JSON": (b'{"messages": nonsense}', "bad JSON"),
    "cut line": (GOOD.encode()[:40], "bad JSON"),
    "latin-1": (
        messages(USER, ("assistant", "sch@n")).encode().replace(b"@", b"\xf6"),
        "not UTF-8",
    ),
    "NUL": (GOOD.encode()[:30] + b"\0" + GOOD.encode()[30:], "NUL character"),
    "escaped NUL": (messages(USER, ("assistant", "a\0b")), "NUL character"),
    "half a surrogate pair": (messages(USER, ("assistant", "\ud83d")), "broken Unicode"),
    "a list": ("[1, 2]", "not an object"),
    "endless nesting": ("[" * 100_000, "bad JSON"),
    "endless number": ('{"messages": ' + "9" * 5000 + "}", "bad JSON"),
    "missing key": ('{"text": "Hello"}', "missing column"),
    "null": ('{"messages": null}', "null"),
    "null content": (messages(USER, ("assistant", None)), "null"),
    "type change": ('{"messages": 7}', "wrong type"),
    "type of content": (messages(USER, ("assistant", 42)), "wrong type"),
    "type of message": ('{"messages": ["Hello", "Hi"]}', "wrong type"),
    "no messages": ('{"messages": []}', "no messages"),
    "empty text": (messages(USER, ("assistant", "  ")), "empty message"),
    "no assistant turn": (messages(USER), "no assistant turn"),
    "unknown role": (messages(USER, ("narrator", "Hi")), "unknown role"),
    "role missing": ('{"messages": [{"content": "x"}]}', "unknown role"),
    "two system turns": (
        messages(("system", "a"), ("system", "b"), USER, ("assistant", "c")),
        "two system turns",
    ),
    "late system turn": (
        messages(USER, ("system", "b"), ("assistant", "c")),
        "system turn not first",
    ),
    "an image": (
        messages(("user", [{"type": "image", "url": "x"}]), ("assistant", "c")),
        "unsupported content",
    ),
    "bad tools": (
        '{"messages": [{"role": "assistant", "content": "x"}], "tools": "{"}',
        "bad tools",
    ),
    "bad tool call": (
        '{"messages": [{"role": "assistant", "tool_calls": [{"x": 1}]}]}',
        "bad tool call",
    ),
    "too long": (messages(("user", "Hello " * 200), ("assistant", "Hi")), "too long"),
}


@pytest.mark.parametrize("kind", LINES)
def test_row_is_named(here, smol, kind):
    line, reason = LINES[kind]
    line = line if isinstance(line, bytes) else line.encode()
    Path("d.jsonl").write_bytes(
        "\n".join([GOOD, GOOD, ""]).encode() + line + b"\n" + GOOD.encode() + b"\n"
    )
    record, train, _ = make(smol, "./d.jsonl", packing=False, max_length=128)
    assert record["rows"]["rejected_by_reason"] == {reason: 1}
    assert (record["rows"]["read"], record["rows"]["kept"], len(train)) == (4, 3, 3)
    lines = next(Path("cache").glob("*/rejected.jsonl")).read_text().splitlines()
    assert [(r["file"], r["row"], r["reason"]) for r in map(json.loads, lines)] == [
        ("d.jsonl", 3, reason)
    ]
    with pytest.raises(UserError, match=rf"\./d\.jsonl:3: {reason}") as error:
        make(smol, "./d.jsonl", max_length=128, max_rejected=0.01)
    assert (
        error.value.code == 2
        and "max_rejected" in error.value.hint
        and "rejected.jsonl" in error.value.hint
    )
    assert f"1 {reason}" in error.value.message
    assert Path("cache/rejected.jsonl").read_text().count("\n") == 1


def test_byte_order_mark_is_no_mistake(here, smol):
    Path("d.jsonl").write_bytes(
        b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n" + GOOD.encode()
    )  # and Windows line ends
    assert make(smol, "d.jsonl")[0]["rows"]["kept"] == 2
    Path("e.json").write_bytes(b"\xef\xbb\xbf[" + GOOD.encode() + b"]")
    assert make(smol, "e.json")[0]["rows"]["kept"] == 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("d.jsonl", b"", "the file is empty"),
        ("d.jsonl", b"\n\n", "has no rows"),
        ("d.jsonl", "[1]\n".encode("utf-16"), "UTF-16"),
        ("d.jsonl", b"nothing\n", r"d\.jsonl:1: bad JSON"),
        (
            "d.json",
            b'[{"text": "a"},',
            r"d\.json:2: row 2 \(line 1\) is not valid JSON: the file is cut off",
        ),
        ("d.json", b'[{"text": "a"},\n {"text": "b" "c"}]', r"d\.json:2: row 2 \(line 2\)"),
        ("d.json", b'[{"text": "\xf6"}]', r"d\.json:1: not UTF-8"),
        ("d.json", b'"text"', "neither a list of rows nor"),
        ("d.parquet", b"PAR1 nonsense", r"d\.parquet:1: not a readable parquet"),
        ("d.xlsx", b"x", "is a Hub data set|not a known kind"),
        ("d.csv", b"a,b\n1,2\n", "no format fits the columns a, b"),
    ],
)
def test_file_is_named(here, base, name, content, said):
    Path(name).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        make(base, f"./{name}", template="chatml")
    assert error.value.code == 2


def test_nothing_to_learn_is_numeric(here, tmp_path_factory):
    from .conftest import make_model

    # markers around nothing: the loss would be taken over no token
    template = (
        "{% for m in messages %}{{ m.role + ':' + m.content }}{% if m.role == 'assistant' %}"
        "{% generation %}{% endgeneration %}"
        "{{ eos_token if messages | length == 4 else '' }}"
        "{% endif %}{% endfor %}"
    )
    model = make_model(tmp_path_factory.mktemp("m") / "m", template=template)
    Path("d.jsonl").write_text(GOOD + "\n")
    with pytest.raises(UserError, match="nothing to learn") as error:
        make(model, "d.jsonl")
    assert error.value.code == 4


def test_missing_file_gets_a_near_name(here, base):
    Path("train.jsonl").write_text(GOOD)
    with pytest.raises(UserError, match=r"no such file; did you mean 'train\.jsonl'"):
        make(base, "./trian.jsonl")
    with pytest.raises(UserError, match=r"there is no folder"):
        make(base, "./nowhere/train.jsonl")


def test_csv_rows_are_named_by_line(here, base):
    Path("d.csv").write_bytes(b'question,answer\n"a\nb",c\nd\ne,f\xf6\ng,\nh,i\n')
    record, train, _ = make(base, "./d.csv", packing=False, template="chatml")
    lines = next(Path("cache").glob("*/rejected.jsonl")).read_text().splitlines()
    assert [(r["row"], r["reason"]) for r in map(json.loads, lines)] == [
        (4, "wrong number of fields"),
        (5, "not UTF-8"),
        (6, "null"),
    ]
    assert record["rows"]["kept"] == 2 == len(train)
