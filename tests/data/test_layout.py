"""Every row is read by its own columns, wherever in a source they first appear."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmpipe.data.examples import Conversation, Preference
from llmpipe.data.fields import Rejected
from llmpipe.data.kinds import Kind
from llmpipe.data.kinds.labels import LABELS
from llmpipe.data.kinds.pairs import PAIRS
from llmpipe.data.kinds.prompts import PROMPTS
from llmpipe.data.kinds.rows import ROWS
from llmpipe.data.layout import Rule, layout_of
from llmpipe.data.prepare import prepare
from llmpipe.errors import UserError
from llmpipe.evaluation.items import rows_of
from llmpipe.recipe.sections import Data
from llmpipe.recipe.sections import Rows as Source

from .conftest import load, saved, talk, write

TOOLS = [{"type": "function", "function": {"name": "Lima", "parameters": {"type": "object"}}}]
EARLY = 30  # rows in front of the one that is about: more than decide the format


class Made:
    """What a kind made of a source, and what it said."""

    def __init__(self, model: Path, path: str, kind: Kind = ROWS, **source: Any):
        self.said: list[str] = []
        fields = {"packing": False} if kind is ROWS else {}
        data = Data.model_validate(
            {
                "train": [{"path": path, **source}],
                "template": "chatml",
                "max_rejected": 1.0,
                "max_length": 512,
                **fields,
            }
        )
        ready = prepare(data, kind, model, Path("cache"), seed=0, say=self.said.append)
        folder = ready.folder(Path("cache"))
        self.record, self.rows, _ = load(folder)
        self.source = self.record["sources"][0]
        lines = (folder / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
        self.rejected = [json.loads(line) for line in lines]
        name = next(column for column in self.rows[0] if column.endswith("ids"))
        tokenizer = saved()
        self.texts = [tokenizer.decode(row[name], skip_special_tokens=False) for row in self.rows]

    def line(self, words: str) -> str:
        return next(line for line in self.said if words in line)


# --- columns that come late ---

ALPACA = {"instruction": "q", "output": "a"}


@pytest.mark.parametrize("second_file", [False, True])
def test_a_column_that_comes_late_is_read(here, base, second_file):
    late = [
        ALPACA | {"input": "more"},
        ALPACA | {"system": "be brief"},
        ALPACA | {"tools": TOOLS},
        ALPACA | {"history": [["q0", "a0"]], "comment": "?", "id": 3},
        ALPACA | {"id": 4},
    ]
    early = [ALPACA] * EARLY
    if second_file:
        write(Path("d/a.jsonl"), early)
        write(Path("d/b.jsonl"), late)
    else:
        write(Path("d/a.jsonl"), early + late)
    made = Made(base, "./d")
    for words, text in zip(("more", "be brief", "Lima", "q0"), made.texts[EARLY:], strict=False):
        assert words in text
    assert made.source["columns"].keys() == {*ALPACA, "input", "system", "tools", "history"}
    assert made.source["unread"] == {"comment": 1, "id": 2}
    where = "d/b.jsonl:4" if second_file else f"d/a.jsonl:{EARLY + 4}"
    said = f"not used: id (2 rows, first {where}), comment (1 row, first {where})"
    assert said in made.line("not used")


def test_in_pairs(here, base):
    pair = {"prompt": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"}
    path = write(
        Path("d.jsonl"), [pair] * EARLY + [pair | {"system": "late"}, pair | {"margin": 2}]
    )
    made = Made(base, str(path), PAIRS)
    assert "late" in made.texts[EARLY] and "late" not in made.texts[0]
    assert [row["margin"] for row in made.rows[-2:]] == [0, 2]


def test_in_prompts_with_what_rewards_read(here, base):
    """A row that has its answer is more than the first rows are: the answer is its reference."""
    asked = {"prompt": [{"role": "user", "content": "q"}], "level": "easy"}
    late = [asked | {"completion": "right"}, asked | {"answer": 42, "system": "late"}]
    made = Made(base, str(write(Path("d.jsonl"), [asked] * EARLY + late)), PROMPTS)
    kept = [json.loads(row["row"]) for row in made.rows]
    assert kept[0]["reference"] is None and kept[0]["columns"] == {"level": "easy"}
    assert kept[EARLY]["reference"] == "right"
    assert kept[EARLY + 1]["columns"] == {"level": "easy", "answer": 42}
    assert "late" in made.texts[EARLY + 1]
    assert "for rewards to read: level" in made.line("format prompt")
    assert not any("not used" in line for line in made.said)


def test_in_rows_to_evaluate_on(here):
    source = Source(path=str(write(Path("d.jsonl"), [ALPACA] * EARLY + [ALPACA | {"system": "s"}])))
    *_, (at, last) = rows_of(source, (Conversation,), "perplexity", {})
    assert not isinstance(last, Rejected) and isinstance(last.example, Conversation)
    assert at.endswith(f":{EARLY + 1}") and last.example.messages[0]["content"] == "s"


def test_in_several_processes(here, base):
    rows = [ALPACA] * 600 + [ALPACA | {"system": "late", "id": 1}] * 300
    path = str(write(Path("d.jsonl"), rows))
    data = {"train": [{"path": path}], "template": "chatml", "max_length": 64, "processes": 2}
    said: list[str] = []
    prepare(Data.model_validate(data), ROWS, base, Path("c"), seed=0, say=said.append)
    assert any(f"not used: id (300 rows, first {path}:601)" in line for line in said)


# --- rows of another format ---


def test_a_row_of_another_format_with_the_same_shape_is_read_as_that(here, base):
    rows = [talk("q", "a")] * EARLY + [ALPACA | {"input": "more"}, {"question": "Q", "answer": "A"}]
    made = Made(base, str(write(Path("d.jsonl"), rows)))
    assert "q\n\nmore" in made.texts[EARLY] and "Q" in made.texts[EARLY + 1]
    assert made.line("read as format alpaca, not messages").endswith(": 2 rows")
    assert made.source["noted"]["read as format alpaca, not messages as the first rows"] == 2


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference"),
        ({"text": "a"}, "text"),
        ({"prompt": "q", "completion": "a"}, "prompt-completion"),
    ],
)
def test_a_row_of_another_shape_is_rejected_with_both_names(here, base, row, format):
    made = Made(base, str(write(Path("d.jsonl"), [talk("q", "a"), row])))
    (rejected,) = made.rejected
    assert (rejected["row"], rejected["reason"]) == (2, "missing column")
    assert rejected["detail"] == f"messages: a row of format {format} among rows of messages"


def test_the_recipes_format_is_that_of_every_row(here, base):
    path = str(write(Path("d.jsonl"), [talk("q", "a"), ALPACA]))
    made = Made(base, path, format="messages")
    assert [row["row"] for row in made.rejected] == [2]


def test_the_first_row_decides_and_not_a_row_among_the_first(here, base):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    made = Made(base, str(write(Path("d.jsonl"), [talk("q", "a"), pair, talk("q", "b")])))
    assert len(made.rows) == 2 and made.source["format"] == "messages"


# --- columns that hold nothing ---


def test_a_table_of_several_formats(here, base):
    """What a table has as null is not there."""
    rows = [talk("q", "a"), ALPACA, ALPACA | {"input": "more"}]
    names = ["messages", "instruction", "output", "input"]
    columns = {name: pa.array([row.get(name) for row in rows]) for name in names}
    pq.write_table(pa.table(columns), "d.parquet")
    with open("d.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            cells = {key: json.dumps(it) if key == "messages" else it for key, it in row.items()}
            writer.writerow(cells)
    write(Path("d.jsonl"), rows)
    one, *others = [Made(base, f"./d.{suffix}") for suffix in ("jsonl", "parquet", "csv")]
    assert len(one.rows) == 3
    for other in others:
        assert (other.rows, other.source["columns"]) == (one.rows, one.source["columns"])


EVERY = (Conversation, Preference)


def test_texts_beside_a_system_prompt_are_a_chat_in_rows_without_one(here):
    """As in orca's pairs, of which some have an empty one."""
    pair = {"question": "q", "chosen": "a", "rejected": "b"}
    rows = [pair | {"system": "s"}, pair | {"system": ""}, pair]
    layout = layout_of(rows, Rule("auto", (), EVERY), "d")
    asked = [layout.convert(row).example.prompt for row in rows]
    assert [len(turns) for turns in asked] == [2, 1, 1]
    assert all(isinstance(turns, list) for turns in asked)
    alone = layout_of([pair], Rule("auto", (), EVERY), "d").convert(pair).example
    assert alone.prompt == "q"


