"""Two runs in one table of differences: what was asked otherwise, and what came of it.

Numbers of two evaluations are compared only where the items are the same by their sha256. They are
not paired, since each run drew its interval alone: the difference has the interval that follows
from both (Newcombe 1998, method 10), which is the wider one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from llmpipe.errors import UserError
from llmpipe.files.json import flat
from llmpipe.report.answers import CHARACTERS, FIRST
from llmpipe.report.measures import measure
from llmpipe.report.panels import MOST, panels
from llmpipe.report.parts import Part, Run, dig
from llmpipe.report.pieces import Answer, Card, Content, Group, Heading, Noted, Table
from llmpipe.report.plots import Plot
from llmpipe.report.scoreboard import column_name, shown, verdict_of
from llmpipe.report.series import named
from llmpipe.report.text import clip, is_number, number, plain, text_of
from llmpipe.run.results import Cell, Results

LONGEST = 120  # characters of a value of a recipe


@dataclass(frozen=True)
class Curves:
    """Of the artifacts of one name in both runs."""

    name: str
    plots: list[Plot]


@dataclass(frozen=True)
class Comparison:
    table: Table
    same: list[str]
    """Artifacts that do not differ."""
    curves: list[Curves]
    answers: list[Card]
    """To prompts that both runs were asked."""


def comparison(a: Run, b: Run) -> Comparison:
    others = {part.name: part for part in b.parts}
    groups, same, curves = [], [], []
    for part in sorted(a.parts, key=lambda part: not part.is_evaluation):
        other = others.pop(part.name, None)
        if other is None:
            groups.append(_alone(part, is_first=True))
            continue
        rows = list(_rows(part, other))
        if rows:
            groups.append(Group(part.name, rows))
        else:
            same.append(part.name)
        if not part.is_evaluation and part.stage == other.stage:
            plots = panels({"A": part, "B": other}, MOST // a.scale).plots
            curves += [Curves(part.name, plots)] if plots else []
    groups += [_alone(part, is_first=False) for part in others.values()]
    headings = [
        Heading("what"),
        Heading(a.name, is_number=True),
        Heading(b.name, is_number=True),
        Heading("B less A", is_number=True),
    ]
    return Comparison(Table("differences", headings, groups), same, curves, _answers(a, b))


def _alone(part: Part, *, is_first: bool) -> Group:
    there: list[Content] = [part.status, "absent"]
    return Group(part.name, [["artifact", *(there if is_first else reversed(there)), ""]])


def _rows(part: Part, other: Part) -> Iterator[list[Content]]:
    """What differs between two artifacts of one name."""
    from llmpipe.run.identity import changes

    if part.status != other.status:
        yield ["status", clip(part.status, LONGEST), clip(other.status, LONGEST), ""]
    for at, x, y in changes(part.known("asked"), other.known("asked")):
        if not _is_of_namesakes(at, part, other):
            yield [at, clip(plain(x), LONGEST), clip(plain(y), LONGEST), _less(x, y)]
    if part.is_evaluation and other.is_evaluation:
        yield from _measured(part, other)
        return
    ours, theirs = _results(part), _results(other)
    for name in ours | theirs:
        x, y = ours.get(name), theirs.get(name)
        if x != y:
            yield [name, number(x), number(y), _less(x, y)]


def _is_of_namesakes(at: str, part: Part, other: Part) -> bool:
    """Whether what differs is but the fingerprint of a parent, which both runs call alike and which
    has rows of its own."""
    path, _, last = at.rpartition(".")
    field = path.removeprefix("models.")
    names = [dig(one.known("asked", "models").get(field), "artifact") for one in (part, other)]
    return last == "fingerprint" and names[0] == names[1] != {}


OF_TRAINING = {"steps": "steps", "tokens": "tokens trained on", "seconds": "time, s"}


def _results(part: Part) -> dict[str, float]:
    """The last metrics and what the training took, in words and in the units of the curves."""
    results = {}
    for name, value in flat(part.known("final")).items():
        if not is_number(value) or name.startswith("ranking "):
            continue  # a reward model's ranking says again what its curves say
        bare = name.removesuffix("_before")
        known = named(bare, part.stage)
        words = ["held-out" if bare.startswith("eval_") else "", known.title]
        words += ["before"] if bare != name else []
        title = " ".join(filter(None, words)) + (f", {known.unit}" if known.unit else "")
        results[title] = value * known.factor
    training = part.known("training")
    for name, title in OF_TRAINING.items():
        if is_number(value := training.get(name)):
            results[title] = value
    return results


def _less(x: object, y: object) -> str:
    if not (is_number(x) and is_number(y)):
        return ""
    return number(y - x, sign="+", digits=3)


# --- evaluations ----------------------------------------------------------------------------------


def _measured(part: Part, other: Part) -> Iterator[list[Content]]:
    try:
        ours, theirs = (Results.from_file(p.path / "results.json") for p in (part, other))
    except UserError:
        return
    are_same = _items(part) == _items(other)
    for name, task in ours.tasks.items():
        if name not in theirs.tasks:
            continue
        for metric, cells in task.metrics.items():
            known = measure(metric)
            for label, a in cells.items():
                b = theirs.tasks[name].metrics.get(metric, {}).get(label)
                if b is None or not known.is_headline or a == b:
                    continue
                verdict = _verdict(a, b, metric) if are_same and a.n == b.n else "other items"
                yield [
                    f"{column_name(name, known)}, {label}",
                    _read(a, metric),
                    _read(b, metric),
                    verdict,
                ]


def _items(part: Part) -> dict[str, object]:
    """What was measured on: sha256 by the task's place."""
    content = part.known("asked", "content")
    return {key: value for key, value in content.items() if key.startswith("tasks.")}


