"""Right answers of prompts: what no answer can equal is refused with its line, before training."""

import json

import pytest
from datasets import Dataset

from llmpipe.data.kinds.prompts import PROMPTS, compared
from llmpipe.data.prepare import key_of, prepare
from llmpipe.errors import UserError
from llmpipe.recipe.sections import Prompts
from llmpipe.scores.references import Comparison
from tests.life import TINY


def section(path, rows, **more):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Prompts(train=[{"path": str(path)}], **more)


def prepared(data, kind, cache):
    return prepare(data, kind, TINY / "model", cache, seed=0, say=lambda _: None)


def right(ready, cache):
    made = Dataset.from_file(str(ready.folder(cache) / "train.arrow"))
    return sorted(json.loads(row["row"])["right"] for row in made)


@pytest.mark.parametrize(
    ("rows", "kind", "expected"),
    [
        ([{"prompt": "2 + 2 =", "answer": 4}], "number", [["4"]]),
        ([{"prompt": "2 + 2 =", "answer": ["4", "four"]}], "exact_match", [["4", "four"]]),
        ([{"prompt": "2 + 2 =", "answer": '["4", "four"]'}], "contains", [["4", "four"]]),
        ([{"prompt": "2 + 2 =", "completion": " 4"}], "exact_match", [["4"]]),
        ([{"question": "2 + 2?", "answer": "It is 4."}], "number", [["It is 4."]]),
    ],
)
def test_right_answers_are_kept_beside_the_prompt(tmp_path, rows, kind, expected):
    data = section(tmp_path / "rows.jsonl", rows)
    ready = prepared(data, compared([Comparison(kind)], all_read=True), tmp_path / "cache")
    assert right(ready, tmp_path / "cache") == expected


@pytest.mark.parametrize(
    ("answer", "comparison", "problem"),
    [
        (None, Comparison("exact_match"), "no reference: there is no answer to compare with"),
        (True, Comparison("exact_match"), "true is no text"),
        (7.0, Comparison("exact_match"), "7.0 is a number, and exact_match compares texts"),
        ("none", Comparison("number"), "'none' says no number"),
        ("five", Comparison("number"), "'five' says no number"),
        ([], Comparison("contains"), "the list of right answers is empty"),
        (["4", ""], Comparison("contains"), "a right answer is empty"),
        ("['4', 'four']", Comparison("exact_match"), "write it as JSON"),
        (
            "Answer: B",
            Comparison("regex", r"Answer: (\w)"),
            "nothing that the group of the pattern",
        ),
        ("B", Comparison("regex", r"Answer: \w"), "the pattern has no group to hold it"),
        ("B", Comparison("math_verify"), "nothing that math-verify can read"),
    ],
)
def test_a_row_that_no_answer_can_be_right_for_is_refused(tmp_path, answer, comparison, problem):
    rows = [{"prompt": "2 + 2 =", "answer": answer}]
    data = section(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError) as refused:
        prepared(data, compared([comparison], all_read=True), tmp_path / "cache")
    assert refused.value.code == 2
    assert "rows.jsonl:1: " in str(refused.value) and problem in str(refused.value)


def test_few_bad_rows_are_counted_and_left_out(tmp_path):
    rows = [{"prompt": f"{i} + 1 =", "answer": i + 1} for i in range(8)]
    rows[3]["answer"] = "none"
    data = section(tmp_path / "rows.jsonl", rows, max_rejected=0.2)
    kind = compared([Comparison("number")], all_read=True)
    ready = prepared(data, kind, tmp_path / "cache")
    assert ready.rows.rejected_by_reason == {"bad reference": 1}
    assert len(right(ready, tmp_path / "cache")) == 7


def test_another_reward_may_read_the_answer(tmp_path):
    """Where a function or a model is a reward, too, a pattern without a group is no mistake."""
    data = section(tmp_path / "rows.jsonl", [{"prompt": "2 + 2 =", "answer": "B"}])
    kind = compared([Comparison("regex", r"Answer: \w")], all_read=False)
    assert right(prepared(data, kind, tmp_path / "cache"), tmp_path / "cache") == [["B"]]


def test_rows_are_prepared_anew_for_other_verifiers(tmp_path):
    data = section(tmp_path / "rows.jsonl", [{"prompt": "2 + 2 =", "answer": "4"}])
    kinds = [PROMPTS]
    kinds += [compared([Comparison(kind)], all_read=True) for kind in ("number", "contains")]
    kinds.append(compared([Comparison("number")], all_read=False))
    keys = {key_of(data, kind, TINY / "model", 0)[0] for kind in kinds}
    assert len(keys) == len(kinds)
