"""Models by tasks: each number as its interval lets it be read, and which differences are real.

A model is held against the one it was made from, where that was measured, too; else against the
first of the list. A difference is real where its paired 95 % interval leaves zero out, and a model
is the best of a column where its differences from all the others are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from llmpipe.report.curves import drawable
from llmpipe.report.measures import PERCENT, Measure, measure
from llmpipe.report.text import counted, decimals_of, number
from llmpipe.run.results import Cell, Cells, Results, TaskResults

Verdict = Literal["better", "worse", "higher", "lower", "no difference shown", "no interval"]


@dataclass(frozen=True)
class Difference:
    """A model's number less that of another one, on the same items."""

    other: str
    value: str
    bounds: str
    """Of its 95 % interval; empty where there is none."""
    verdict: Verdict

    @property
    def is_real(self) -> bool:
        return self.verdict not in ("no difference shown", "no interval")


@dataclass(frozen=True)
class Score:
    """A number of one model on one task."""

    value: str
    bounds: str
    """Of its 95 % interval, or why it has none."""
    has_interval: bool
    n: int
    difference: Difference | None
    """From the model that it is held against, if there is one."""
    is_best: bool
    """Whether it is better than every other model's, and every one of these differences is real."""
    note: str = ""
    """How it was measured, where that is not as the column says."""


@dataclass(frozen=True)
class Column:
    """A metric of a task, with what each model has of it."""

    task: str
    measure: Measure
    scores: dict[str, Score]
    """By model."""

    @property
    def name(self) -> str:
        return column_name(self.task, self.measure)

    @property
    def items(self) -> str:
        counts = {score.n for score in self.scores.values()}
        return counted(counts.pop(), "item") if len(counts) == 1 else "items differ"


def column_name(task: str, known: Measure) -> str:
    return task if task == known.title else f"{task}: {known.title}"


@dataclass(frozen=True)
class Scoreboard:
    """What an evaluation comes to."""

    models: list[str]
    columns: list[Column]

    @property
    def against(self) -> dict[str, str]:
        """What each model is held against, in most columns."""
        others: dict[str, list[str]] = {}
        for column in self.columns:
            for model, score in column.scores.items():
                if score.difference:
                    others.setdefault(model, []).append(score.difference.other)
        return {model: max(names, key=names.count) for model, names in others.items()}

    @property
    def best(self) -> list[str]:
        """Models that are the best of some column."""
        scored = [(model, column) for model in self.models for column in self.columns]
        return list(dict.fromkeys(m for m, c in scored if m in c.scores and c.scores[m].is_best))


def scoreboard(results: Results, *, headlines: bool = True) -> Scoreboard:
    """The metrics that say something each; or, without `headlines`, all of them."""
    models = list(results.models)
    parents = {label: model.parent for label, model in results.models.items()}
    columns = []
    for name, task in results.tasks.items():
        for metric in task.metrics:
            if measure(metric).is_headline or not headlines:
                columns.append(_column(name, metric, task, parents))
    return Scoreboard(models, _joined([column for column in columns if column.scores]))


def _joined(columns: list[Column]) -> list[Column]:
    """Pairs that reward models rank stand in the column of those that policies rank."""
    by_task: dict[str, list[Column]] = {}
    for column in columns:
        by_task.setdefault(column.task, []).append(column)
    joined = []
    for column in columns:
        others = [one for one in by_task[column.task] if one.measure == measure("accuracy_sum")]
        if column.measure == measure("accuracy") and others:
            for model, score in column.scores.items():
                others[0].scores.setdefault(model, replace(score, note="by its reward"))
        else:
            joined.append(column)
    return joined


def _column(name: str, metric: str, task: TaskResults, parents: dict[str, str | None]) -> Column:
    known = measure(metric)
    cells = {label: cell for label, cell in task.metrics[metric].items() if label in parents}
    differences = task.differences.get(metric, {})
    scores = {}
    for label, cell in cells.items():
        parent = parents[label]
        other = parent if parent in cells else next(iter(cells))
        value, bounds = shown(cell, known)
        scores[label] = Score(
            value=value,
            bounds=bounds or cell.lacks,
            has_interval=bool(bounds),
            n=cell.n,
            difference=difference(differences, label, other, known) if other != label else None,
            is_best=_is_best(label, list(cells), differences, known),
        )
    return Column(name, known, scores)


