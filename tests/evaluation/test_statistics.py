"""Scores and intervals against closed forms."""

import itertools
import math

import numpy as np
import pytest

from llmpipe.evaluation.book import Line, Reported
from llmpipe.evaluation.statistics import interval, measured, resampled, wilson
from llmpipe.evaluation.task import Marked
from llmpipe.evaluation.tasks.perplexity import windows
from llmpipe.run.results import Cell
from llmpipe.scores import pass_at


def line(model, item, **scores):
    return Line("t", model, item, scores=scores)


def test_wilson():
    # Newcombe 1998, table I: 81 of 263 and 0 of 20
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 1)[1] == 1.0


@pytest.mark.parametrize(("n", "right"), [(5, 0), (5, 2), (5, 5), (8, 3)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(n, right):
    answers = [i < right for i in range(n)]
    for k in range(1, n + 1):
        draws = list(itertools.combinations(answers, k))
        assert pass_at(k, n, right) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))


def test_the_bootstrap_of_a_mean_is_the_normal_interval():
    rng = np.random.default_rng(0)
    values = rng.normal(3.0, 2.0, 2000)
    drawn = resampled(values[None], np.ones((1, 2000)), 0)[0]
    low, high = interval(drawn)
    half = 1.96 * values.std() / math.sqrt(2000)
    assert (low, high) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.1 * half
    )
    assert interval(resampled(np.full((1, 9), 2.5), np.ones((1, 9)), 0)[0]) == (2.5, 2.5)


def test_ratios_of_sums_and_paired_differences():
    lines = [line("a", i, nats=[float(i + 1), 2.0 * (i + 1)]) for i in range(20)]
    lines += [line("b", i, nats=[float(i + 2), 2.0 * (i + 1)]) for i in range(20)]
    found = measured(lines, ["a", "b"], 0)
    assert found.metrics["nats"]["a"] == Cell(value=0.5, low=0.5, high=0.5, n=20)
    assert found.metrics["nats"]["b"].value == pytest.approx(230 / 420)
    difference = found.differences["nats"]["b - a"]
    assert difference.value == pytest.approx(20 / 420) and difference.low > 0


def test_pairing_makes_a_small_difference_visible():
    """Items differ far more than the models do; on the same draws that cancels out."""
    rng = np.random.default_rng(1)
    hard = rng.normal(0, 10, 300)
    lines = [
        line(m, i, x=float(h + shift))
        for m, shift in (("a", 0.0), ("b", 0.1))
        for i, h in enumerate(hard)
    ]
    found = measured(lines, ["a", "b"], 0)
    cells = found.metrics["x"]
    assert cells["a"].high > cells["b"].low, "apart, the intervals overlap"
    assert found.differences["x"]["b - a"].low == pytest.approx(0.1)


@pytest.mark.parametrize("n", [1, 2, 5, 19])
def test_few_items_have_no_interval_and_show_no_difference(n):
    """A bootstrap of one item has no width, and of a few it is too narrow."""
    lines = [line("a", i, x=0.1, ppl=[1.0, 2.0]) for i in range(n)]
    lines += [line("b", i, x=0.7, ppl=[2.0, 2.0]) for i in range(n)]
    found = measured(lines, ["a", "b"], 0)
    for metric in ("x", "ppl"):
        cells = [*found.metrics[metric].values(), *found.differences[metric].values()]
        assert not any(cell.has_interval or cell.differs for cell in cells)
        assert cells[0].lacks == f"no interval: {n} items are too few, 20 are needed"
    assert found.differences["x"]["b - a"].value == pytest.approx(0.6)


@pytest.mark.parametrize("n", [1, 3, 5, 8, 40, 400])
@pytest.mark.parametrize("right", [1, 3, 5])
def test_none_against_a_few_right_answers_is_no_difference(n, right):
    """The bootstrap of shares collapses there; McNemar's exact test never rejects below six."""
    if right > n:
        return
    lines = [line("a", i, acc=0.0) for i in range(n)]
    lines += [line("b", i, acc=float(i < right)) for i in range(n)]
    cell = measured(lines, ["a", "b"], 0).differences["acc"]["b - a"]
    assert cell.value == pytest.approx(right / n)
    assert cell.low < 0 < cell.high and not cell.differs


def test_six_right_answers_that_the_other_has_not_are_a_difference():
    lines = [line("a", i, acc=0.0) for i in range(40)]
    lines += [line("b", i, acc=float(i < 6)) for i in range(40)]
    differences = measured(lines, ["a", "b"], 0).differences
    assert differences["acc"]["b - a"].differs


def test_a_difference_on_a_few_items_alone_is_not_shown():
    """Of scores that are no shares, too: 36 of 40 items are equal."""
    for parted, shown in ((4, False), (5, False), (12, True)):
        lines = [line("a", i, x=0.5) for i in range(40)]
        lines += [line("b", i, x=0.5 + 0.3 * (i < parted)) for i in range(40)]
        cell = measured(lines, ["a", "b"], 0).differences["x"]["b - a"]
        assert cell.differs == shown and cell.has_interval


def test_a_perplexity_beyond_all_numbers_is_infinite():
    lines = [line(model, i, perplexity=[2000.0, 1.0]) for model in "ab" for i in range(30)]
    found = measured(lines, ["a", "b"], 0)
    assert found.metrics["perplexity"]["a"].value == math.inf
    assert not found.metrics["perplexity"]["a"].has_interval
    assert not found.differences["perplexity"]["b - a"].differs


def test_models_measured_on_other_items_are_not_compared():
    lines = [line("a", i, x=1.0) for i in range(3)] + [line("b", i, x=1.0) for i in range(1, 4)]
    found = measured(lines, ["a", "b"], 0)
    assert set(found.metrics["x"]) == {"a", "b"} and found.differences == {}


def test_a_library_s_own_number_counts():
    lines = [line("a", f"x/{i:08}", acc=float(i < 2), odd=1.0) for i in range(3)]
    numbers = {"acc": Reported(2 / 3, 0.1, 3), "odd": Reported(5.0, 0.5, 3)}
    lines.append(Line("t", "a", "reported", reported=numbers))
    cells = measured(lines, ["a"], 0).metrics
    assert cells["odd"]["a"].n == 3
    assert (cells["acc"]["a"].low, cells["acc"]["a"].high) == wilson(2, 3)
    assert (cells["odd"]["a"].value, cells["odd"]["a"].n) == (5.0, 3)
    assert cells["odd"]["a"].low == pytest.approx(4.02, abs=1e-3)
    assert cells["odd"]["a"].high == pytest.approx(5.98, abs=1e-3)


def test_windows_score_every_token_once():
    for n, window, stride in ((1, 4, 2), (10, 4, 2), (11, 5, 3), (7, 100, 50)):
        marks = [False] + [True] * (n - 1)
        seen = []
        for start, (ids, fresh) in enumerate(
            windows(Marked(list(range(n)), marks), window, stride)
        ):
            assert not fresh[0], "the first token of a window has nothing before it"
            seen += [i for i, m in zip(ids, fresh, strict=True) if m]
            assert len(ids) <= window, start
        assert seen == list(range(1, n))
