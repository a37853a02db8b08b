"""Every number of an evaluation with its interval and every difference, and the recipe's gate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmpipe.errors import UserError
from llmpipe.recipe import yaml
from llmpipe.report.curves import drawable
from llmpipe.report.measures import PERCENT, Measure, measure
from llmpipe.report.parts import Part, dig
from llmpipe.report.pieces import Content, Fact, Group, Heading, Table
from llmpipe.report.plots import span, strip
from llmpipe.report.scoreboard import Scoreboard, scoreboard, shown, verdict_of
from llmpipe.report.terminal import trained_on
from llmpipe.report.text import counted, in_words, number, text_of
from llmpipe.run.gate import Judged, judged
from llmpipe.run.results import Cell, Cells, Results, TaskResults
from llmpipe.typed import record


@dataclass(frozen=True)
class GateLine:
    """A condition of the recipe, and how it went."""

    text: str
    failed: bool


@dataclass(frozen=True)
class TaskNumbers:
    name: str
    summary: str
    tables: list[Table]


@dataclass(frozen=True)
class Evaluated:
    """An evaluation."""

    name: str
    problem: str = ""
    """Why it has no numbers."""
    models: tuple[Fact, ...] = ()
    board: Scoreboard | None = None
    tasks: tuple[TaskNumbers, ...] = ()
    gates: tuple[GateLine, ...] = ()
    seen: str = ""
    """Items that were trained on."""
    without_interval: str = ""
    """Columns of the scoreboard whose differences have none."""


def evaluated(part: Part) -> Evaluated:
    path = part.path / "results.json"
    if not path.exists():
        return Evaluated(part.name)
    try:
        results = Results.from_file(path)
    except UserError as error:
        return Evaluated(part.name, error.message.removeprefix(f"{part.path}/"))
    models = []
    for label, model in results.models.items():
        reference = text_of(part.known("models", f"models.{label}", "reference"))
        parent = f", made from {model.parent}" if model.parent else ""
        parameters = f"{number(model.parameters)} parameters in {model.dtype}"
        models.append(Fact(label, f"{reference or 'unknown'}, {parameters}{parent}"))
    board = scoreboard(results)
    return Evaluated(
        name=part.name,
        models=tuple(models),
        board=board,
        tasks=tuple(_task_numbers(name, task) for name, task in results.tasks.items()),
        gates=tuple(_gates(part, results)),
        seen=in_words([s for s in map(trained_on, results.tasks, results.tasks.values()) if s]),
        without_interval=_without_interval(board),
    )


def _without_interval(board: Scoreboard) -> str:
    names = [
        column.name
        for column in board.columns
        if any(
            score.difference and score.difference.verdict == "no interval"
            for score in column.scores.values()
        )
    ]
    return in_words(names)


# --- gate -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bounds:
    """What the recipe asks of a number, see `stages.eval.Gate`."""

    min: float | None = None
    max: float | None = None
    max_ratio_to_parent: float | None = None


def _gates(part: Part, results: Results) -> list[GateLine]:
    """The recipe's conditions on the last model; none where the recipe cannot be read."""
    try:
        recipe, _ = yaml.parse(part.recipe, "recipe.yaml")
    except UserError:
        return []
    label = next(reversed(results.models), None)
    lines = []
    asked = dig(recipe, "gate")
    for name, bounds in asked.items() if isinstance(asked, dict) and label else ():
        try:
            found = judged(str(name), record(Bounds, bounds), str(label), results)
        except (UserError, ValueError) as error:
            problem = error.message if isinstance(error, UserError) else f"gate: {name}: {error}"
            lines.append(GateLine(problem.removeprefix("gate: "), failed=True))
        else:
            lines.append(_gate_line(found))
    return lines


def _gate_line(found: Judged) -> GateLine:
    asked = in_words(found.asked)
    value = number(found.value, digits=3)
    text = f"{found.metric} of {found.model} is {value}, asked is {asked}"
    return GateLine(text, failed=bool(found.failed))


# --- numbers --------------------------------------------------------------------------------------


def _task_numbers(name: str, task: TaskResults) -> TaskNumbers:
    facts = [] if task.n is None else [counted(task.n, "item")]
    if task.overlap:
        seen = [f"{n:,} asked in training of {label}" for label, n in task.overlap.items() if n]
        facts += seen or ["none asked in training"]
    tables = [
        _numbers(name, task.metrics, are_differences=False),
        _numbers(name, task.differences, are_differences=True),
    ]
    return TaskNumbers(name, "; ".join(facts), [table for table in tables if table.groups])


def _numbers(task: str, metrics: dict[str, Cells], *, are_differences: bool) -> Table:
    """A task's metrics, or its paired differences."""
    title = "difference" if are_differences else "metric"
    headings = [
        Heading(title if are_differences else "model"),
        Heading("value", is_number=True),
        Heading("95 % interval", is_number=True),
        Heading("reading" if are_differences else "items", is_number=not are_differences),
        Heading("picture"),
    ]
    groups = [_metric(name, cells, are_differences) for name, cells in metrics.items()]
    return Table(f"{task}: {title}s", headings, groups)


def _metric(name: str, cells: Cells, are_differences: bool) -> Group:
    known = measure(name)
    scaled = {label: _scaled(cell, known) for label, cell in cells.items()}
    finite = [
        value
        for cell in scaled.values()
        for value in (cell.low, cell.value, cell.high)
        if drawable(value)
    ]
    low, high = span([0, *finite] if finite else [0, 1])
    unit = known.unit_of_differences if are_differences else known.unit
    rows: list[list[Content]] = []
    for label, cell in cells.items():
        value, bounds = shown(cell, known, is_difference=are_differences)
        reading = verdict_of(cell, known) if are_differences else number(cell.n)
        picture = strip(scaled[label], low, high)
        rows.append([label, value, bounds or cell.lacks, reading, picture])
    scale = f"picture from {number(low, digits=3)} to {number(high, digits=3)} {unit}"
    note = f"{known.direction}; {scale}" if known.direction else scale
    return Group(name, rows, note=note)


def _scaled(cell: Cell, known: Measure) -> Cell:
    """In the unit that is shown."""
    if known.unit != PERCENT or not math.isfinite(cell.value):
        return cell
    factor = known.factor
    return Cell(cell.value * factor, cell.low * factor, cell.high * factor, cell.n)