def _read(cell: Cell, metric: str) -> Noted:
    value, bounds = shown(cell, measure(metric))
    return Noted(value, bounds or "no interval")


def _verdict(a: Cell, b: Cell, metric: str) -> Noted:
    known = measure(metric)
    less = unpaired(a, b)
    value, bounds = shown(less, known, is_difference=True)
    verdict = verdict_of(less, known)
    return Noted(value, f"{bounds}, {verdict}" if bounds else verdict)


def unpaired(a: Cell, b: Cell) -> Cell:
    """`b` less `a`, which were measured apart from each other."""
    value = b.value - a.value
    if not (a.has_interval and b.has_interval):
        return Cell(value, math.nan, math.nan, b.n)
    down = math.hypot(b.value - b.low, a.high - a.value)
    up = math.hypot(b.high - b.value, a.value - a.low)
    return Cell(value, value - down, value + up, b.n)


# --- answers --------------------------------------------------------------------------------------


def _answers(a: Run, b: Run) -> list[Card]:
    """What the trained artifacts of both runs answer to the first prompts that both were asked."""
    most = CHARACTERS // a.scale
    ours, theirs = _said(a), _said(b)
    cards = []
    for prompt in ours:
        if prompt not in theirs:
            continue
        answers = [
            Answer(f"{letter}: {name}", clip(text, most))
            for name in ours[prompt] | theirs[prompt]
            for letter, said in (("A", ours[prompt]), ("B", theirs[prompt]))
            if (text := said.get(name)) is not None
        ]
        cards.append(Card(clip(prompt, most), answers))
    return cards[: 2 * FIRST]


def _said(run: Run) -> dict[str, dict[str, str]]:
    """{prompt: {artifact: its answer}}"""
    said: dict[str, dict[str, str]] = {}
    for part in run.parts:
        for line in part.lines("samples.jsonl"):
            if line.get("when") == "after":
                text = text_of(line.get("answer"))
                said.setdefault(text_of(line.get("prompt")), {})[part.name] = text
    return said
