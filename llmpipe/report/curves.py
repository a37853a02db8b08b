"""What a .jsonl file of a run holds, and the series of its metrics: not trusted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from llmpipe.files.json import json_object
from llmpipe.report.text import is_number, number

Point = tuple[float, float]

NO_SERIES = {"step", "epoch", "seconds"}  # numbers of metrics.jsonl that say where a line belongs


def drawable(value: Any) -> TypeGuard[int | float]:
    """Whether a value can be drawn: no boolean, NaN or infinity."""
    return is_number(value) and abs(value) < 1e100


@dataclass
class Curves:
    """The series of a metrics.jsonl."""

    points: dict[str, list[Point]] = field(default_factory=dict)
    """(step, value) by name."""
    undrawn: int = 0
    """Values and lines that are not numbers."""


def curves_of(path: Path) -> Curves:
    curves = Curves()
    for line in lines_of(path):
        if not line:
            curves.undrawn += 1
        step = line.get("step")
        for name, value in line.items():
            if name in NO_SERIES or not is_number(value):
                continue
            if drawable(value) and drawable(step):
                curves.points.setdefault(name, []).append((step, value))
            else:
                curves.undrawn += 1
    return curves


WORSE = 1.02  # than the lowest: a loss that rose again


@dataclass(frozen=True)
class Rise:
    """A held-out loss that was lower before."""

    lowest: Point
    last: Point

    def __str__(self) -> str:
        step, loss = self.lowest
        at = f"at step {number(step)}" if step else "before the training"
        return (
            f"held-out loss was lowest {at}, {number(loss, digits=3)}, and is "
            f"{number(self.last[1], digits=3)} at step {number(self.last[0])}"
        )


def rise_of(held_out: list[Point], published: object) -> Rise | None:
    """By how much the held-out loss of the `published` step is above the lowest one."""
    if len(held_out) < 2:
        return None
    last = next((point for point in held_out if point[0] == published), held_out[-1])
    lowest = min(held_out, key=lambda point: point[1])
    if lowest[1] < 0 or last[1] <= WORSE * lowest[1]:
        return None
    return Rise(lowest, last)


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file; an empty one stands for a line that cannot be read.

    Links are not followed.
    """
    if not path.is_file() or path.is_symlink():
        return
    with path.open("rb") as file:
        for raw in file:
            yield json_object(raw) or {}
