"""The formats of an export: who read each of them back, and how far it is from the model."""

from __future__ import annotations

from dataclasses import dataclass

from llmpipe.errors import UserError
from llmpipe.report.parts import Part, Run
from llmpipe.report.pieces import Fact
from llmpipe.run.exports import read_exports


@dataclass(frozen=True)
class Exported:
    """An export."""

    name: str
    formats: tuple[Fact, ...] = ()
    problem: str = ""
    """Why it shows none."""


def exported(run: Run) -> list[Exported]:
    """The exports of a run."""
    return [_of(part) for part in run.parts if part.is_export]


def _of(part: Part) -> Exported:
    try:
        exports = read_exports(part.path)
    except UserError as error:
        return Exported(part.name, problem=error.message.removeprefix(f"{part.path}/"))
    facts = (Fact(one.format, "; ".join([one.told, *one.remarks])) for one in exports)
    return Exported(part.name, tuple(facts))
