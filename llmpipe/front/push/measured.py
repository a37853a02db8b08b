"""The evaluations of a run that scored an artifact, as it is now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from llmpipe.errors import INTEGRITY, Say, UserError
from llmpipe.front.push.ancestry import Ancestry
from llmpipe.recipe.names import ARTIFACT
from llmpipe.recipe.sections import is_local
from llmpipe.report.evaluation import GateLine, evaluated
from llmpipe.report.parts import read
from llmpipe.run.artifact import MANIFEST, Artifact, artifacts
from llmpipe.run.manifest import Manifest
from llmpipe.run.results import Results, TaskResults
from llmpipe.typed import record


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
        return not is_local(self.path) and not self.path.startswith(ARTIFACT)


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
    """On the last model of the evaluation."""

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
        if not other.finished or other.document().get("kind") != "evaluation":
            continue
        about = other.manifest()
        labels = dict(_labels(about, manifest, adapter))
        if labels:
            evaluations += [_of(other, about, *one) for one in labels.items()]
        elif _names_it(about, manifest):
            say(f"{other.path}: measured {manifest.name} as it was before; not on the card")
    return evaluations


def _labels(about: Manifest, manifest: Manifest, adapter: str) -> Iterator[tuple[str, str]]:
    """What an evaluation calls the artifact, and the adapter by whose name it was measured."""
    for at, model in about.models.items():
        role, _, label = at.partition(".")
        if role != "models":
            continue
        if model.get("fingerprint") == manifest.fingerprint:
            yield label, ""
        elif adapter and model.get("fingerprint") == adapter:
            yield label, str(model["artifact"])


def _names_it(about: Manifest, manifest: Manifest) -> bool:
    return any(
        model.get("artifact") == manifest.name and "checkpoint" not in model
        for model in about.models.values()
    )


def asked_in_training(task: TaskResults, ancestry: Ancestry) -> int:
    """How many items of a task were asked in training of the artifact, or of what it was made
    from."""
    names = {one.name for one in ancestry.made}
    overlap = task.overlap or {}
    return max((count for name, count in overlap.items() if name in names), default=0)


def _of(artifact: Artifact, about: Manifest, label: str, as_adapter: str) -> Measured:
    path = artifact.published("results.json")
    results = Results.from_file(path) if path else None
    if results is None or label not in results.models:
        problem = f"{artifact.path}: has no results of {label}, which it says that it measured"
        raise UserError(problem, "measure again with --fresh", INTEGRITY)
    return Measured(
        artifact=artifact,
        manifest=about,
        results=results,
        label=label,
        as_adapter=as_adapter,
        rows=_rows(artifact, about, results),
        gates=evaluated(read(artifact)).gates,
    )


@dataclass(frozen=True)
class _Source:
    """What is read of a task's rows in a recipe."""

    path: str
    revision: str | None = None


@dataclass(frozen=True)
class _Task:
    data: list[_Source] = field(default_factory=list)


@dataclass(frozen=True)
class _Recipe:
    """What is read of the recipe of an evaluation."""

    tasks: list[_Task]


def _rows(artifact: Artifact, about: Manifest, results: Results) -> dict[str, list[TaskRows]]:
    """What each task read; the recipe has tasks in the order of the results."""
    try:
        tasks = record(_Recipe, about.asked.recipe).tasks
    except ValueError as error:
        problem = f"{artifact.path / MANIFEST}: asked.recipe.{error}"
        raise UserError(problem, "measure again with --fresh", INTEGRITY) from None
    rows: dict[str, list[TaskRows]] = {}
    for i, (name, task) in enumerate(zip(results.tasks, tasks, strict=False)):
        for j, source in enumerate(task.data):
            commit = about.asked.content.get(f"{source.path}@{source.revision or ''}")
            files = about.asked.files(f"tasks.{i}.data.{j}")
            rows.setdefault(name, []).append(TaskRows(source.path, commit, files))
    return rows
