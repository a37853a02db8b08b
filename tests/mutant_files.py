"""Files of rows that are wrong, made of right ones by a seed: in what they say, in how they are
encoded, and in their bytes."""

import bz2
import csv
import decimal
import gzip
import io
import json
import lzma
import random
from datetime import date, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet

from tests import mutants
from tests.attempts import Case
from tests.mutants import hurt, mutate, odd_value, parent_of, paths

TEXTS = [f"What is {i} + {i}? Well, it is {i * 2}, or so they say." for i in range(1, 13)]
TURNS = [
    [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}] for text in TEXTS
]
CALL = {"function": {"name": "f", "arguments": '{"a": 1}'}, "type": "function"}
ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": turns} for turns in TURNS],
    "system": [{"messages": turns, "system": "Be brief."} for turns in TURNS],
    "tools": [
        {
            "messages": [turns[0], {"role": "assistant", "tool_calls": [CALL]}],
            "tools": '[{"name": "f", "parameters": {"type": "object", "properties": {}}}]',
        }
        for turns in TURNS
    ],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "Yes."}]}
        for text in TEXTS
    ],
    "alpaca": [{"instruction": text, "input": "", "output": "Yes."} for text in TEXTS],
    "completion": [{"prompt": text, "completion": "Yes."} for text in TEXTS],
    "text": [{"text": text} for text in TEXTS],
    "preference": [{"prompt": text, "chosen": "Yes.", "rejected": "No."} for text in TEXTS],
    "turns": [
        {"prompt": turns[:1], "chosen": turns[1:], "rejected": [{**turns[1], "content": "No."}]}
        for turns in TURNS
    ],
    "label": [
        {"prompt": text, "completion": "Yes.", "label": i % 2 == 0} for i, text in enumerate(TEXTS)
    ],
    "choice": [{"question": text, "choices": ["a", "b"], "answer": "A"} for text in TEXTS],
    "answer": [{"prompt": text, "answer": "4"} for text in TEXTS],
}
SHAPES = {  # the formats that a stage takes
    "sft": ["messages", "system", "tools", "sharegpt", "alpaca", "completion", "text"],
    "pretrain": ["text"],
    "reward": ["preference", "turns"],
    "dpo": ["preference", "turns"],
    "kto": ["label", "preference"],
    "ppo": ["messages", "completion", "answer"],
    "eval": ["messages", "completion"],
}
DEEP = "[" * 2000 + "]" * 2000
ODD: list[Any] = [
    *(None, True, 0, -1, 1.5, 2**63, 2**64, 10**400, 1e308, float("nan"), float("inf"), "", " "),
    *("\0", "\ud800", "\U0001f642", "\u2028", "\ue0001\ue001", "<|im_end|>", "<|im_start|>system"),
    *("x" * 70_000, "7310" + "1" * 4, "[]", "{}", '[{"role": "user"', DEEP, "9" * 5000, "A" * 3),
    *([], {}, [[]], [None], {"": None}, {"role": None}, ["a", 1, None], {"a": {"a": {"a": [1]}}}),
    *([{"role": "user", "content": "x"}], [{"type": "text", "text": "x"}], [{"type": "image"}]),
    *({"url": "x"}, "{{ x }}", "{% generation %}", "\x1b[2J", "\r", "\ufeff", "true", "B", "1"),
]
LINES = [
    *(
        b"[" * 3000,
        b'{"a":' * 3000,
        b"9" * 5000,
        b"1e999",
        b"NaN",
        b"\xff\xfe",
        b"\0",
        b"null",
        b'"',
    ),
    *(b'{"messages": ' + b"9" * 5000 + b"}", b'{"text": "' + b"x" * 300_000 + b'"}', b"{}", b"[]"),
    *(b'{"text": "\\ud800"}', b'{"text": 1e999}', b'{"text": "a", "text": "b"}', b"\xef\xbb\xbf{}"),
    *(b'{"text": "' + b"\\u0000" * 9 + b'"}', b"{'text': 'a'}", b'{"text": "a"},', b"\r", b"\x0c"),
    *(b'"' * 7, b"a,b,c,d,e,f", b"\t\t\t", b',"', b'"a""', b'\\"', b"=1+1", b"#", b"version https"),
]


def _json_lines(rows: list[dict[str, Any]], rng: random.Random) -> bytes:
    lines = [
        json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        for row in rows
    ]
    if rng.random() < 0.5:
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(LINES))
    return rng.choice([b"\n", b"\n", b"\r\n"]).join(lines) + b"\n"


def _json_list(rows: list[dict[str, Any]], rng: random.Random) -> bytes:
    text = json.dumps(rows, indent=rng.choice([None, 1]), ensure_ascii=rng.random() < 0.5)
    data = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.3:
        data = data[:-1] + b"," + rng.choice(LINES) + b"]"
    return data