def test_texts_without_a_template_are_said_and_counted(here, base):
    texts = {"prompt": "q", "response": "a"}
    turns = {"prompt": [{"role": "user", "content": "q"}], "completion": "a"}
    made = Made(base, str(write(Path("d.jsonl"), [texts] * 3 + [turns] * 2)))
    assert made.line("no chat template touches").endswith(": 3 rows")


# --- columns that the recipe maps ---


def test_a_mapped_column_may_come_late(here, base):
    mapping = {"frage": "instruction", "antwort": "output", "kontext": "input"}
    rows = [{"frage": "q", "antwort": "a"}] * EARLY + [
        {"frage": "q", "antwort": "a", "kontext": "k"}
    ]
    made = Made(base, str(write(Path("d.jsonl"), rows)), columns=mapping)
    assert "q\n\nk" in made.texts[EARLY] and made.source["columns"] == mapping


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        (
            {"antwrot": "output", "frage": "instruction"},
            "no column 'antwrot'; did you mean 'antwort'",
        ),
        ({"xyz": "output", "frage": "instruction"}, "there is no column 'xyz'"),
        (
            {"antwort": "output", "frage": "instruction", "xyz": "input"},
            "no usable row has a column 'xyz'",
        ),
    ],
)
def test_a_mapped_column_that_never_comes_is_refused(here, base, mapping, said):
    path = str(write(Path("d.jsonl"), [{"frage": "q", "antwort": "a"}] * EARLY))
    with pytest.raises(UserError, match=said) as refused:
        Made(base, path, columns=mapping)
    assert refused.value.code == 2
    with pytest.raises(UserError, match=said):
        list(rows_of(Source(path=path, columns=mapping), EVERY, "perplexity", {}))


