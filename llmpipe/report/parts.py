"""What lies in a run directory, as the page takes it: not trusted, and any of it may be missing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmpipe.errors import UserError
from llmpipe.files import read_json
from llmpipe.report.charts import Point, drawable
from llmpipe.report.terminal import status_of
from llmpipe.report.text import is_number
from llmpipe.run.artifact import Artifact, artifacts

NO_SERIES = {"step", "epoch", "seconds"}  # numbers of metrics.jsonl that say where a line belongs


@dataclass
class Curves:
    """The series of a metrics.jsonl."""

    points: dict[str, list[Point]] = field(default_factory=dict)
    """(step, value) by name."""
    undrawn: int = 0
    """Values and lines that are not numbers."""


@dataclass(frozen=True)
class Part:
    """An artifact in whatever state."""

    name: str
    path: Path
    recipe: str
    stage: str
    status: str
    manifest: dict[str, Any]
    """Its manifest, or what is known before there is one."""
    curves: Curves

    @property
    def is_evaluation(self) -> bool:
        return self.stage == "eval"

    def known(self, *keys: str) -> Any:
        """The value at a path of the manifest; an empty dict where there is none."""
        return dig(self.manifest, *keys)

    def lines(self, file: str) -> Iterator[dict[str, Any]]:
        return lines_of(self.path / file)


@dataclass(frozen=True)
class Run:
    """A run to show."""

    name: str
    prefix: str
    """Keeps the ids of two runs on one page apart."""
    parts: list[Part]
    scale: int = 1
    """Of what is long one part in so many is shown."""

    @property
    def trained(self) -> list[Part]:
        return [part for part in self.parts if not part.is_evaluation]

    @property
    def evaluations(self) -> list[Part]:
        return [part for part in self.parts if part.is_evaluation]


def parts_of(run: Path) -> list[Part]:
    """Every artifact of a run. Raises UserError where there is none."""
    parts = [read(artifact) for artifact in artifacts(run)]
    if not parts:
        hint = "give the folder that `run:` of a recipe names"
        raise UserError(f"{run}: holds no artifacts", hint)
    return parts


def read(artifact: Artifact) -> Part:
    """Gather what there is; a damaged manifest is said, not raised."""
    recipe = _recipe_of(artifact.path / "recipe.yaml")
    stage = re.search(r"^stage: *(\S+)", recipe, re.MULTILINE)
    status, manifest = status_of(artifact)
    return Part(
        name=artifact.name,
        path=artifact.path,
        recipe=recipe,
        stage=stage[1] if stage else "?",
        status=status,
        manifest=artifact.document() if manifest else _begun(artifact.path),
        curves=_curves(artifact.path / "metrics.jsonl"),
    )


def _recipe_of(path: Path) -> str:
    if path.is_symlink():
        return "a link, not followed"
    return path.read_text(encoding="utf-8", errors="replace")


def _begun(folder: Path) -> dict[str, Any]:
    """What is known of an artifact before it has a manifest, in a manifest's words."""
    plan = read_json(folder / "plan.json")
    models = {
        at: {"reference": model["reference"], **model["identity"]}
        for at, model in dig(plan, "models").items()
    }
    data = read_json(folder / "prepared.json")
    return {"asked": dig(plan, "asked"), "models": models, "data": data}


def _curves(path: Path) -> Curves:
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
            try:
                line = json.loads(raw)
            except (ValueError, RecursionError):
                line = {}
            yield line if isinstance(line, dict) else {}


def dig(value: Any, *keys: str) -> Any:
    """The value at a path of a document; an empty dict where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return {} if value is None else value
