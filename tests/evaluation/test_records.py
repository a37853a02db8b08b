"""What an evaluation writes is read back as it was, and lies in the order it always had."""

import json
from pathlib import Path

import pytest

from llmpipe.errors import UserError
from llmpipe.evaluation.book import Book, Line, Reported, Settings
from llmpipe.evaluation.items import items_of
from llmpipe.evaluation.tasks.choice import Choice
from llmpipe.evaluation.tasks.generate import Generate
from llmpipe.evaluation.tasks.perplexity import Perplexity
from llmpipe.evaluation.tasks.preference import Preference
from llmpipe.run.results import Cell, Results

OLD = Path(__file__).parent.parent / "fixtures" / "run-0.1" / "run" / "eval"
SETTINGS = Settings(batch_size=8, precision="fp32", device="cpu")
TURNS = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]


def test_lines_of_an_old_run_are_read_and_written_as_they_are():
    for raw in (OLD / "samples.jsonl").read_text(encoding="utf-8").splitlines(keepends=True):
        assert Line.parse(raw).text() == raw


def test_results_of_an_old_run_are_read_and_written_as_they_are(tmp_path):
    Results.from_file(OLD / "results.json").to_file(tmp_path / "results.json")
    assert (tmp_path / "results.json").read_bytes() == (OLD / "results.json").read_bytes()
    assert Results.from_file(tmp_path / "none.json") is None


def test_numbers_of_a_library_are_a_line_of_their_own():
    raw = '{"task": "t", "model": "m", "item": "reported", "reported": {"acc": [0.5, null, 8]}}\n'
    line = Line.parse(raw)
    assert line.scores is None and line.reported == {"acc": Reported(0.5, None, 8)}
    assert line.text() == raw


def test_a_difference_is_one_where_its_interval_leaves_zero_out():
    assert Cell(1.0, 0.5, 2.0, 9).differs and Cell(-1.0, -2.0, -0.5, 9).differs
    assert not Cell(1.0, -0.5, 2.0, 9).differs
    assert not Cell(float("nan"), float("nan"), float("nan"), 9).differs


def test_a_book_is_closed_in_the_order_of_tasks_models_and_items(tmp_path):
    book = Book(tmp_path / "samples.jsonl", SETTINGS)
    keys = [(task, model, item) for task in "ab" for model in ("x", "a") for item in (0, 2, 10)]
    book.add([Line(*key, scores={"acc": 1.0}) for key in reversed(keys)])
    assert book.holds("a", "x", [0, 10]) and not book.holds("a", "x", [0, 1])
    book.close(["a", "b"], ["x", "a"])
    again = Book(tmp_path / "samples.jsonl", SETTINGS)
    assert list(again.lines) == keys
    with pytest.raises(UserError, match="batch_size 8 there, 4 now"):
        Book(tmp_path / "samples.jsonl", SETTINGS.model_copy(update={"batch_size": 4}))
    with pytest.raises(UserError, match="scores 1 there, 2 now"):  # they have come to mean another
        Book(tmp_path / "samples.jsonl", SETTINGS.model_copy(update={"scores": 2}))


@pytest.mark.parametrize(
    ("task", "rows", "line"),
    [
        (Perplexity, [{"text": "a text"}], {"text": "a text"}),
        (
            Perplexity,
            [{"messages": TURNS}],
            {"messages": TURNS, "tools": None},
        ),
        (
            Perplexity,
            [{"prompt": TURNS[:1], "completion": TURNS[1:]}],
            {"messages": TURNS, "tools": None, "first": 1},
        ),
        (
            Generate,
            [{"prompt": "2 + 2 =", "completion": " 4"}],
            {"ask": {"text": "2 + 2 ="}, "reference": "4"},
        ),
        (
            Generate,
            [{"messages": TURNS}],
            {"ask": {"messages": TURNS[:1]}, "reference": "4"},
        ),
        (
            Choice,
            [{"question": "2 + 2?", "choices": ["3", "4"], "answer": "B"}],
            {"ask": {"messages": TURNS[:1]}, "choices": ["3", "4"], "answer": 1},
        ),
        (
            Preference,
            [{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}],
            {"ask": {"text": "2 + 2 ="}, "chosen": " 4", "rejected": " 5"},
        ),
    ],
)
def test_items_lie_in_a_file_with_what_their_task_needs(tmp_path, task, rows, line):
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {"task": task.__name__.lower(), "data": [{"path": str(source)}]}
    if task is Generate:
        values["score"] = ["exact_match"]
    task = task.model_validate(values)
    items = items_of(task, {}, print)
    task.write(items, tmp_path / "items.jsonl")
    written = json.loads((tmp_path / "items.jsonl").read_text(encoding="utf-8"))
    assert list(written) == ["id", "at", "asks", *line]
    assert written == {"id": 0, "at": "rows.jsonl:1", "asks": items[0].asks} | line
    assert task.read(tmp_path / "items.jsonl") == items
