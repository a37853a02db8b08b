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
from llmpipe.files.json import digest
from llmpipe.parallel.world import World
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
    with pytest.raises(UserError, match=r"none\.json: holds no results") as refused:
        Results.from_file(tmp_path / "none.json")
    assert refused.value.code == 3


def test_numbers_of_a_library_are_a_line_of_their_own():
    raw = '{"task": "t", "model": "m", "item": "reported", "reported": {"acc": [0.5, null, 8]}}\n'
    line = Line.parse(raw)
    assert line.scores is None and line.reported == {"acc": Reported(0.5, None, 8)}
    assert line.text() == raw


def test_a_difference_is_one_where_its_interval_leaves_zero_out():
    assert Cell(1.0, 0.5, 2.0, 9).differs and Cell(-1.0, -2.0, -0.5, 9).differs
    assert not Cell(1.0, -0.5, 2.0, 9).differs
    assert not Cell(float("nan"), float("nan"), float("nan"), 9).differs


def opened(folder, evaluation="a", said=None, **settings):
    changed = SETTINGS.model_copy(update=settings)
    say = ([] if said is None else said).append
    return Book(folder / "samples.jsonl", changed, evaluation, say, World.of("cpu"))


def scored(folder, batches=3):
    """A book of so many batches of two items."""
    book = opened(folder)
    for at in range(0, 2 * batches, 2):
        book.add([Line("t", "m", item, scores={"acc": 1.0}) for item in (at, at + 1)])
    return book


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_byte_of_a_book_that_changed_is_refused(tmp_path):
    """Also one that leaves it a line of JSON, with another score."""
    scored(tmp_path)
    path = tmp_path / "samples.jsonl"
    whole = path.read_bytes()
    for at in (0, whole.index(b"1.0"), len(whole) // 2, len(whole) - 1):
        flip(path, at)
        with pytest.raises(UserError, match="is not what was scored, from byte ") as refused:
            opened(tmp_path)
        assert refused.value.code == 3 and f"remove {path} and" in refused.value.hint
        path.write_bytes(whole)
    assert len(opened(tmp_path).lines) == 6


@pytest.mark.parametrize(("kept", "items"), [(1.0, 6), (0.99, 4), (0.5, 2), (0.1, 0), (0.0, 0)])
def test_a_book_that_was_cut_goes_on_from_its_last_whole_batch(tmp_path, kept, items):
    scored(tmp_path)
    path = tmp_path / "samples.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    book = opened(tmp_path)
    assert len(book.lines) == items
    for at in range(items, 6, 2):
        book.add([Line("t", "m", item, scores={"acc": 1.0}) for item in (at, at + 1)])
    assert path.read_bytes() == whole and len(opened(tmp_path).lines) == 6


def test_a_book_of_another_evaluation_is_refused(tmp_path):
    scored(tmp_path)
    (tmp_path / "settings.json").write_text("")
    for other in ({"evaluation": "b"}, {"batch_size": 4}):
        with pytest.raises(UserError, match="belongs to another evaluation") as refused:
            opened(tmp_path, **other)
        assert refused.value.code == 3
    (tmp_path / "settings.json").write_text('{"batch_sizf": 8}')
    with pytest.raises(UserError, match=r"settings\.json: batch_size: ") as refused:
        opened(tmp_path)
    assert refused.value.code == 3


def test_a_book_of_adapters_that_were_not_merged_is_refused(tmp_path):
    """As older code measured them; of other models nothing has changed."""
    scored(tmp_path)
    known = SETTINGS.model_dump(exclude={"adapters"})
    first, *_ = (tmp_path / ".samples.jsonl.sums").read_text().splitlines()
    assert first == digest(["a", known])
    with pytest.raises(UserError, match="other settings: adapters apart there, merged now") as no:
        opened(tmp_path, adapters="merged")
    assert no.value.code == 3
    assert len(opened(tmp_path).lines) == 6


def test_a_closed_book_that_was_not_finished_is_whole(tmp_path):
    """Also where a kill came between what is noted of the file and the file."""
    book = scored(tmp_path)
    path = tmp_path / "samples.jsonl"
    before = path.read_bytes()
    book.lines = dict(reversed(list(book.lines.items())))
    book.close(["t"], ["m"])
    assert len(opened(tmp_path).lines) == 6
    path.write_bytes(before)
    assert len(opened(tmp_path).lines) == 6


def test_a_book_of_an_older_llmpipe_is_scored_again(tmp_path):
    scored(tmp_path)
    (tmp_path / ".samples.jsonl.sums").unlink()
    said = []
    assert not opened(tmp_path, said=said).lines
    assert len(said) == 1 and "it is scored again" in said[0]


def test_a_book_is_closed_in_the_order_of_tasks_models_and_items(tmp_path):
    book = opened(tmp_path)
    keys = [(task, model, item) for task in "ab" for model in ("x", "a") for item in (0, 2, 10)]
    book.add([Line(*key, scores={"acc": 1.0}) for key in reversed(keys)])
    assert book.holds("a", "x", [0, 10]) and not book.holds("a", "x", [0, 1])
    book.close(["a", "b"], ["x", "a"])
    again = opened(tmp_path)
    assert list(again.lines) == keys
    with pytest.raises(UserError, match="batch_size 8 there, 4 now"):
        opened(tmp_path, batch_size=4)
    with pytest.raises(UserError, match="scores 1 there, 2 now"):  # they have come to mean another
        opened(tmp_path, scores=2)


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
