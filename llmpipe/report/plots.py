"""Where everything lies in a plot: axes with ticks, curves, marks, legend; and in the strip that an
interval is.

The records here hold coordinates and words; `plots.html.j2` draws them as SVG. No library draws
them: Matplotlib writes colours into every element, so that a page cannot be light and dark, and
its import (0.9 s of processor time) is longer than a report takes (0.7 s); Pygal writes a script
and an address into each picture; Plotly, Vega and Bokeh are drawn by a script.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from llmpipe.report.curves import Point, drawable
from llmpipe.report.text import number
from llmpipe.run.results import Cell

# a plot's field in its picture of 360 x 220
TOP, RIGHT, BOTTOM = 12, 348, 178
CHARACTER = 7.1  # width of a digit

SMOOTHED = 60
"""Of a curve with more points than this the running mean is drawn, and the points are pale."""

PATH = 1 / 5
"""Of the points of a path each mean is over so many: a tangle has no direction otherwise."""

# the field of a strip, in the picture's 140 x 18
STRIP_LEFT, STRIP_WIDTH = 4, 132


def span(values: Iterable[float], margin: float = 0) -> tuple[float, float]:
    """The range of values with a margin, never empty."""
    values = list(values)
    low, high = min(values), max(values)
    if high - low > 1e-90:
        pad = (high - low) * margin
    elif abs(high) > 1e-90:
        pad = abs(high) * 0.1
    else:
        pad = 1
    return (max(low - pad, 0) if low >= 0 else low - pad), high + pad


def ticks(low: float, high: float, *, are_whole: bool = False) -> list[float]:
    """Three to five round numbers from `low` to `high`; fewer where they have to be whole.

    They are multiples of 1, 2, 2.5 or 5 times a power of ten.
    """
    power = math.floor(math.log10((high - low) / 5))
    steps = [multiple * 10.0**e for e in (power, power + 1) for multiple in (1, 2, 2.5, 5)]
    if are_whole:
        steps = [step for step in steps if step == int(step)] or [1]
    for step in steps:
        first = math.ceil(low / step - 1e-9)
        last = math.floor(high / step + 1e-9)
        if last - first < 5:
            break
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def thin(points: list[Point], most: int) -> list[Point]:
    """At most `most` of the points.

    The first, the last, and the lowest and the highest of each bucket in between.
    """
    if len(points) <= most:
        return points
    kept = {0, len(points) - 1}
    buckets = (most - 2) // 2
    edges = [1 + i * (len(points) - 2) // buckets for i in range(buckets + 1)]
    for begin, end in pairwise(edges):
        for pick in (min, max):
            kept.add(pick(range(begin, end), key=lambda i: points[i][1]))
    return [points[i] for i in sorted(kept)]


def smooth(points: list[Point], share: float = 1 / 15) -> tuple[list[Point], int]:
    """The running mean of points, and over how many each is: an odd number, a `share` of all.

    At both ends it is over as many on either side as there are, so it begins and ends with them.
    """
    width = int(len(points) * share) // 2 * 2 + 1
    if width < 3:
        return points, 1
    sums = [(0.0, 0.0)]
    for x, y in points:
        sums.append((sums[-1][0] + x, sums[-1][1] + y))
    means = []
    for i in range(len(points)):
        reach = min(width // 2, i, len(points) - 1 - i)
        begin, end = sums[i - reach], sums[i + reach + 1]
        count = 2 * reach + 1
        means.append(((end[0] - begin[0]) / count, (end[1] - begin[1]) / count))
    return means, width


def thousands_of(low: float, high: float) -> int:
    """The power of ten, a multiple of three, that the numbers of an axis are written in; 0 for
    those that are short as they stand."""
    largest = max(abs(low), abs(high))
    if 1e-3 <= largest < 1e5:
        return 0
    return math.floor(math.log10(largest) / 3) * 3


# --- curves ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """What one curve of a plot shows."""

    label: str
    style: int
    """Colour and dashes, 0 to 3."""
    points: list[Point]


@dataclass(frozen=True)
class Tick:
    text: str
    place: float


@dataclass(frozen=True)
class Dot:
    """A value that can be read by pointing at it."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Curve:
    style: int
    points: str
    """As a polyline has them."""
    pale: str
    """The points of which this is the running mean, as a polyline or, of a path, as dots; empty
    where these are drawn themselves."""
    dots: list[Dot]
    are_rare: bool
    """So few points that each one is to be seen."""


@dataclass(frozen=True)
class Mark:
    """A word at a place in a plot."""

    x: float
    y: float
    text: str
    anchor: str


@dataclass(frozen=True)
class Entry:
    """Of a legend."""

    style: int
    text: str


@dataclass(frozen=True)
class Plot:
    """A picture of curves."""

    title: str
    unit: str
    name: str
    """What it shows, in words."""
    words: str
    """What it says, under it."""
    legend: list[Entry]
    left: int
    rows: list[Tick]
    columns: list[Tick]
    along: str
    curves: list[Curve]
    marks: list[Mark]
    top: int = TOP
    right: int = RIGHT
    bottom: int = BOTTOM


