"""Every kind of broken row is named by file and row, with a reason, and stops the run."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest

from llmpipe.data.fields import Rejected
from llmpipe.data.readers import File, parse, read
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
    "half a surrogate pair in the name of a column": (
        GOOD[:-1] + r', "\ud83d": 1}',
        "broken Unicode",
    ),
    "half a surrogate pair in a name": (
        r'{"messages": [{"role": "user", "content": "x", "\ud83d": 1}]}',
        "broken Unicode",
    ),
    "a name twice": (
        '{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}',
        "two values",
    ),
    "a name twice in arguments": (
        messages(USER)[:-2]
        + r', {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '
        + r'"{\"a\": 1, \"a\": 2}"}}]}]}',
        "two values",
    ),
    "a name twice in messages as text": (
        json.dumps({"messages": '[{"role": "user", "role": "assistant", "content": "x"}]'}),
        "two values",
    ),
    "a name twice in tools": (
        GOOD[:-1] + r', "tools": "[{\"name\": \"f\", \"name\": \"g\"}]"}',
        "two values",
    ),
    "NaN in arguments": (
        messages(USER)[:-2]
        + r', {"role": "assistant", "function_call": {"name": "f", "arguments": '
        + r'"{\"a\": NaN}"}}]}',
        "bad JSON",
    ),
    "a column twice": ('{"messages": [], "x": 1, "messages": []}', "two values"),
    "no number": (GOOD[:-1] + ', "score": NaN}', "bad JSON"),
    "two objects": (GOOD + " " + GOOD, "bad JSON"),
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
        ("d.json", b'[{"text": "a"}]\n\n[{"text": "b"}]', r"d\.json:3: more follows the list"),
        ("d.json", b'[{"text": "a"}]' + b" " * (1 << 18) + b"x", "more follows the list"),
        ("d.json", b'{\n "text": "a"\n}\n{\n "text": "b"\n}', r"d\.json:1: an object over"),
        ("d.json", b'{"data": [\n {"text": "a"}\n]}', r"jq -c '\.data\[\]' d\.json"),
        ("d.json", b'{"version": 1, "data": [{"text": "a"}]}', "around a list of rows"),
        ("d.parquet", b"PAR1 nonsense", r"d\.parquet:1: cannot be read as parquet"),
        ("d.xlsx", b"x", "is a Hub data set|not a known kind"),
        ("d.csv", b"a,b\n1,2\n", "no format fits the columns a, b"),
        ("d.csv", b"prompt,completion\n", "has no rows"),
        (
            "d.csv",
            b"text, id ,text\na,b,c\n",
            r"d\.csv:1: two columns are called 'text', number 1 and 3",
        ),
        ("d.csv", b"\n\ntext,text\na,b\n", r"d\.csv:3: two columns"),
        ("d.csv", b"prompt,completion,\xf6\na,b,c\n", r"d\.csv:1: the header is not UTF-8"),
        ("d.csv", b"prompt;completion\na;b\n", "one column with semicolons, not commas"),
        ("d.csv", b"prompt\tcompletion\na\tb\n", "one column with tabs, not commas"),
        ("d.tsv", b"prompt,completion\na,b\n", "one column with commas, not tabs"),
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


def rejected() -> list[tuple[int, str]]:
    """Line and reason of every row of the newest preparation that cannot be used."""
    newest = max(Path("cache").glob("*/rejected.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    lines = newest.read_text().splitlines()
    return [(line["row"], line["reason"]) for line in map(json.loads, lines)]


REFUSED = "refused"
HEADER = b"prompt,completion\n"


@pytest.mark.parametrize(
    ("rows", "kept", "reasons"),
    [
        # a quote that is never closed costs its line alone, wherever it stands
        (b'a,"b\nc,d\ne,f\n', 2, [(2, "bad quotes")]),
        (b'a,b\nc,d\n"e,f\n', 2, [(4, "bad quotes")]),
        (b'a,"b\nc,d\n' + b"e,f\n" * 5000, 5001, [(2, "bad quotes")]),
        (b'a,"b" c\nd,e\n', 1, [(2, "bad quotes")]),
        (b'a,"b\nc,"d"\ne,f\n', 2, [(2, "bad quotes")]),
        (b'a, "b"\nc,d\n"e", "f"\n', 1, [(2, "bad quotes"), (4, "bad quotes")]),
        (b'a," ""b"""\nc,d\n', 2, []),
        # two readings: a field of three lines, or three rows
        (b'a,"b\nc,d\ne,f"\ng,h\n', 1, [(n, "unclear quotes") for n in (2, 3, 4)]),
        (b'a,"Oh, b\nc,d, e\ne,f"\ng,h\n', 1, [(n, "unclear quotes") for n in (2, 3, 4)]),
        # one reading: as RFC 4180 has it
        (b'a,"b\n\nc"\nd,e\n', 2, []),
        (b'a,"Roses are red,\nviolets, as we know, are not,\n"\nd,e\n', 2, []),
        (b'a,"say ""x,y""\nand u,v to ""me"""\nd,e\n', 2, []),
        (b'"a, b\nc, d",e\nf,g\n', 2, []),
        (b'a,"In all\nthere are 4,957"\nd,e\n', 2, []),
        (b'a,"""b"""\na,"b\nc,d"\n', 2, []),
        # a row that is none
        (b"a,b\nprompt,completion\nc,d\n", 2, [(3, "the header again")]),
        (b'a,"b\n\nc",d\ne,f\n', 1, [(2, "wrong number of fields")]),
        (b"a,b\n\n\nc\nd,e\n", 2, [(5, "wrong number of fields")]),
    ],
)
def test_a_stray_quote_swallows_no_rows(here, base, rows, kept, reasons):
    for name, end in (("d.csv", b"\n"), ("e.csv", b"\r\n"), ("f.csv", b"\r")):
        Path(name).write_bytes((HEADER + rows).replace(b"\n", end))
        record = make(base, f"./{name}", template="chatml")[0]["rows"]
        assert (record["kept"], rejected()) == (kept, reasons)
        assert record["read"] == kept + len(reasons)


