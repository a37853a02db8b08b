"""Where everything lies in the pictures of the page: curves, intervals, lineage.

The records here hold coordinates and words; `charts.html.j2` draws them as SVG.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from llmpipe.report.curves import Point, drawable
from llmpipe.report.text import number
from llmpipe.run.results import Cell

# the field of a plot, in the picture's 340 x 170
LEFT, TOP, BOTTOM = 46, 8, 150

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


def ticks(low: float, high: float) -> list[float]:
    """Three to five round numbers from `low` to `high`.

    They are multiples of 1, 2, 2.5 or 5 times a power of ten.
    """
    power = math.floor(math.log10((high - low) / 5))
    steps = [multiple * 10.0**e for e in (power, power + 1) for multiple in (1, 2, 2.5, 5)]
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
    dots: list[Dot]
    are_rare: bool
    """So few points that each one is to be seen."""


@dataclass(frozen=True)
class End:
    """The last value of a curve, written beside it."""

    text: str
    y: float
    style: int


@dataclass(frozen=True)
class Plot:
    """A small picture of curves."""

    title: str
    unit: str
    name: str
    """What it shows, in words."""
    right: int
    rows: list[Tick]
    columns: list[Tick]
    along: str
    curves: list[Curve]
    ends: list[End]
    left: int = LEFT
    bottom: int = BOTTOM


@dataclass(frozen=True)
class Field:
    """Turns steps and values into places in a plot."""

    steps: tuple[float, float]
    values: tuple[float, float]
    right: int

    def x(self, step: float) -> float:
        first, last = self.steps
        return round(LEFT + (step - first) / (last - first) * (self.right - LEFT), 1)

    def y(self, value: float) -> float:
        low, high = self.values
        return round(BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP), 1)


def plot(
    title: str,
    unit: str,
    series: list[Series],
    steps: tuple[float, float],
    most: int,
    along: str = "step",
) -> Plot:
    """Curves from the first to the last of `steps`, at most `most` points each.

    `along`: what lies on the horizontal axis.
    """
    is_labelled = any(one.label for one in series)
    values = span([value for one in series for _, value in one.points], 0.06)
    field = Field(steps, values, right=240 if is_labelled else 284)
    said = ", ".join(
        f"{one.label} from {number(one.points[0][1])} to {number(one.points[-1][1])}"
        for one in series
    )
    return Plot(
        title=title,
        unit=unit,
        name=f"{title}: {said}",
        right=field.right,
        rows=[Tick(number(value, digits=6), field.y(value)) for value in ticks(*values)],
        columns=[Tick(number(step, digits=6), field.x(step)) for step in ticks(*steps)],
        along=along,
        curves=[_curve(one, field, most, along) for one in series],
        ends=_ends(series, field),
    )


def _curve(series: Series, field: Field, most: int, along: str) -> Curve:
    points = series.points
    line = " ".join(f"{field.x(step):g},{field.y(value):g}" for step, value in thin(points, most))
    every = -(-len(points) // 8)
    dots = [
        Dot(
            field.x(step),
            field.y(value),
            f"{series.label} {along} {number(step)}: {number(value)}",
        )
        for step, value in (*points[::every], points[-1])
    ]
    return Curve(series.style, line, dots, are_rare=len(points) <= 40)


def _ends(series: list[Series], field: Field) -> list[End]:
    """The last values from top to bottom, pushed apart where they would lie on each other."""
    last = []
    for one in series:
        value = one.points[-1][1]
        last.append((field.y(value), f"{one.label} {number(value)}", one.style))
    ends: list[End] = []
    below = -math.inf
    for i, (y, text, style) in enumerate(sorted(last), 1):
        lowest = BOTTOM - 12 * (len(last) - i)
        below = max(min(y, lowest), below + 12)
        ends.append(End(text, below, style))
    return ends


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


# --- lineage --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A box of the lineage: an artifact, or a model that it was made from."""

    title: str
    note: str
    is_outside: bool


@dataclass(frozen=True)
class Box:
    source: Source
    short: str
    x: int
    y: int


@dataclass(frozen=True)
class Link:
    """An elbow from a box down and to the right, to what was made from it."""

    x: int
    y: int
    end_x: int
    end_y: int


@dataclass(frozen=True)
class Lineage:
    """What was made from what.

    Each box has its own row and its own column, so that no line crosses a box.
    """

    boxes: list[Box]
    links: list[Link]
    width: int
    height: int
    name: str
    """What it shows, in words."""


def lineage(sources: dict[str, Source], made_from: list[tuple[str, str]]) -> Lineage:
    """`made_from`: pairs of keys of `sources`, what was used and what was made of it."""
    depth = dict.fromkeys(sources, 0)
    for parent, child in made_from * len(sources):
        depth[child] = max(depth[child], min(depth[parent] + 1, len(sources)))
    order: Callable[[str], int] = depth.__getitem__
    places = {key: (i * 34, i * 48) for i, key in enumerate(sorted(sources, key=order))}
    boxes = []
    for key, (x, y) in places.items():
        title = sources[key].title
        short = title if len(title) < 20 else f"{title[:6]}…{title[-12:]}"
        boxes.append(Box(sources[key], short, x, y))
    said = "; ".join(f"{sources[a].title} → {sources[b].title}" for a, b in made_from)
    return Lineage(
        boxes=boxes,
        links=[Link(*places[parent], *places[child]) for parent, child in made_from],
        width=len(sources) * 34 + 410,
        height=len(sources) * 48,
        name=f"lineage: {said or ', '.join(sources)}",
    )
