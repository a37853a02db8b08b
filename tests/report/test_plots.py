"""Axes, ticks, curves and marks of a plot, in numbers that can be worked out."""

from __future__ import annotations

import math

import pytest

from llmpipe.report import page as pages
from llmpipe.report import plots
from llmpipe.report.plots import Caption, Series, plot, smooth


@pytest.mark.parametrize("length", [401, 1000, 12345])
def test_thinning_keeps_ends_and_extremes(length):
    points = [(float(i), math.sin(i) + (i == 333) * 50 - (i == 200) * 50) for i in range(length)]
    kept = plots.thin(points, 400)
    assert len(kept) <= 400 and kept == sorted(kept)
    assert {points[0], points[-1], points[333], points[200]} <= set(kept)
    assert plots.thin(points[:400], 400) == points[:400]


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 60, [0, 20, 40, 60]),
        (0, 10, [0, 2.5, 5, 7.5, 10]),
        (0.46, 6.6, [2, 4, 6]),
        (0, 0.005, [0, 0.002, 0.004]),
        (-140, -120, [-140, -135, -130, -125, -120]),
        (8000, 28000, [10000, 15000, 20000, 25000]),
        (1e-7, 9e-7, [2e-7, 4e-7, 6e-7, 8e-7]),
        (-0.5, 0.5, [-0.4, -0.2, 0, 0.2, 0.4]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert plots.ticks(low, high) == pytest.approx(expected)


def test_there_are_three_to_five_ticks():
    for low in (-3.7, 0.0, 0.1, 17.0, 12345.6):
        for width in (1e-3 * 1.13**i for i in range(150)):
            found = plots.ticks(low, low + width)
            assert 3 <= len(found) <= 5 and low - width * 1e-6 <= found[0] < found[
                -1
            ] <= low + width * (1 + 1e-6)


def test_a_curve_that_stands_still_is_drawn():
    for value in (0, 31.2, -5.0, 1e-99, 1e99):
        low, high = plots.span([value, value])
        assert low < high and low <= value <= high
        picture = plot(Caption("x"), [Series("", 0, [(1, value)])], plots.span([1]), 400)
        macros = pages.templates().get_template("plots.html.j2").module
        assert "<polyline" in macros.plot(picture)


def test_steps_are_whole():
    assert plots.ticks(0, 3, are_whole=True) == [0, 1, 2, 3]
    assert plots.ticks(0.9, 1.1, are_whole=True) == [1]
    assert plots.ticks(0, 60, are_whole=True) == [0, 20, 40, 60]
    assert plots.ticks(0, 12, are_whole=True) == [0, 5, 10]


@pytest.mark.parametrize("count", [1, 20, 60, 200])
def test_a_running_mean_begins_and_ends_with_its_points(count):
    """And is that of a line where the points lie on one."""
    points = [(float(i), 3.0 * i) for i in range(count)]
    means, width = smooth(points)
    assert width % 2 == 1 and len(means) == count
    assert [y for _, y in means] == pytest.approx([y for _, y in points])
    assert means[0] == points[0] and means[-1] == points[-1]
    spike = [(x, 100.0 * (x == count // 2)) for x, _ in points]
    means, width = smooth(spike)
    assert max(y for _, y in means) == pytest.approx(100 / width if count > 1 else 100)


def test_small_and_large_numbers_have_their_power_over_the_axis():
    for value, power in ((2e-5, "× 10⁻⁶"), (3e-4, "× 10⁻⁶"), (2.5e6, "× 10⁶"), (4.2, "")):
        picture = plot(Caption("x"), [Series("", 0, [(0, 0), (1, value)])], (0, 1), 400)
        assert picture.unit == power
        assert all(len(tick.text) < 7 for tick in picture.rows)
        assert picture.left < 60


def test_a_long_curve_is_its_mean_over_pale_points_and_a_path_is_marked():
    points = [(float(i), math.sin(i)) for i in range(300)]
    picture = plot(Caption("x"), [Series("a", 0, points)], (0, 299), 100)
    (curve,) = picture.curves
    assert len(curve.points.split()) <= 100 and len(curve.pale.split()) <= 100
    assert picture.legend == [plots.Entry(0, "a, mean of 21 steps, single ones pale")]
    path = [(math.cos(i / 50), i / 300) for i in range(300)]
    picture = plot(Caption("x", along="KL"), [Series("", 0, path)], (-1, 1), 100, is_path=True)
    assert [mark.text for mark in picture.marks] == ["start", "end", "½", "¼", "¾"]
    assert picture.curves[0].pale.startswith("M") and picture.curves[0].pale.count("M") <= 100
    short = plot(Caption("x"), [Series("", 0, points[:30])], (0, 29), 100)
    assert short.curves[0].pale == "" and short.legend == []


def test_every_place_lies_in_the_field():
    points = [(0.0, -5.0), (10.0, 7.0), (20.0, 1.0)]
    picture = plot(Caption("x"), [Series("", 0, points)], (0, 20), 400)
    for pair in picture.curves[0].points.split():
        x, y = map(float, pair.split(","))
        assert picture.left <= x <= picture.right and picture.top <= y <= picture.bottom
    assert picture.curves[0].points.startswith(f"{picture.left},")
