"""samples.jsonl of an evaluation: what is scored is kept line by line and never scored again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files import to_write
from llmpipe.record import Record

Score = float | list[float]  # a value, or [numerator, denominator] of a ratio of sums

Key = tuple[str, str, int | str]  # task, model, item


@dataclass(frozen=True)
class Scored:
    """What a task says of one item."""

    shown: dict[str, Any]
    """What a person reads of it: the prompt, the answers, the reference."""
    scores: Mapping[str, Score]
    """By metric."""
    corpus: Sequence[str] | None = None
    """Metrics over all answers at once, which no item has alone."""


class Reported(NamedTuple):
    """A library's own number."""

    value: float
    standard_error: float | None
    n: int


@dataclass(frozen=True)
class Line:
    """What one model got for one item of one task, or a library's numbers for the whole task."""

    task: str
    model: str
    item: int | str
    """Its number; the harness names items."""
    at: str | None = None
    """File and row that the item came from."""
    shown: dict[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Score] | None = None
    corpus: Sequence[str] | None = None
    reported: dict[str, Reported] | None = None
    """Of a line without scores: the library's numbers, by metric."""

    @property
    def key(self) -> Key:
        return self.task, self.model, self.item

    @property
    def order(self) -> tuple[int, str]:
        """Sorts the items of a task: by number, the harness's by name."""
        return (self.item, "") if isinstance(self.item, int) else (0, self.item)

    def has(self, metric: str) -> bool:
        """Whether the line counts for a metric."""
        return metric in (self.scores or ()) or metric in (self.corpus or ())

    @classmethod
    def parse(cls, text: str | bytes) -> Line:
        values = json.loads(text)
        if "reported" in values:
            numbers = {name: Reported(*number) for name, number in values["reported"].items()}
            values["reported"] = numbers
        names = ("task", "model", "item", "at", "scores", "corpus", "reported")
        fields = {name: values.pop(name) for name in names if name in values}
        return cls(**fields, shown=values)

    def text(self) -> str:
        """The line as it stands in the file."""
        place = {"task": self.task, "model": self.model, "item": self.item, "at": self.at}
        counts = {"scores": self.scores, "corpus": self.corpus, "reported": self.reported}
        values = _known(place) | self.shown | _known(counts)
        return json.dumps(values, ensure_ascii=False) + "\n"


def _known(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


class Settings(Record):
    """settings.json: what an evaluation's numbers depend on beside the recipe.

    In their last digits, and by the batch in what is drawn.
    """

    batch_size: int
    precision: str
    device: str
    scores: int = 1
    """What scores mean: see `llmpipe.scores.VERSION`."""


class Book:
    """samples.jsonl: a line per item and model, appended batch by batch.

    A line that a kill cut off is dropped.
    """

    def __init__(self, path: Path, settings: Settings):
        """Raises UserError (3) where the file was begun with other settings."""
        self.path = path
        self.lines: dict[Key, Line] = {}
        _keep_settings(path, settings)
        if path.exists():
            self._read()

    def _read(self) -> None:
        complete = 0  # bytes
        with self.path.open("rb") as file:
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                line = Line.parse(raw)
                self.lines[line.key] = line
                complete += len(raw)
        with to_write(self.path, "ab") as file:
            file.truncate(complete)

    def add(self, lines: list[Line]) -> None:
        text = "".join(line.text() for line in lines)
        with to_write(self.path, "a") as file:
            file.write(text)
        self.lines |= {line.key: line for line in lines}

    def of(self, task: str) -> list[Line]:
        return [line for line in self.lines.values() if line.task == task]

    def holds(self, task: str, model: str, items: Iterable[int | str]) -> bool:
        """Whether every one of some items is scored."""
        return all((task, model, item) in self.lines for item in items)

    def close(self, tasks: list[str], models: list[str]) -> None:
        """Write the lines in a fixed order, each item of a model once."""

        def order(line: Line) -> tuple[int, int, tuple[int, str]]:
            return tasks.index(line.task), models.index(line.model), line.order

        text = "".join(line.text() for line in sorted(self.lines.values(), key=order))
        new = self.path.with_name(f".{self.path.name}")
        with to_write(new, "w") as file:
            file.write(text)
        new.rename(self.path)


def _keep_settings(samples: Path, settings: Settings) -> None:
    """One evaluation is scored with one setting; the lines of another one are not gone on from."""
    path = samples.with_name("settings.json")
    begun = Settings.from_file(path) if samples.exists() else None
    if begun and begun != settings:
        now = settings.model_dump()
        changed = ", ".join(
            f"{name} {value} there, {now[name]} now"
            for name, value in begun.model_dump().items()
            if value != now[name]
        )
        problem = f"{samples}: was begun with other settings: {changed}"
        raise UserError(problem, "--fresh starts anew", INTEGRITY)
    settings.to_file(path)
