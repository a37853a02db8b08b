"""The evaluations of a run that scored an artifact, as it is now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmpipe.errors import Say
from llmpipe.recipe.sections import is_local
from llmpipe.report.evaluation import GateLine, evaluated
from llmpipe.report.parts import read
from llmpipe.run.artifact import Artifact, artifacts
from llmpipe.run.manifest import Manifest
from llmpipe.run.results import Results


@dataclass(frozen=True)
class TaskRows:
    """Rows that a task reads."""

    path: str
    revision: str | None
    """Commit of a Hub data set."""
    files: list[tuple[str, str]]
    """(name, sha256)."""

    @property
    def is_of_hub(self) -> bool:
        return not is_local(self.path)


@dataclass(frozen=True)
class Measured:
    """An evaluation, and what it calls the artifact."""

    artifact: Artifact
    manifest: Manifest
    results: Results
    label: str
    as_adapter: str
    """The adapter that was measured and is merged in the artifact; empty otherwise."""
    rows: dict[str, list[TaskRows]]
    """By task, where llmpipe read them."""
    gates: tuple[GateLine, ...]
    seen: str
    """Items that were trained on, in words."""

    @property
    def name(self) -> str:
        return self.manifest.name


def measured(artifact: Artifact, manifest: Manifest, adapter: str, say: Say) -> list[Measured]:
    """Every finished evaluation of the run that scored an artifact, oldest first.

    `adapter`: fingerprint of what was merged in it, or nothing. One that measured the artifact as
    it was before is left out, which is said. Raises UserError (3) for results that are not as
    published.
    """
    evaluations = []
    for other in artifacts(artifact.run):
        if not other.finished:
            continue
        about = other.document()
        if about.get("kind") != "evaluation":
            continue
        record = other.manifest()
        labels = dict(_labels(record, manifest, adapter))
        if labels:
            evaluations += [_of(other, record, *one) for one in labels.items()]
        elif _names_it(record, manifest):
            say(f"{other.path}: measured {manifest.name} as it was before; not on the card")
    return evaluations


def _labels(record: Manifest, manifest: Manifest, adapter: str) -> Iterator[tuple[str, str]]:
    """What an evaluation calls the artifact, and the adapter by whose name it was measured."""
    for at, model in record.models.items():
        label = at.partition(".")[2]
        if model.get("fingerprint") == manifest.fingerprint:
            yield label, ""
        elif adapter and model.get("fingerprint") == adapter:
            yield label, str(model["artifact"])


def _names_it(record: Manifest, manifest: Manifest) -> bool:
    return any(
        model.get("artifact") == manifest.name and "checkpoint" not in model
        for model in record.models.values()
    )


def _of(artifact: Artifact, record: Manifest, label: str, as_adapter: str) -> Measured:
    path = artifact.published("results.json")
    assert path is not None, "an evaluation publishes its results"
    results = Results.from_file(path)
    page = evaluated(read(artifact))
    return Measured(
        artifact=artifact,
        manifest=record,
        results=results,
        label=label,
        as_adapter=as_adapter,
        rows=_rows(record, results),
        gates=page.gates,
        seen=page.seen,
    )


def _rows(record: Manifest, results: Results) -> dict[str, list[TaskRows]]:
    """What each task read; the recipe has tasks in the order of the results."""
    tasks: list[dict[str, Any]] = record.asked.recipe.get("tasks", [])
    rows: dict[str, list[TaskRows]] = {}
    for i, (name, task) in enumerate(zip(results.tasks, tasks, strict=False)):
        for j, source in enumerate(task.get("data") or []):
            path, revision = str(source["path"]), source.get("revision")
            commit = record.asked.content.get(f"{path}@{revision or ''}")
            files = record.asked.files(f"tasks.{i}.data.{j}")
            rows.setdefault(name, []).append(TaskRows(path, commit, files))
    return rows
