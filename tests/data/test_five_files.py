"""The same rows say the same, whatever kind of file they lie in.

What one kind of file cannot hold is not among them: a table's column has one type and one order of
keys, so objects that differ from row to row have those of the first row, or are JSON texts.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmpipe.data.kinds.pairs import PAIRS
from llmpipe.data.kinds.rows import ROWS
from llmpipe.data.prepare import prepare
from llmpipe.recipe.sections import Data
from tests import life

from .conftest import load, make_model

ROWS_OF_A_SEED = 50

# All that a message may hold stands in the text.
EVERYTHING = (
    "{% if tools %}<|tools|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}{% generation %}"
    "{% if m.reasoning_content %}<|think|>{{ m.reasoning_content }}<|answer|>{% endif %}"
    "{{ m.content }}"
    "{% for call in m.tool_calls %}<|call|>{{ call | tojson }}{% endfor %}"
    "<|end|>{% endgeneration %}"
    "{% else %}{{ m.name }} {{ m.tool_call_id }} {{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ALPHABET = [
    *"abc  XYZ,;:.'\"`\\/{}[]<>&%$0123456789-+\t\n",
    *"éßЖ你好日本",
    *"אבג العر",  # written from right to left
    "\u2028",  # ends a line for some, as these do
    "\u0085",
    "\r\n",
    "😀",  # beyond 16 bits
    "👩‍🔬",
    "e\u0301",
    "\ufeff",
    "null",
    "[{",
]

STARTS = [
    "[",
    "[{",
    '[{"a": ',
    '"',
    "0",
    "-1",
    "1e3",
    "NaN",
    "true",
    "null",
    "2024-01-02",
    " ",
    "=",
    "#",
]

Row = dict[str, Any]
Write = Callable[[list[Row], Path], str]


class Writer:
    """Draws rows of one source: `texts` are its objects that differ from row to row, as JSON."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.texts = seed % 2 == 1
        self.parts = seed % 3 == 1
        self.full = True
        """Whether every key is there: in the first row, for a table to know them in order."""

    def often(self, share: float = 0.5) -> bool:
        return self.full or self.random.random() < share

    def text(self, most: int = 12) -> str:
        drawn = self.random.choices(ALPHABET, k=self.random.randint(1, most))
        return self.random.choice(["x", "y", "z", *STARTS]) + "".join(drawn)

    def value(self, kind: str, depth: int) -> Any:
        match kind:
            case "s":
                return self.text()
            case "i":
                return self.random.choice([0, -1, 7, 2**40])
            case "f":
                return self.random.choice([0.5, -2.25, 1e-7, 3.7e20])
            case "b":
                return self.often()
            case "l":
                return [self.random.randint(0, 9) for _ in range(1 + self.random.randint(0, 2))]
            case "t":
                return [self.arguments(depth + 1) for _ in range(1 + self.random.randint(0, 1))]
            case "n":  # a null that a person wrote
                return self.text() if self.often(0.3) else None
            case _:
                return self.arguments(depth + 1)

    def arguments(self, depth: int = 0) -> Row:
        kinds = "sifbln" if depth > 1 else "sifblnot"
        return {f"{kind}_é": self.value(kind, depth) for kind in kinds if self.often()}

    def as_told(self, value: Any) -> Any:
        return json.dumps(value, ensure_ascii=self.often()) if self.texts else value

    def call(self) -> Row:
        function = {"name": f"f{self.random.randint(1, 3)}"}
        if self.often(0.8):
            function["arguments"] = self.as_told(self.arguments())
        call: Row = {"type": "function", "function": function}
        return call | {"id": self.text(3)} if self.often() else call

    def schema(self, depth: int = 0) -> Row:
        schema: Row = {"type": self.random.choice(["object", "string"])}
        for key in ("description", "default"):
            if self.often(0.3):
                schema[key] = self.text()
        if self.often(0.3):
            schema["enum"] = ["a", None, self.text(3)]
        if depth < 2:
            names = [name for name in ("p", "q", "r") if self.often()]
            if names:
                schema["properties"] = {name: self.schema(depth + 1) for name in names}
                schema["required"] = names[:1]
        return schema

    def tools(self) -> Any:
        numbers = range(1, self.random.randint(2, 4))
        functions = [{"name": f"f{i}", "parameters": self.schema()} for i in numbers]
        return self.as_told([{"type": "function", "function": it} for it in functions])

    def content(self) -> Any:
        if not self.parts:
            return self.text(40)
        parts = [{"type": "text", "text": self.text()} for _ in range(self.random.randint(1, 3))]
        if self.often(0.3):
            parts[0]["cache_control"] = {"type": "ephemeral"}
        return parts

    def user(self) -> Row:
        turn = {"role": "user", "content": self.content()}
        return turn | {"name": self.text(3)} if self.often(0.3) else turn

    def assistant(self) -> Row:
        turn: Row = {"role": "assistant", "content": self.content()}
        if self.often(0.3):
            turn["reasoning_content"] = self.text()
        if self.often(0.2):
            turn["train"] = self.often()
        if self.often(0.2):
            turn["annotations"] = [{"id": 3}]
        return turn

    def calling(self) -> list[Row]:
        calls = [self.call() for _ in range(self.random.randint(1, 2))]
        turn: Row = {"role": "assistant", "content": self.content(), "tool_calls": calls}
        if not self.full and self.often():
            turn["content"] = None
        ids = [call.get("id", "1") for call in calls]
        results = [{"role": "tool", "content": self.content(), "tool_call_id": it} for it in ids]
        return [turn, *results]

    def conversation(self) -> list[Row]:
        turns: list[Row] = []
        for _ in range(self.random.randint(1, 3)):
            turns.append(self.user())
            turns += self.calling() if self.often(0.4) else []
            turns.append(self.assistant())
        return turns

    def beside(self) -> Row:
        """Other columns."""
        row: Row = {}
        if self.often(0.4):
            row["system"] = self.text()
        if self.often(0.4):
            row["tools"] = self.tools()
        if self.often(0.3):
            row["source"] = self.text()
        return row

    def rows(self, row: Callable[[], Row]) -> list[Row]:
        rows = []
        for _ in range(ROWS_OF_A_SEED):
            rows.append(row())
            self.full = False
        return rows

    def messages(self) -> Row:
        return {"messages": self.conversation()} | self.beside()

    def prompt_completion(self) -> Row:
        turns = self.conversation()
        return {"prompt": turns[:-1], "completion": turns[-1:]} | self.beside()

    def preference(self) -> Row:
        turns = self.conversation()
        answers = [{"role": "assistant", "content": self.content()} for _ in range(2)]
        return {
            "prompt": turns[:-1],
            "chosen": answers[:1],
            "rejected": answers[1:],
        } | self.beside()


