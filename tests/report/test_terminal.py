"""What a terminal says of a run: 80 columns, no interval and no verdict where there is none."""

import json
import math

from llmpipe.report.terminal import COLUMNS, labelled, measurements, show_run
from llmpipe.run.results import Cell, MeasuredModel, Results, TaskResults
from tests.report.written import add_eval, add_sft

NO = math.nan


def results(metrics, differences, overlap=None):
    model = MeasuredModel(None, None, 9, 9, "float32", None)
    task = TaskResults("generate", metrics, differences, n=40, overlap=overlap)
    return Results({"a": model, "b": model}, {"t": task})


def lines(*cells, differences, overlap=None):
    metrics = {"acc": dict(zip("ab", cells, strict=False))}
    return measurements(results(metrics, {"acc": differences}, overlap))


def test_an_interval_and_a_verdict():
    cells = Cell(0.5, 0.4, 0.6, 40), Cell(0.7, 0.6, 0.8, 40)
    said = lines(*cells, differences={"b - a": Cell(0.2, 0.1, 0.3, 40)}, overlap={"b": 3})
    assert said == [
        "  t: right choice (higher is better, 40 items)",
        "    a  50 %  40 to 60",
        "    b  70 %  60 to 80  better than a, the best",
        "  b          against a: t: right choice 50 → 70 %, better.",
        "  but        asked in training were 3 of 40 items of t",
    ]


def test_few_items_have_neither():
    few = Cell(0.5, NO, NO, 3)
    said = lines(few, few, differences={"b - a": Cell(0.2, NO, NO, 3)})
    assert said[1] == "    a  50 %  no interval: 3 items are too few, 20 are needed"
    assert said[3].endswith("50 → 50 %, no interval.")


def test_a_library_may_give_none():
    assert lines(Cell(0.5, NO, NO, 300), differences={})[1] == "    a  50 %  no interval"


def test_an_infinite_bound_is_no_verdict():
    for low, high in ((0.1, math.inf), (-math.inf, -0.1), (NO, NO), (0.1, NO)):
        cell = Cell(0.2, low, high, 40)
        assert not cell.differs
        said = " ".join(lines(cell, cell, differences={"b - a": cell}))
        assert "better" not in said.replace("is better", "") and "best" not in said


def test_results_are_json_and_come_back(tmp_path):
    """JSON has no NaN, and no infinity."""
    metrics = {"x": {"a": Cell(math.inf, NO, NO, 3), "b": Cell(0.5, 0.4, 0.6, 40)}}
    path = tmp_path / "results.json"
    results(metrics, {}).to_file(path)

    def refuse(constant):
        raise AssertionError(constant)

    json.loads(path.read_text(), parse_constant=refuse)
    cells = Results.from_file(path).tasks["t"].metrics["x"]
    assert cells["b"] == Cell(0.5, 0.4, 0.6, 40)
    assert math.isnan(cells["a"].value) and not cells["a"].has_interval


def test_a_run_fits_80_columns_and_ends_with_the_next_command(tmp_path):
    """A path alone may be longer: it could not be copied in pieces."""
    add_eval(tmp_path / "run", add_sft(tmp_path / "run"))
    shown = show_run(tmp_path / "run").splitlines()
    assert all(len(line) <= COLUMNS or str(tmp_path) in line for line in shown)
    assert shown[-1].endswith(f"llmpipe report {tmp_path / 'run'}")
    assert "  rows       72 read, 2 rejected (2 empty), 1 truncated, 3 duplicate; 63 to" in shown
    assert [line for line in shown if "against" in line] == [
        "  sft        against base: generate: exact match 0.0 → 71 %, better.",
        "  few        against base: generate: exact match 0.0 → 50 %, no difference",
    ]
    alone = show_run(tmp_path / "run" / "eval").splitlines()
    assert "    sft    71 %  60 to 80    better than base" in alone


def test_a_loss_that_rose_again_is_said(tmp_path):
    add_sft(tmp_path / "run", held_out=[(0, 6.0), (20, 3.6), (40, 6.4)])
    assert show_run(tmp_path / "run" / "sft").splitlines()[-2:] == [
        "  but        held-out loss was lowest at step 20, 3.6, and is 6.4 at step 40:",
        "             see evaluation.keep_best",
    ]


def test_a_long_text_is_cut_at_spaces():
    wrapped = labelled("from", "word " * 30)
    assert len(wrapped) == 3 and all(len(line) <= COLUMNS for line in wrapped)
    assert wrapped[0].startswith("  from       word") and wrapped[1].startswith(" " * 13 + "word")
    assert labelled("from", "x" * 100) == ["  from       " + "x" * 100]
