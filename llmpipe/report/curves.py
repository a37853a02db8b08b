"""What a .jsonl file of a run holds, and the series of its metrics: not trusted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from llmpipe.files import json_object
from llmpipe.report.text import is_number

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


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file; an empty one stands for a line that cannot be read.

    Links are not followed.
    """
    if not path.is_file() or path.is_symlink():
        return
    with path.open("rb") as file:
        for raw in file:
            yield json_object(raw) or {}
