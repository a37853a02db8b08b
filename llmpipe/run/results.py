"""results.json: what an evaluation found, every number with its interval."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from llmpipe.files import read_json, write_json

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
    def from_json(cls, values: dict[str, Any]) -> TaskResults:
        return cls(
            task=values["task"],
            metrics=_tables(values["metrics"]),
            differences=_tables(values["differences"]),
            n=values.get("n"),
            overlap=values.get("overlap"),
        )

    def to_json(self) -> dict[str, Any]:
        values = {"task": self.task, "n": self.n, "overlap": self.overlap}
        tables = {"metrics": _objects(self.metrics), "differences": _objects(self.differences)}
        return {name: value for name, value in values.items() if value is not None} | tables


def _tables(values: dict[str, Any]) -> dict[str, Cells]:
    return {
        metric: {label: _cell(cell) for label, cell in cells.items()}
        for metric, cells in values.items()
    }


def _cell(values: dict[str, Any]) -> Cell:
    numbers = {name: math.nan if value is None else value for name, value in values.items()}
    return Cell(numbers["value"], numbers["low"], numbers["high"], values["n"])


def _objects(tables: dict[str, Cells]) -> dict[str, Any]:
    """Tables of cells with null for what is no finite number, which JSON has none of."""
    return {
        metric: {
            label: {name: v if math.isfinite(v) else None for name, v in cell._asdict().items()}
            for label, cell in cells.items()
        }
        for metric, cells in tables.items()
    }


class MeasuredModel(NamedTuple):
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
    def from_file(cls, path: Path) -> Results | None:
        """The results in a file, or None when the file is absent or not whole."""
        values = read_json(path)
        if values is None:
            return None
        models = {label: MeasuredModel(**model) for label, model in values["models"].items()}
        tasks = {name: TaskResults.from_json(task) for name, task in values["tasks"].items()}
        return cls(models, tasks)

    def to_file(self, path: Path) -> None:
        models = {label: model._asdict() for label, model in self.models.items()}
        tasks = {name: task.to_json() for name, task in self.tasks.items()}
        write_json(path, {"models": models, "tasks": tasks})

    def values(self) -> dict[str, dict[str, float]]:
        """{task.metric: {model: value}}, as the manifest has them."""
        return {
            f"{name}.{metric}": {label: cell.value for label, cell in cells.items()}
            for name, task in self.tasks.items()
            for metric, cells in task.metrics.items()
        }
