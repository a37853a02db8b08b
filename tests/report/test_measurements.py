"""What a terminal says of an evaluation: no interval and no verdict where there is none."""

import json
import math

from llmpipe.report.terminal import measurements
from llmpipe.run.results import Cell, MeasuredModel, Results, TaskResults

NO = math.nan


def results(metrics, differences):
    model = MeasuredModel(None, None, 9, 9, "float32", None)
    task = TaskResults("generate", metrics, differences, n=3, overlap={})
    return Results({"a": model, "b": model}, {"t": task})


def lines(*cells, differences):
    metrics = {"x": dict(zip("ab", cells, strict=False))}
    return measurements(results(metrics, {"x": differences}))


def test_an_interval_and_a_verdict():
    said = lines(Cell(0.5, 0.4, 0.6, 40), differences={"b - a": Cell(0.2, 0.1, 0.3, 40)})
    assert "[0.4000, 0.6000]  n=40" in said[1]
    assert said[2].endswith("[+0.1000, +0.3000]  differs")


def test_few_items_have_neither():
    said = lines(Cell(0.5, NO, NO, 3), differences={"b - a": Cell(0.2, NO, NO, 3)})
    assert said[1].endswith("no interval: 3 items are too few, 20 are needed  n=3")
    assert said[2].endswith("+0.2000  no interval: 3 items are too few, 20 are needed")


def test_a_library_may_give_none():
    assert lines(Cell(0.5, NO, NO, 300), differences={})[1].endswith("no interval  n=300")


def test_an_infinite_bound_is_no_verdict():
    for low, high in ((0.1, math.inf), (-math.inf, -0.1), (NO, NO), (0.1, NO)):
        cell = Cell(0.2, low, high, 40)
        assert not cell.differs
        assert "differs" not in lines(cell, differences={"b - a": cell})[2]


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