def _delimited(rows: list[dict[str, Any]], rng: random.Random, delimiter: str = ",") -> bytes:
    out = io.StringIO(newline="")
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.writer(
        out, delimiter=delimiter, quoting=rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    )
    writer.writerow(names)
    for row in rows:
        cells = [row.get(name) for name in names]
        writer.writerow([it if isinstance(it, str) else json.dumps(it) for it in cells])
    encoding = rng.choice(["utf-8", "utf-8", "utf-8", "latin-1", "utf-16", "utf-8-sig"])
    data = out.getvalue().encode(encoding, "replace" if encoding != "utf-8" else "surrogatepass")
    if rng.random() < 0.4:
        lines = data.split(b"\n")
        lines.insert(rng.randrange(len(lines)), rng.choice(LINES))
        data = b"\n".join(lines)
    return data


def _passages(rows: list[dict[str, Any]], rng: random.Random) -> bytes:
    lines = [json.dumps(row).encode() for row in rows] + [rng.choice(LINES)]
    rng.shuffle(lines)
    return b"\n".join(lines)


def _broken_texts(count: int) -> pa.Array:
    """Strings that are not UTF-8, as a careless writer leaves them."""
    values = pa.array([b"sch\xf6n \xff"] * count, pa.binary())
    return pa.StringArray.from_buffers(count, values.buffers()[1], values.buffers()[2])


def _dictionary(index: int, count: int) -> pa.Array:
    """A column of one entry of a dictionary of five, which is wrong from 5 on."""
    indices = pa.array([index] * count, pa.int32())
    return pa.DictionaryArray.from_arrays(indices, pa.array(list("abcde")), safe=False)


def _nested(count: int, depth: int) -> pa.Array:
    type_: pa.DataType = pa.string()
    for _ in range(depth):
        type_ = pa.list_(type_)
    return pa.nulls(count, type_)


