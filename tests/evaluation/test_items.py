"""Items of an evaluation: what nothing could score is refused with its line."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from llmpipe.errors import UserError
from llmpipe.evaluation.items import items_of
from llmpipe.evaluation.tasks.choice import Choice
from llmpipe.evaluation.tasks.generate import Generate

CHAT = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "four"}]


def generate(path, rows, **fields):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Generate.model_validate({"task": "generate", "data": [{"path": str(path)}], **fields})


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        ({"prompt": "2 + 2 =", "answer": "4"}, "4"),
        ({"prompt": "2 + 2 =", "answer": 4}, "4"),
        ({"prompt": "2 + 2 =", "answer": ["4", "four"]}, ["4", "four"]),
        ({"prompt": CHAT[:1], "answer": ["four", "4"]}, ["four", "4"]),
        ({"messages": CHAT, "answer": "5"}, "four"),
    ],
)
def test_the_reference_of_an_item(tmp_path, row, reference):
    task = generate(tmp_path / "rows.jsonl", [row], score=["exact_match"])
    (item,) = items_of(task, {}, print)
    assert item.reference == reference
    task.write([item], tmp_path / "items.jsonl")
    assert task.read(tmp_path / "items.jsonl") == [item]
    scores = task._scores(["four"], item.references)
    assert scores == {"exact_match": float("four" in reference)}


@pytest.mark.parametrize(
    ("row", "fields", "problem"),
    [
        ({"messages": CHAT}, {"score": ["number"]}, "'four' says no number"),
        ({"prompt": "2 + 2 ="}, {"score": ["contains"]}, "there is no answer to compare with"),
        ({"prompt": "2 + 2 =", "answer": 7.0}, {"score": ["exact_match"]}, "7.0 is a number"),
        ({"prompt": "2 + 2 =", "answer": True}, {"score": ["exact_match"]}, "true is no text"),
        ({"prompt": "2 + 2 =", "answer": []}, {"score": ["bleu"]}, "is empty"),
        ({"question": "2 + 2?", "answer": ["4"]}, {"score": ["number"]}, "output is a list"),
        ({"messages": CHAT}, {"score": ["regex"], "pattern": r"\w+"}, "has no group to hold it"),
        ({"messages": CHAT}, {"score": ["regex"], "pattern": r"(\d+)"}, "can hold"),
        ({"prompt": "天空?", "answer": "蓝色"}, {"score": ["rouge"]}, "no letter from a to z"),
    ],
)
def test_a_reference_that_nothing_can_equal(tmp_path, row, fields, problem):
    good = {"prompt": "2 + 2 =", "answer": "4"}
    path = tmp_path / "rows.jsonl"
    rows = [row] if "prompt" not in row else [good, row]
    with pytest.raises(UserError) as refused:
        items_of(generate(path, rows, **fields), {}, print)
    assert f"rows.jsonl:{len(rows)}: " in str(refused.value) and problem in str(refused.value)
    assert refused.value.code == 2


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_several_answers_under_other_names(tmp_path, suffix):
    rows = [{"frage": "2 + 2?", "antworten": ["4", "four"]}, {"frage": "1?", "antworten": ["1"]}]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"frage": "prompt", "antworten": "answer"}
    fields = {"data": [{"path": str(path), "columns": columns}], "score": ["exact_match"]}
    items = items_of(Generate.model_validate({"task": "generate", **fields}), {}, print)
    assert [item.reference for item in items] == [["4", "four"], "1"]


def test_a_pattern_without_a_group_beside_a_score_that_compares(tmp_path):
    fields = {"score": ["regex", "contains"], "pattern": r"^\w+$"}
    (item,) = items_of(generate(tmp_path / "rows.jsonl", [{"messages": CHAT}], **fields), {}, print)
    assert item.reference == "four"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"score": []}, "at least 1"),
        ({"score": ["exact_match"], "pass_at": []}, "at least 1"),
        ({"score": ["regex"], "pattern": "("}, "pattern"),
        ({"score": ["regex"]}, "go together"),
        ({"score": ["bleurt"]}, "bleu"),
    ],
)
def test_what_a_recipe_may_not_ask(tmp_path, fields, problem):
    with pytest.raises(ValidationError, match=problem):
        generate(tmp_path / "rows.jsonl", [], **fields)


@pytest.mark.parametrize(
    ("choices", "answer", "problem"),
    [
        (["yes", "yes"], 0, "two choices are 'yes'"),
        (["yes", "no", "yes "], "A", "two choices are 'yes'"),
        (["yes", "no", "yes"], "yes", "two choices are 'yes'"),
        (["no", "yes", "no"], "yes", None),
        (["yes", "no"], "yes", None),
    ],
)
def test_a_right_choice_that_stands_twice_is_refused(tmp_path, choices, answer, problem):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "Is it?", "choices": choices, "answer": answer}))
    task = Choice.model_validate({"task": "choice", "data": [{"path": str(path)}]})
    if problem is None:
        assert items_of(task, {}, print)[0].choices == choices
        return
    with pytest.raises(UserError) as refused:
        items_of(task, {}, print)
    assert "rows.jsonl:1: " in str(refused.value) and problem in str(refused.value)


def test_what_nobody_reads_in_a_row_is_said(tmp_path):
    chat = [{**turn, "id": 7} for turn in CHAT]
    said: list[str] = []
    task = generate(tmp_path / "rows.jsonl", [{"messages": chat}], score=["exact_match"])
    items_of(task, {}, said.append)
    assert [line.partition("rows.jsonl: ")[2] for line in said] == [
        "not used: id of messages: 1 row"
    ]