@pytest.mark.parametrize(
    ("rows", "texts"),
    [
        (b'a\t"Oh, b\nc\td\ne\tf"\n', ['"Oh, b', "d", 'f"']),  # without quotes
        (b'a\t"b\nc\td\n', ['"b', "d"]),
        (b'a\t"b" c\nd\te\n', ['"b" c', "e"]),
        (b'a\t"b\tc"\nd\te\n', ["b\tc", "e"]),  # with quotes
        (b'a\t"b\nc"\nd\te\n', ["b\nc", "e"]),
        (b'a\t"b ""c"" d"\n', ['b "c" d']),
        (b'a\t"b\nc\td"\ne\t"f\n\ng"\n', ['"b', 'd"', "f\n\ng"]),
        (b'e\t"f\n\ng"\na\t"b\nc\td"\nh\ti\n', ["f\n\ng", REFUSED, REFUSED, "i"]),
        (b'a\t"b ""c"" d"\na\t"b\nc\td"\n', ['b "c" d', "b\nc\td"]),
    ],
)
def test_a_tsv_is_read_with_quotes_where_they_make_sense(here, rows, texts):
    path = Path("d.tsv")
    path.write_bytes(b"prompt\tcompletion\n" + rows)
    file = File("d.tsv", "d.tsv", path, path.stat().st_size, "")
    rows = [row.payload for row, _ in read(file)]
    assert [
        REFUSED if isinstance(it, Rejected) else parse(it)["completion"] for it in rows
    ] == texts


def test_a_column_without_a_name_is_said(here, base):
    Path("d.csv").write_bytes(b",prompt,completion,\n0,a,b,\n1,c,d,\n")
    said: list[str] = []
    assert make(base, "./d.csv", template="chatml", said=said)[0]["rows"]["kept"] == 2
    unused = "not used: column 1 without a name, column 4 without a name"
    assert any(unused in line for line in said)


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_what_csv_writes_is_read_as_it_was_or_refused(here, quoting):
    draw = random.Random(quoting)
    parts = ["a", "word", " ", " ", "\n", "\n\n", '"', ",", ", ", "\t", "é", "你", "x,y", "''"]
    path = Path("d.csv")
    refused = 0
    for _ in range(400):
        rows = [
            ["".join(draw.choices(parts, k=draw.randint(1, 12))) for _ in range(2)]
            for _ in range(draw.randint(1, 6))
        ]
        with path.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, quoting=quoting).writerows([["prompt", "completion"], *rows])
        file = File("d.csv", "d.csv", path, path.stat().st_size, "")
        for row, _ in read(file):
            if isinstance(row.payload, Rejected):
                refused += 1
            else:
                assert list(parse(row.payload).values()) in rows
    assert refused < 40