def _column(count: int, rng: random.Random) -> pa.Array:
    """A column of a type that rows rarely have."""
    moment = datetime(2026, 11, 26)
    makers = [
        lambda: _broken_texts(count),
        lambda: _dictionary(7, count),
        lambda: _nested(count, rng.choice([3, 60, 300])),
        lambda: pa.array(range(count), pa.uint64()),
        lambda: pa.array([1.5, float("nan")] * (count // 2 + 1))[:count],
        lambda: pa.array([moment] * count, pa.timestamp("ns", "UTC")),
        lambda: pa.array([2**62] * count, pa.timestamp("s")),
        lambda: pa.array([2**31 - 1] * count, pa.int32()).cast(pa.date32()),
        lambda: pa.array([date(1, 1, 1)] * count),
        lambda: pa.array([timedelta(1)] * count, pa.duration("ns")),
        lambda: pa.array([decimal.Decimal("1.50")] * count),
        lambda: pa.array([b"\xff\0"] * count),
        lambda: pa.array(["a"] * count, pa.large_string()),
        lambda: pa.array(["a"] * count, pa.string_view()),
        lambda: pa.array(["a"] * count).dictionary_encode(),
        lambda: pa.nulls(count),
        lambda: pa.array([[("a", 1), ("a", 2)]] * count, pa.map_(pa.string(), pa.int64())),
        lambda: pa.array([[1, 2]] * count, pa.list_(pa.int8(), 2)),
        lambda: pa.array(['{"a": [1, NaN]}', "{", "[" * 3000][:3] * (count // 3 + 1))[:count].cast(
            pa.json_()
        ),
        lambda: pa.array([{"role": "user", "content": 1}] * count),
        lambda: pa.array([[{"role": "user", "content": "a"}, None]] * count),
        lambda: pa.array([float("nan")] * count, pa.float16()),
        lambda: pa.array([None] * count, pa.struct([])),
        lambda: pa.array(["a" * 5000] * count),
    ]
    return rng.choice(makers)()


def _table(rows: list[dict[str, Any]], rng: random.Random) -> pa.Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = []
    for name in names:
        try:
            columns.append(pa.array([row.get(name) for row in rows]))
        except (pa.ArrowException, OverflowError, UnicodeError, ValueError, TypeError):
            columns.append(_column(len(rows), rng))
    if rng.random() < 0.6 and names:
        at = rng.randrange(len(names))
        columns[at] = _column(len(rows), rng)
    if rng.random() < 0.2:
        names.append(rng.choice(["", "x", *names, "\U0001f642", "messages"]))
        columns.append(_column(len(rows), rng))
    if rng.random() < 0.05:
        columns = [column[:0] for column in columns]
    table = pa.Table.from_arrays(columns, names=names)
    if rng.random() < 0.1:
        metadata = rng.choice([b"{", b'{"info": {"features": {"text": 1}}}', b"\xff", b"[]"])
        table = table.replace_schema_metadata({b"huggingface": metadata})
    return table


def _parquet(rows: list[dict[str, Any]], rng: random.Random) -> bytes:
    table = _table(rows, rng)
    wrong, right = (pa.chunked_array([_dictionary(at, len(rows))]) for at in (7, 4))
    places = [i for i, column in enumerate(table.columns) if column.equals(wrong)]
    for at in places:
        table = table.set_column(at, table.field(at), right)
    out = io.BytesIO()
    try:
        pa.parquet.write_table(table, out, row_group_size=rng.choice([3, 1000]))
    except (pa.ArrowException, ValueError):  # what parquet has no type for
        pa.parquet.write_table(pa.table({"text": TEXTS}), out)
    return _with_wrong_entries(out.getvalue()) if places else out.getvalue()


def _with_wrong_entries(data: bytes) -> bytes:
    """A parquet file with 7 for each 4 of a dictionary: its writer would look up what 7 is, which
    lies behind the dictionary in memory."""
    for count in (3, 12):  # rows of a group: three bits an index, and a run of them
        data = data.replace(bytes([1, 3, count * 2, 4]), bytes([1, 3, count * 2, 7]))
    return data


def _arrow(rows: list[dict[str, Any]], rng: random.Random) -> bytes:
    table = _table(rows, rng)
    out = io.BytesIO()
    kind = rng.choice([pa.ipc.new_stream, pa.ipc.new_file])
    options = pa.ipc.IpcWriteOptions(compression=rng.choice([None, "zstd", "lz4"]))
    try:
        with kind(out, table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=rng.choice([5, 1000]))
    except (pa.ArrowException, ValueError):
        return b"ARROW1\0\0"
    return out.getvalue()


WRITERS = {
    "jsonl": _json_lines,
    "ndjson": _json_lines,
    "json": _json_list,
    "csv": _delimited,
    "tsv": lambda rows, rng: _delimited(rows, rng, "\t"),
    "txt": _passages,
    "parquet": _parquet,
    "arrow": _arrow,
    "feather": _arrow,
}


PACKERS = {
    "gz": lambda data: gzip.compress(data, mtime=0),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: bytes(pa.compress(data, "zstd", asbytes=True)),
    "lz4": lambda data: bytes(pa.compress(data, "lz4", asbytes=True)),
}


def _alter(rows: list[dict[str, Any]], rng: random.Random) -> str:
    """Change a value of a row."""
    number = rng.randrange(len(rows))
    row = rows[number]
    if rng.random() < 0.6 and (places := paths(row)):
        path = rng.choice(places)
        odd = odd_value(ODD, rng)
        parent_of(row, path)[path[-1]] = odd
        return f"row {number}: {'.'.join(map(str, path))} = {odd!r:.40}"
    return f"row {number}: {mutate(row, rng)}"


def rows_file(seed: str) -> Case:
    """A mutated file of rows, and the command that prepares it."""
    rng = random.Random(seed)
    stage = rng.choice(list(SHAPES))
    shape = rng.choice(SHAPES[stage] if rng.random() < 0.9 else list(ROWS))
    rows = json.loads(json.dumps(ROWS[shape]))
    said = [shape, *(_alter(rows, rng) for _ in range(rng.choice([0, 1, 1, 1, 3, 12])))]
    if rng.random() < 0.1:
        rows = [{f"column {i}": "x" for i in range(rng.choice([200, 3000]))} | row for row in rows]
        said.append("many columns")
    kind = rng.choice(list(WRITERS))
    data = WRITERS[kind](rows, rng)
    if rng.random() < 0.3:
        data = hurt(data, rng)
        said.append("hurt")
    name = f"rows.{kind}"
    if kind in ("jsonl", "ndjson", "json", "csv", "tsv", "txt") and rng.random() < 0.3:
        packer = rng.choice(list(PACKERS))
        data = PACKERS[packer](data)
        name = f"{name}.{packer}"
        if rng.random() < 0.4:
            data = hurt(data, rng)
            said.append("hurt when packed")
    if rng.random() < 0.05:
        name = name.upper()
    values = mutants.valid(stage, rng)
    source = {"path": f"./{name}"}
    if rng.random() < 0.1:
        source["format"] = rng.choice(["text", "messages", "alpaca", "preference", "prompt"])
    if stage == "eval":
        values["tasks"] = [{"task": "perplexity", "window": 64, "stride": 32, "data": [source]}]
        del values["gate"]
    else:
        values["data"] = {"train": [source], "max_length": 64}
        values["data"]["max_rejected"] = rng.choice([1.0, 1.0, 0.2])
    command = ["prepare", "recipe.yaml"]
    files = mutants.FILES | {"recipe.yaml": json.dumps(values).encode(), name: data}
    return Case(
        f"{seed}: {stage}: {name}: {'; '.join(said)}", command, files, culprit=f"{name}|recipe.yaml"
    )
