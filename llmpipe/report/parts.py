"""What lies in a run directory, as the page takes it: not trusted, and any of it may be missing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpipe.errors import UserError
from llmpipe.files.json import read_json
from llmpipe.report.curves import Curves, curves_of, lines_of
from llmpipe.report.terminal import status_of
from llmpipe.report.text import text_of
from llmpipe.run.artifact import PLAN, Artifact, artifacts
from llmpipe.run.manifest import Asked, DataFacts
from llmpipe.run.outcome import Outcome
from llmpipe.secrets import redacted
from llmpipe.typed import record

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


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
    outcome: Outcome | None
    """How the last attempt ended that did not finish it."""

    @property
    def is_evaluation(self) -> bool:
        return self.stage == "eval"

    @property
    def is_export(self) -> bool:
        return self.stage == "export"

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
        others = (part for part in self.parts if not part.is_evaluation)
        return [part for part in others if not part.is_export]

    @property
    def evaluations(self) -> list[Part]:
        return [part for part in self.parts if part.is_evaluation]


def parts_of(run: Path) -> list[Part]:
    """Every artifact of a run, or the one that is named. Raises UserError where there is none."""
    named = [Artifact(run)] if is_one(run) else artifacts(run)
    parts = [read(artifact) for artifact in named]
    if not parts:
        hint = "give the folder that `run:` of a recipe names"
        raise UserError(f"{run}: holds no artifacts", hint)
    return parts


def is_one(path: Path) -> bool:
    """Whether a folder is an artifact, and not a run of some."""
    return os.path.exists(path / "recipe.yaml")


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
        curves=curves_of(artifact.path / "metrics.jsonl"),
        outcome=None if artifact.finished else Outcome.read(artifact),
    )


def _recipe_of(path: Path) -> str:
    if path.is_symlink():
        return "a link, not followed"
    if not path.is_file():
        return "no file, not read"
    return redacted(path.read_text(encoding="utf-8", errors="replace"))


def _begun(folder: Path) -> dict[str, Any]:
    """What is known of an artifact before it has a manifest, in a manifest's words."""
    plan = _if_it_is(_Begun, read_json(folder / PLAN))
    models = {
        at: {"reference": text_of(dig(model, "reference")), **dig(model, "identity")}
        for at, model in dig(plan, "models").items()
        if isinstance(dig(model, "identity"), dict)
    }
    data = _if_it_is(DataFacts, read_json(folder / "prepared.json"))
    return {"asked": dig(plan, "asked"), "models": models, "data": data}


@dataclass(frozen=True)
class _Begun:
    """What the page shows of plan.json."""

    asked: Asked
    models: dict[str, dict[str, Any]]


def _if_it_is(kind: type[DataclassInstance], document: Any) -> dict[str, Any]:
    """A document, where it holds the fields of a record in their types; else nothing."""
    try:
        record(kind, document)
    except ValueError:
        return {}
    return dict(document)


def dig(value: Any, *keys: str) -> Any:
    """The value at a path of a document; an empty dict where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return {} if value is None else value
