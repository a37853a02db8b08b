"""What is listed to learn or to evaluate on, and comes to nothing, is named: exit 2."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmpipe.data.kinds.blocks import BLOCKS
from llmpipe.data.kinds.labels import LABELS
from llmpipe.data.kinds.pairs import PAIRS
from llmpipe.data.kinds.prompts import PROMPTS
from llmpipe.data.kinds.rows import ROWS
from llmpipe.data.prepare import prepare
from llmpipe.errors import UserError
from llmpipe.recipe.reinforcement import Mixture
from llmpipe.recipe.sections import Data, Pairs, Prompts

from .conftest import make, talk, write

TALKS = [talk(f"question {i}", f"answer {i}") for i in range(60)]
UNANSWERED = [{"messages": [{"role": "user", "content": f"q {i}"}]} for i in range(3)]


def pair(i: int) -> dict:
    return {"prompt": f"p {i}", "chosen": f"c {i}", "rejected": f"r {i}"}


def judged(i: int) -> dict:
    return {"prompt": f"p {i}", "completion": f"c {i}", "label": i % 2 == 0}


KINDS = {
    "rows": (ROWS, Data, TALKS, UNANSWERED),
    "pairs": (PAIRS, Pairs, [pair(i) for i in range(60)], [{**pair(1), "chosen": "r 1"}] * 2),
    "judged": (LABELS, Pairs, [judged(i) for i in range(60)], [{**judged(1), "completion": ""}]),
    "prompts": (
        PROMPTS,
        Prompts,
        [{"prompt": f"p {i}"} for i in range(60)],
        [{"prompt": "word " * 900}] * 2,
    ),
}


def prepared(model: Path, kind, section, **fields):
    data = section.model_validate({"template": "chatml", "max_rejected": 0.99, **fields})
    return prepare(data, kind, model, Path("cache"), seed=0, say=lambda line: None)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("purpose", ["train", "evaluate"])
def test_a_source_of_which_no_row_is_left(here, base, name, purpose):
    """Whatever share of all rows it is, with the first of them."""
    kind, section, good, bad = KINDS[name]
    write(Path("good.jsonl"), good)
    write(Path("bad.jsonl"), bad)
    train, rest = [{"path": "./good.jsonl"}], {"path": "./bad.jsonl"}
    fields = {"train": [*train, rest]}
    if purpose == "evaluate":
        fields = {"train": train, "eval": {"sources": [{"path": "./good.jsonl"}, rest]}}
    with pytest.raises(UserError) as refused:
        prepared(base, kind, section, **fields)
    first, second = refused.value.message.split("\n")
    assert first.startswith(f"./bad.jsonl: no row is left to {purpose} on: of {len(bad)}")
    assert second.startswith("./bad.jsonl:1: ") and refused.value.code == 2


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("most", [0.0, 1.0])
def test_how_long_rows_are_that_are_all_too_long(here, base, name, most):
    """With the number that takes all of them, none of them cut."""
    kind, section, good, _ = KINDS[name]
    longer = [{key: _longer(value) for key, value in row.items()} for row in good]
    write(Path("good.jsonl"), [*longer, longer[0]])
    fields = {"train": [{"path": "./good.jsonl"}], "max_rejected": most}
    with pytest.raises(UserError, match="too long") as refused:
        prepared(base, kind, section, **fields, max_length=8)
    number = int(re.search(r"raise data\.max_length to (\d+) for", refused.value.hint)[1])
    rows = prepared(base, kind, section, **fields, max_length=number).rows
    assert rows.rejected == rows.truncated == 0


def _longer(value):
    """A text, or the texts of turns, of more than eight tokens."""
    if isinstance(value, list):
        return [{**turn, "content": _longer(turn["content"])} for turn in value]
    return f"{value} {'and so on ' * 5}" if isinstance(value, str) else value


def test_rows_of_a_mixture_have_a_length_of_their_own(here, base):
    write(Path("d.jsonl"), TALKS)
    mixture = Mixture.model_validate({"train": [{"path": "./d.jsonl"}], "max_length": 8})
    beside = Prompts.model_validate({"train": [{"path": "./d.jsonl"}], "template": "chatml"})
    with pytest.raises(UserError, match="too long") as refused:
        prepare(mixture.data(beside), ROWS, base, Path("cache"), seed=0, say=print)
    assert "raise mixture.max_length to" in refused.value.hint


def test_a_limit_may_leave_bad_rows_alone(here, base):
    write(Path("mixed.jsonl"), [*UNANSWERED, *TALKS])
    write(Path("good.jsonl"), TALKS)
    sources = [{"path": "./good.jsonl"}, {"path": "./mixed.jsonl", "limit": 3}]
    with pytest.raises(UserError, match=r"mixed\.jsonl: no row is left to train on: of 3") as told:
        prepared(base, ROWS, Data, train=sources)
    assert told.value.code == 2


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (TALKS[:1], "there is one row alone"),
        (TALKS[:1] * 4, "all 4 rows are equal"),
    ],
)
def test_a_holdout_that_keeps_none(here, base, rows, why):
    write(Path("d.jsonl"), rows)
    with pytest.raises(UserError, match=rf"data\.eval\.holdout: 0\.5.*{why}") as refused:
        make(base, "d.jsonl", template="chatml", eval={"holdout": 0.5})
    assert refused.value.code == 2


def test_a_document_alone_is_not_held_out(here, base):
    Path("one.txt").write_text("A single document.\n")
    with pytest.raises(UserError, match="there is one row alone"):
        prepared(base, BLOCKS, Data, train=[{"path": "./one.txt"}], eval={"holdout": 0.1})


def test_a_weight_that_leaves_no_row(here, base):
    write(Path("a.jsonl"), TALKS[:40])
    write(Path("b.jsonl"), TALKS[40:])
    sources = [{"path": "./a.jsonl"}, {"path": "./b.jsonl", "weight": 0.0001}]
    with pytest.raises(UserError, match=r"b\.jsonl: none of its 20 rows.*weight 0\.0001") as told:
        make(base, *sources, template="chatml")
    assert told.value.code == 2
    with pytest.raises(UserError, match="no row is left to train on"):
        make(base, sources[1], template="chatml")


def test_a_source_that_is_held_out_whole(here, base):
    write(Path("a.jsonl"), TALKS[:40])
    for i in range(40, 60):  # each alone: a fifth of them is held out
        write(Path(f"{i}.jsonl"), TALKS[i : i + 1])
    sources = [f"./{i}.jsonl" for i in range(40, 60)]
    with pytest.raises(UserError, match="none of its 1 rows is left to train on: all are held"):
        make(base, "./a.jsonl", *sources, template="chatml", eval={"holdout": 0.3})
    record, _, _ = make(base, "./a.jsonl", *sources, template="chatml")
    assert record["rows"]["train"] == 60