@dataclass(frozen=True)
class Axes:
    """Turns numbers into places in a plot."""

    across: tuple[float, float]
    up: tuple[float, float]
    left: int

    def x(self, value: float) -> float:
        first, last = self.across
        return round(self.left + (value - first) / (last - first) * (RIGHT - self.left), 1)

    def y(self, value: float) -> float:
        low, high = self.up
        return round(BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP), 1)

    def line(self, points: list[Point], most: int) -> str:
        return " ".join(f"{self.x(x):g},{self.y(y):g}" for x, y in thin(points, most))


@dataclass(frozen=True)
class Caption:
    """What stands over and under a plot."""

    title: str
    unit: str = ""
    words: str = ""
    along: str = "step"


def plot(
    caption: Caption,
    series: list[Series],
    across: tuple[float, float],
    most: int,
    *,
    is_path: bool = False,
) -> Plot:
    """Curves over `across`, the range of the horizontal axis; at most `most` points each.

    `is_path`: the points follow each other in time and not along the axis, so they are drawn pale
    with their running mean, which is marked at its quarters.
    """
    values = span([value for one in series for _, value in one.points], 0.06)
    power = thousands_of(*values)
    rows = [(value, number(value / 10.0**power, digits=6)) for value in ticks(*values)]
    longest = max(len(text) for _, text in rows)
    axes = Axes(across, values, left=round(12 + CHARACTER * longest))
    columns = ticks(*across, are_whole=caption.along == "step")
    said = ", ".join(
        f"{one.label} from {number(one.points[0][1])} to {number(one.points[-1][1])}".strip()
        for one in series
    )
    return Plot(
        title=caption.title,
        unit=f"{caption.unit} × 10{raised(power)}".strip() if power else caption.unit,
        name=f"{caption.title}: {said}",
        words=caption.words,
        legend=_legend(series, is_path),
        left=axes.left,
        rows=[Tick(text, axes.y(value)) for value, text in rows],
        columns=[Tick(number(value, digits=6), axes.x(value)) for value in columns],
        along=caption.along,
        curves=[_curve(one, axes, most, caption.along, is_path) for one in series],
        marks=_quarters(series[0].points, axes) if is_path else [],
    )


def raised(power: int) -> str:
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _legend(series: list[Series], is_path: bool) -> list[Entry]:
    """What each curve is; a single one without a name needs no word but what it is a mean of."""
    entries = []
    for one in series:
        _, width = smooth(one.points, PATH if is_path else 1 / 15)
        is_mean = width > 1 and (is_path or len(one.points) > SMOOTHED)
        note = f"mean of {width} steps, single ones pale" if is_mean else ""
        if text := ", ".join(part for part in (one.label, note) if part):
            entries.append(Entry(one.style, text))
    return entries


def _curve(series: Series, axes: Axes, most: int, along: str, is_path: bool) -> Curve:
    points = series.points
    drawn, pale = points, ""
    if is_path:
        drawn, _ = smooth(points, PATH)
        pale = "".join(f"M{axes.x(x):g} {axes.y(y):g}h0" for x, y in thin(points, most))
    elif len(points) > SMOOTHED:
        drawn, _ = smooth(points)
        pale = axes.line(points, most)
    every = -(-len(points) // 8)
    dots = [
        Dot(axes.x(x), axes.y(y), f"{series.label} {along} {number(x)}: {number(y)}".strip())
        for x, y in (*points[::every], points[-1])
    ]
    are_rare = len(points) <= 40 and not is_path
    return Curve(series.style, axes.line(drawn, most), pale, [] if is_path else dots, are_rare)


def _quarters(points: list[Point], axes: Axes) -> list[Mark]:
    """Where the running mean of a path begins, ends, and is at its quarters."""
    means, _ = smooth(points, PATH)
    last = len(means) - 1
    marks: list[Mark] = []
    for share, text in ((0, "start"), (1, "end"), (0.5, "½"), (0.25, "¼"), (0.75, "¾")):
        x, y = means[round(share * last)]
        place = Mark(axes.x(x), axes.y(y), text, "end" if axes.x(x) > RIGHT - 40 else "start")
        if all(math.dist((place.x, place.y), (mark.x, mark.y)) > 20 for mark in marks):
            marks.append(place)
    return marks


# --- intervals ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strip:
    """A number and its interval as a dot with whiskers, with a mark at zero."""

    low: float
    value: float
    high: float
    zero: float
    name: str
    """What it shows, in words."""


def strip(cell: Cell, low: float, high: float) -> Strip | None:
    """A number on the scale from `low` to `high`; nothing where it cannot be drawn."""
    if not drawable(cell.value):
        return None

    def x(value: float) -> float:
        return round(STRIP_LEFT + (value - low) / (high - low) * STRIP_WIDTH, 1)

    return Strip(
        low=x(cell.low if drawable(cell.low) else cell.value),
        value=x(cell.value),
        high=x(cell.high if drawable(cell.high) else cell.value),
        zero=x(0),
        name=f"{number(cell.value)} on a scale from {number(low)} to {number(high)}",
    )