# --- the five ---


def jsonl(rows: list[Row], folder: Path) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def json_list(rows: list[Row], folder: Path) -> str:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    return str(path)


def delimited(rows: list[Row], folder: Path) -> str:
    path = folder / "rows.csv"
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(value) for name, value in row.items()})
    return str(path)


def _cell(value: Any) -> Any:
    is_nested = isinstance(value, list | dict)
    return json.dumps(value, ensure_ascii=False) if is_nested else value


def parquet(rows: list[Row], folder: Path) -> str:
    path = folder / "rows.parquet"
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: pa.array([row.get(name) for row in rows]) for name in names}
    pq.write_table(pa.table(columns), path)
    return str(path)


def hub(rows: list[Row], folder: Path) -> str:
    jsonl(rows, folder)
    return "somebody/rows"


FIVE: list[Write] = [jsonl, json_list, delimited, parquet, hub]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    special = ("<|end|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|system|>")
    return make_model(tmp_path_factory.mktemp("model"), special=special, template=EVERYTHING)


@pytest.fixture
def load_dataset(tmp_path, monkeypatch):
    """The Hub's loader, which finds the data set here."""

    def loaded(name: str, subset: str | None, *, split: str, revision: str, streaming: bool):
        assert (name, revision) == ("somebody/rows", "c0ffee")
        path = str(tmp_path / "rows.jsonl")
        return datasets.Dataset.from_json(path, cache_dir=str(tmp_path / "cache"), split=split)

    monkeypatch.setattr(datasets, "load_dataset", loaded)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def prepared(kind, model: Path, folder: Path, path: str) -> tuple[list[Row], list[str]]:
    """The rows as they were written, and why others are not among them."""
    fields = {"max_length": 4096, "packing": False} if kind is ROWS else {"max_length": 4096}
    data = Data.model_validate({"train": [{"path": path}], "max_rejected": 1.0, **fields})
    pinned = {"somebody/rows@": "c0ffee"}
    cache = folder / ("cache-" + Path(path).name)
    ready = prepare(data, kind, model, cache, seed=0, say=lambda line: None, pinned=pinned)
    _, written, _ = load(ready.folder(cache))
    rejected = (ready.folder(cache) / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    return written, [json.loads(line)["reason"] for line in rejected]


# each kind of row in every run of the suite
@pytest.mark.parametrize("seed", [*range(4), *map(life.by_the_dozen, range(4, 10))])
def test_the_same_rows_are_the_same_tokens(seed, model, tmp_path, load_dataset):
    """500 conversations, with tools, calls, results, parts, nulls, nesting, all scripts."""
    writer = Writer(seed)
    one = (writer.messages, writer.prompt_completion, writer.preference, writer.messages)[seed % 4]
    kind = PAIRS if seed % 4 == 2 else ROWS
    rows = writer.rows(one)
    first, *others = [prepared(kind, model, tmp_path, write(rows, tmp_path)) for write in FIVE]
    assert len(first[0]) > 0.8 * len(rows), first[1]
    for write, other in zip(FIVE[1:], others, strict=True):
        assert other == first, write.__name__


def test_a_table_of_texts_has_what_rows_have(model, tmp_path, load_dataset):
    """Rows of several formats, and columns that come late."""
    call = {"type": "function", "function": {"name": "f1", "arguments": {"x": 1}}}
    tools = [{"type": "function", "function": {"name": "f1", "parameters": {"type": "object"}}}]
    turns = [{"role": "user", "content": "q"}]
    turns.append({"role": "assistant", "content": "a", "tool_calls": [call]})
    rows: list[Row] = [{"instruction": f"q{i}", "output": "a"} for i in range(30)]
    rows += [
        {"instruction": "q", "output": "a", "input": "late"},
        {"instruction": "q", "output": "a", "system": "late", "tools": tools},
        {"instruction": "q", "output": "a", "history": [["q0", "a0"]]},
        {"messages": turns},
        {"text": "of a format whose rows have another shape"},
    ]
    first, *others = [prepared(ROWS, model, tmp_path, write(rows, tmp_path)) for write in FIVE]
    kept, reasons = first
    assert len(kept) == 34 and len(reasons) == 1
    for write, other in zip(FIVE[1:], others, strict=True):
        assert other[0] == kept, write.__name__
        assert len(other[1]) == 1
