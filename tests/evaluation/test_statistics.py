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
    lines = [line("a", i, nats=[float(i + 1), 2.0 * (i + 1)]) for i in range(6)]
    lines += [line("b", i, nats=[float(i + 2), 2.0 * (i + 1)]) for i in range(6)]
    found = measured(lines, ["a", "b"], 0)
    assert found.metrics["nats"]["a"] == Cell(value=0.5, low=0.5, high=0.5, n=6)
    assert found.metrics["nats"]["b"].value == pytest.approx(27 / 42)
    difference = found.differences["nats"]["b - a"]
    assert difference.value == pytest.approx(6 / 42) and difference.low > 0


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


def test_models_measured_on_other_items_are_not_compared():
    lines = [line("a", i, x=1.0) for i in range(3)] + [line("b", i, x=1.0) for i in range(1, 4)]
    found = measured(lines, ["a", "b"], 0)
    assert set(found.metrics["x"]) == {"a", "b"} and found.differences == {}


def test_a_library_s_own_number_counts():
    lines = [line("a", f"x/{i:08}", acc=float(i < 2), odd=1.0) for i in range(3)]
    numbers = {"acc": Reported(2 / 3, 0.1, 3), "odd": Reported(5.0, 0.5, 3)}
    lines.append(Line("t", "a", "reported", reported=numbers))
    cells = measured(lines, ["a"], 0).metrics
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
