"""results.json: what an evaluation found, every number with its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files.json import read_json, write_json
from llmpipe.typed import record

LEAST_ITEMS = 20
"""Items that an interval from a bootstrap takes. Of fewer it is too narrow, and of one it has no
width; shares of right answers have intervals of another kind, for any number."""


class Cell(NamedTuple):
    """A number, or a difference of two, with its 95 % interval."""

    value: float
    low: float
    """NaN, as `high`, where there is no interval."""
    high: float
    n: int
    """How many items it is over."""

    @property
    def has_interval(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def differs(self) -> bool:
        """Of a difference: whether it has an interval, which leaves zero out."""
        return self.has_interval and (self.low > 0 or self.high < 0)

    @property
    def lacks(self) -> str:
        """Why it has no interval."""
        if self.n < LEAST_ITEMS:
            return f"no interval: {self.n} items are too few, {LEAST_ITEMS} are needed"
        return "no interval"


Cells = dict[str, Cell]  # by model, or by the pair of models that is compared


class TaskResults(NamedTuple):
    """What was measured on one task."""

    task: str
    """Its kind."""
    metrics: dict[str, Cells]
    """{metric: {model: cell}}."""
    differences: dict[str, Cells]
    """{metric: {"b - a": cell}}, on the same items."""
    n: int | None = None
    """How many items it has, where llmpipe prepared them."""
    overlap: dict[str, int] | None = None
    """How many of them an artifact of the run was trained on, by its name."""

    @classmethod
    def from_json(cls, document: Any) -> TaskResults:
        """Raises ValueError where a document holds no results of a task."""
        values = record(_Task, document)
        return cls(
            values.task,
            _tables(values.metrics),
            _tables(values.differences),
            values.n,
            values.overlap,
        )

    def to_json(self) -> dict[str, Any]:
        values = {"task": self.task, "n": self.n, "overlap": self.overlap}
        tables = {"metrics": _objects(self.metrics), "differences": _objects(self.differences)}
        return {name: value for name, value in values.items() if value is not None} | tables


@dataclass(frozen=True)
class _Cell:
    """A `Cell` as JSON holds it, which has no NaN."""

    value: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class _Task:
    """A task's results as JSON holds them."""

    task: str
    metrics: dict[str, dict[str, _Cell]]
    differences: dict[str, dict[str, _Cell]]
    n: int | None = None
    overlap: dict[str, int] | None = None


def _tables(values: dict[str, dict[str, _Cell]]) -> dict[str, Cells]:
    return {
        metric: {label: _cell(cell) for label, cell in cells.items()}
        for metric, cells in values.items()
    }


def _cell(values: _Cell) -> Cell:
    numbers = [values.value, values.low, values.high]
    value, low, high = (math.nan if number is None else float(number) for number in numbers)
    return Cell(value, low, high, values.n)


def _objects(tables: dict[str, Cells]) -> dict[str, Any]:
    """Tables of cells with null for what is no finite number, which JSON has none of."""
    return {
        metric: {
            label: {name: v if math.isfinite(v) else None for name, v in cell._asdict().items()}
            for label, cell in cells.items()
        }
        for metric, cells in tables.items()
    }


@dataclass(frozen=True)
class MeasuredModel:
    """What results.json says of a model beside its numbers."""

    template: str | None
    """sha256 of its chat template."""
    stops_at: int | list[int] | None
    """The tokens that end an answer; a reward model gives none."""
    vocab_size: int
    parameters: int
    dtype: str
    parent: str | None
    """Which of the other models it was made from."""


class Results(NamedTuple):
    """The whole file."""

    models: dict[str, MeasuredModel]
    tasks: dict[str, TaskResults]

    @classmethod
    def from_file(cls, path: Path) -> Results:
        """The results in a file. Raises UserError (3) where it is absent, or holds none."""
        try:
            values = record(_Results, read_json(path))
            tasks = {name: TaskResults.from_json(task) for name, task in values.tasks.items()}
        except (ValueError, OverflowError) as error:
            hint = "restore it from a copy, or measure again with --fresh"
            raise UserError(f"{path}: holds no results: {error}", hint, INTEGRITY) from None
        return cls(values.models, tasks)

    def to_file(self, path: Path) -> None:
        tasks = {name: task.to_json() for name, task in self.tasks.items()}
        write_json(path, {"models": self.models, "tasks": tasks})

    def values(self) -> dict[str, dict[str, float]]:
        """{task.metric: {model: value}}, as the manifest has them."""
        return {
            f"{name}.{metric}": {label: cell.value for label, cell in cells.items()}
            for name, task in self.tasks.items()
            for metric, cells in task.metrics.items()
        }


@dataclass(frozen=True)
class _Results:
    """`Results` as JSON holds them."""

    models: dict[str, MeasuredModel]
    tasks: dict[str, Any]
