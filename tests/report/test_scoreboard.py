"""Which numbers stand on the scoreboard, with which digits, and what is marked: only what is real.

Cells are written by hand, so every expected text can be worked out on paper.
"""

from __future__ import annotations

import math

import pytest

from llmpipe.report.measures import measure
from llmpipe.report.scoreboard import (
    Scoreboard,
    lines_of,
    scoreboard,
    sentences,
    shown,
    verdict_of,
)
from llmpipe.report.text import decimals_of
from llmpipe.run.results import Cell, Cells, MeasuredModel, Results, TaskResults

NO = math.nan


def results(metrics: dict[str, Cells], differences: dict[str, Cells], **parents) -> Results:
    labels = dict.fromkeys(label for cells in metrics.values() for label in cells)
    models = {
        label: MeasuredModel(None, None, 9, 9, "float32", parents.get(label)) for label in labels
    }
    return Results(models, {"t": TaskResults("generate", metrics, differences, n=40)})


def board(metrics: dict[str, Cells], differences: dict[str, Cells], **parents) -> Scoreboard:
    return scoreboard(results(metrics, differences, **parents))


@pytest.mark.parametrize(
    ("uncertainty", "decimals"),
    [(0.0354, 3), (0.0355, 2), (0.5, 1), (0.1, 2), (4.4, 0), (1.6, 1), (44, 0), (NO, 3), (0, 3)],
)
def test_digits_are_those_of_the_uncertainty(uncertainty, decimals):
    assert decimals_of(uncertainty) == decimals


@pytest.mark.parametrize(
    ("metric", "cell", "expected"),
    [
        ("exact_match", Cell(0.3814, 0.338, 0.426, 470), ("38 %", "34 to 43")),
        ("exact_match", Cell(0.0, 0.0, 0.0081, 470), ("0.0 %", "0.0 to 0.8")),
        ("exact_match", Cell(0.5, NO, NO, 3), ("50 %", "")),
        ("perplexity", Cell(12.3456, 11.81, 12.94, 470), ("12.3", "11.8 to 12.9")),
        ("perplexity", Cell(math.inf, NO, NO, 470), ("not a number", "")),
        ("strange", Cell(1e99, -1e99, 1e99, 470), ("1e+99", "−1e+99 to 1e+99")),
    ],
)
def test_a_number_has_the_digits_of_its_interval(metric, cell, expected):
    assert shown(cell, measure(metric)) == expected


def test_a_real_difference_is_never_rounded_to_zero():
    cell = Cell(0.004, 0.0002, 0.0078, 9000)
    assert shown(cell, measure("exact_match"), is_difference=True)[1] == "+0.02 to +0.78"
    cell = Cell(0.004, -0.0002, 0.0082, 9000)
    assert shown(cell, measure("exact_match"), is_difference=True)[1] == "0.0 to +0.8"


@pytest.mark.parametrize(
    ("metric", "low", "high", "expected"),
    [
        ("exact_match", 0.1, 0.3, "better"),
        ("exact_match", -0.3, -0.1, "worse"),
        ("exact_match", -0.1, 0.3, "no difference shown"),
        ("perplexity", 0.1, 0.3, "worse"),
        ("perplexity", -0.3, -0.1, "better"),
        ("gsm8k.exact_match.strict", 0.1, 0.3, "better"),
        ("exact_match@4", 0.1, 0.3, "better"),
        ("somebody's own", 0.1, 0.3, "higher"),
        ("somebody's own", -0.3, -0.1, "lower"),
        ("exact_match", NO, NO, "no interval"),
        ("exact_match", 0.1, math.inf, "no interval"),
    ],
)
def test_what_a_difference_says(metric, low, high, expected):
    assert verdict_of(Cell((low + high) / 2, low, high, 40), measure(metric)) == expected


CELLS = {"base": Cell(0.1, 0.05, 0.2, 40), "sft": Cell(0.5, 0.4, 0.6, 40)}
DPO = Cell(0.55, 0.45, 0.65, 40)
REAL, UNSURE = Cell(0.4, 0.3, 0.5, 40), Cell(0.05, -0.1, 0.2, 40)


def test_the_better_one_is_marked_where_the_difference_is_real():
    (column,) = board({"exact_match": CELLS}, {"exact_match": {"sft - base": REAL}}).columns
    assert not column.scores["base"].is_best and column.scores["base"].difference is None
    sft = column.scores["sft"]
    assert sft.is_best and sft.difference is not None
    assert (sft.difference.value, sft.difference.bounds) == ("+40 points", "+30 to +50")
    (column,) = board({"exact_match": CELLS}, {"exact_match": {"sft - base": UNSURE}}).columns
    assert not any(score.is_best for score in column.scores.values())


def test_none_is_the_best_of_two_that_cannot_be_told_apart():
    metrics = {"exact_match": CELLS | {"dpo": DPO}}
    pairs = {"sft - base": REAL, "dpo - base": REAL, "dpo - sft": UNSURE}
    made = board(metrics, {"exact_match": pairs}, sft="base", dpo="sft")
    assert made.best == []
    made = board(metrics, {"exact_match": pairs | {"dpo - sft": REAL}}, sft="base", dpo="sft")
    assert made.best == ["dpo"]
    del pairs["dpo - sft"]  # which were measured on other items
    made = board(metrics, {"exact_match": pairs}, sft="base", dpo="sft")
    assert made.best == [] and made.columns[0].scores["dpo"].difference is None


def test_what_nothing_says_the_direction_of_has_no_best():
    made = board({"odd": CELLS}, {"odd": {"sft - base": REAL}})
    assert made.best == [] and made.columns[0].scores["sft"].difference.verdict == "higher"


def test_a_model_is_held_against_its_parent_wherever_it_stands():
    """And the recorded difference is turned round, with its interval."""
    cells = {"sft": CELLS["sft"], "base": CELLS["base"]}
    pairs = {"exact_match": {"base - sft": Cell(-0.4, -0.5, -0.2, 40)}}
    scores = board({"exact_match": cells}, pairs, sft="base").columns[0].scores
    assert scores["sft"].difference.bounds == "+20 to +50"
    assert scores["sft"].difference.verdict == "better"
    assert scores["base"].difference.other == "sft"  # the first of the list
    assert scores["base"].difference.verdict == "worse"


def test_only_headlines_stand_on_the_scoreboard():
    numbers = dict.fromkeys(("perplexity", "nats_per_token", "bits_per_byte"), CELLS)
    assert [column.measure.title for column in board(numbers, {}).columns] == ["perplexity"]
    assert len(scoreboard(results(numbers, {}), headlines=False).columns) == 3


def test_sentences_and_lines():
    metrics = {"exact_match": CELLS | {"dpo": DPO}}
    pairs = {"sft - base": REAL, "dpo - base": REAL, "dpo - sft": UNSURE}
    made = board(metrics, {"exact_match": pairs}, sft="base", dpo="sft")
    assert sentences(made) == [
        "sft against base: t: exact match 10 → 50 %, better.",
        "dpo against sft: t: exact match 50 → 55 %, no difference shown.",
    ]
    assert list(lines_of(made)) == [
        "t: exact match (higher is better, 40 items)",
        "  base  10 %  5 to 20",
        "  sft   50 %  40 to 60  better than base",
        "  dpo   55 %  45 to 65  not shown to differ from sft",
    ]