def _is_best(label: str, labels: list[str], differences: Cells, known: Measure) -> bool:
    found = [difference(differences, label, other, known) for other in labels if other != label]
    return bool(found) and all(one is not None and one.verdict == "better" for one in found)


def less(differences: Cells, label: str, other: str) -> Cell | None:
    """The number of `label` less that of `other`, whichever way round it is recorded."""
    if cell := differences.get(f"{label} - {other}"):
        return cell
    if cell := differences.get(f"{other} - {label}"):
        return Cell(-cell.value, -cell.high, -cell.low, cell.n)
    return None


def difference(differences: Cells, label: str, other: str, known: Measure) -> Difference | None:
    """`label` against `other`; None where they were not measured on the same items."""
    cell = less(differences, label, other)
    if cell is None:
        return None
    value, bounds = shown(cell, known, is_difference=True)
    return Difference(other, value, bounds, verdict_of(cell, known))


def verdict_of(cell: Cell, known: Measure) -> Verdict:
    """What a difference says."""
    if not cell.has_interval:
        return "no interval"
    if not cell.differs:
        return "no difference shown"
    if known.higher_is_better is None:
        return "higher" if cell.value > 0 else "lower"
    return "better" if (cell.value > 0) == known.higher_is_better else "worse"


def shown(cell: Cell, known: Measure, *, is_difference: bool = False) -> tuple[str, str]:
    """A number and its interval with the digits that the interval supports; `38 %`, `34 to 43`.

    The interval is empty where there is none.
    """
    value, low, high = (part * known.factor for part in (cell.value, cell.low, cell.high))
    sign = "+" if is_difference else ""
    if not drawable(value):
        return "not a number", ""
    if not cell.has_interval:
        return with_unit(number(value, sign=sign, digits=3), known, is_difference), ""
    decimals = decimals_of((high - low) / 2)
    while is_difference and cell.differs and decimals < 12 and _rounds_to_zero(low, high, decimals):
        decimals += 1
    text = with_unit(number(value, decimals, sign), known, is_difference)
    return text, f"{number(low, decimals, sign)} to {number(high, decimals, sign)}"


def _rounds_to_zero(low: float, high: float, decimals: int) -> bool:
    nearest = min(abs(low), abs(high))
    return nearest > 0 and not math.floor(nearest * 10**decimals + 0.5)


def with_unit(text: str, known: Measure, is_difference: bool = False) -> str:
    """Only of what is read with its unit, per cent; the others stand over the column."""
    if known.unit != PERCENT:
        return text
    return f"{text} {known.unit_of_differences if is_difference else PERCENT}"


# --- in sentences ---------------------------------------------------------------------------------


def sentences(board: Scoreboard) -> list[str]:
    """What each model is against the one it is held against, one sentence a model."""
    lines = []
    for model in board.models:
        by_other: dict[str, list[str]] = {}
        for column in board.columns:
            score = column.scores.get(model)
            if score and score.difference:
                other = score.difference.other
                by_other.setdefault(other, []).append(_clause(column, score, score.difference))
        lines += [
            f"{model} against {other}: {'; '.join(said)}." for other, said in by_other.items()
        ]
    return lines


def _clause(column: Column, score: Score, found: Difference) -> str:
    before = column.scores[found.other].value.removesuffix(f" {PERCENT}")
    return f"{column.name} {before} → {score.value}, {found.verdict}"


def lines_of(board: Scoreboard) -> Iterator[str]:
    """The scoreboard as text: a paragraph for each column, a line for each model."""
    width = max(map(len, board.models), default=0)
    for column in board.columns:
        notes = [column.measure.unit.replace(PERCENT, ""), column.measure.direction, column.items]
        yield f"{column.name} ({', '.join(note for note in notes if note)})"
        values = max(len(score.value) for score in column.scores.values())
        lengths = [len(score.bounds) for score in column.scores.values() if score.has_interval]
        bounds = max(lengths, default=0)
        for model, score in column.scores.items():
            line = f"  {model:<{width}}  {score.value:>{values}}  {score.bounds:<{bounds}}"
            yield f"{line}  {score.note or _against(score)}".rstrip()


def _against(score: Score) -> str:
    found = score.difference
    if not found or found.verdict == "no interval":
        return ""
    if not found.is_real:
        return f"not shown to differ from {found.other}"
    best = ", the best" if score.is_best else ""
    return f"{found.verdict} than {found.other}{best}"