def test_a_mapped_label_is_a_label(here, base):
    turns = {"prompt": [{"role": "user", "content": "q"}], "completion": "a"}
    rows = [turns | {"good": True, "x": 1}] * 2 + [turns | {"good": False, "x": 1}]
    made = Made(base, str(write(Path("d.jsonl"), rows)), LABELS, columns={"good": "label"})
    assert [row["label"] for row in made.rows] == [1, 1, 0]
    assert made.line("format prompt-completion").endswith(
        "(prompt, completion, good as label); not used: x"
    )


def test_columns_for_rewards_have_the_recipes_names(here, base):
    rows = [{"prompt": "q", "solution": "4"}] * 2
    path = str(write(Path("d.jsonl"), rows))
    made = Made(base, path, PROMPTS, columns={"solution": "answer"})
    assert json.loads(made.rows[0]["row"])["columns"] == {"answer": "4"}


def test_two_columns_of_one_name_are_refused_in_a_late_row(here):
    rule = Rule("auto", (("frage", "prompt"),), EVERY)
    layout = layout_of([{"frage": "q", "chosen": "a", "rejected": "b"}], rule, "d")
    with pytest.raises(Rejected, match="two columns are one"):
        layout.convert({"frage": "q", "prompt": "q", "chosen": "a", "rejected": "b"})
