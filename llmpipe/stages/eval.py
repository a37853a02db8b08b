"""`llmpipe eval`: measure models on the same items, and say which differences are real.

Inputs: models (artifacts, folders, Hub ids, GGUF files) and tasks. Makes: an `evaluation`,
results.json with an interval to every number and every difference, and samples.jsonl with every
prompt, answer and score. The story is `train` (the worker's name for the main part of a stage):
models one after the other, tasks within.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from llmpipe import noise, screen
from llmpipe.data.prepared import RECORD, PreparedFolder
from llmpipe.errors import INTEGRITY, NUMERIC, Mistake, Say, UserError, near
from llmpipe.evaluation.task import Item, OnItems
from llmpipe.evaluation.tasks import AnyTask
from llmpipe.files.json import digest
from llmpipe.files.writing import publishing
from llmpipe.recipe.sections import (
    Crowd,
    Machine,
    Name,
    Positive,
    Recipe,
    Reference,
    Rows,
    Section,
    cosmetic,
)
from llmpipe.record import Record
from llmpipe.run.artifact import Artifact, artifact_of, artifacts, manifest_beside
from llmpipe.run.context import check_answers
from llmpipe.run.gate import judged
from llmpipe.run.job import Job
from llmpipe.run.made import Made
from llmpipe.run.outlook import Outlook
from llmpipe.run.reference import Model, Use
from llmpipe.run.results import Results, TaskResults
from llmpipe.sums import Kept, check, is_sealed, seal

if TYPE_CHECKING:
    from llmpipe.evaluation.book import Book

ACCEPTS = ("model", "adapter", "reward-model")
MAKES = "evaluation"
PROGRESS = "samples.jsonl"


class Gate(Section):
    min: float | None = None
    """The number must not be lower."""
    max: float | None = None
    """The number must not be higher."""
    max_ratio_to_parent: Annotated[float, Field(gt=0)] | None = None
    """The number must not be higher than this many times that of the model's parent, also among
    `models`."""

    @model_validator(mode="after")
    def _asks(self) -> Gate:
        bounds = (self.min, self.max, self.max_ratio_to_parent)
        given = [bound for bound in bounds if bound is not None]
        if not given:
            raise ValueError("give min, max or max_ratio_to_parent: any number would pass")
        if not all(map(math.isfinite, given)):
            raise ValueError("a bound is a finite number")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"no number is at least {self.min:g} and at most {self.max:g}")
        return self


class Machines(Machine):
    processes: Crowd | Literal["auto"] = "auto"
    """Processes that measure, each its share of the items, with the same numbers as one alone;
    `auto` is one per GPU, and one on a CPU. With `1` a model that no GPU holds alone lies on all of
    them, layer by layer."""
    batch_size: Positive = 32
    """Prompts answered, or sequences scored, at once."""


class Schema(Recipe):
    stage: Literal["eval"] = "eval"
    """Evaluation."""
    models: Annotated[dict[Name, Reference], Field(min_length=1)]
    """What is measured: a name for the tables, and a Hub id, a folder, a GGUF file or an
    artifact."""
    tasks: Annotated[list[AnyTask], Field(min_length=1)]
    """What is measured on."""
    gate: dict[str, Gate] = cosmetic({})
    """Conditions on the last of `models`, by METRIC or TASK.METRIC; where one fails the stage ends
    with exit code 4."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the weights and the arithmetic; `auto` is bf16 where the hardware has it and fp32
    elsewhere."""
    launch: Machines = cosmetic(default_factory=Machines)
    """The machine: never part of the result's identity."""

    @model_validator(mode="after")
    def _names(self) -> Schema:
        labels = [task.label for task in self.tasks]
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            raise ValueError(f"two tasks are called '{twice}'; give one a name")
        return self

    def references(self) -> dict[str, str]:
        return {f"models.{label}": reference for label, reference in self.models.items()}

    def rows(self) -> dict[str, Rows]:
        return {
            f"tasks.{i}.data.{j}": source
            for i, task in enumerate(self.tasks)
            if isinstance(task, OnItems)
            for j, source in enumerate(task.data)
        }

    def packages(self) -> list[tuple[str, str]]:
        return [
            (f"tasks.{i}", package)
            for i, task in enumerate(self.tasks)
            for package in sorted(task.packages)
        ]

    def files(self) -> dict[str, str]:
        return {
            f"tasks.{i}.{field}": path
            for i, task in enumerate(self.tasks)
            for field, path in task.files().items()
        }


class TaskItems(Record):
    """The items of a task, one a line of a file."""

    items: str
    """The file's name."""
    n: int
    overlap: dict[str, int]
    """How many of them an artifact of the run was trained on, by its name."""


class PreparedItems(PreparedFolder):
    """prepared.json of an evaluation."""

    tasks: dict[str, TaskItems]


PREPARED = PreparedItems


# --- what can be known ahead ----------------------------------------------------------------------


def shapes(recipe: Schema) -> dict[str, tuple[type, ...]]:
    return {
        f"tasks.{i}.data.{j}": task.shapes
        for i, task in enumerate(recipe.tasks)
        if isinstance(task, OnItems)
        for j in range(len(task.data))
    }


def foresee(recipe: Schema, outlook: Outlook) -> Iterator[Mistake]:
    """What is wrong with the gate: a number that no task measures, or no parent to compare with;
    and which answers leave no room for a prompt."""
    yield from _without_room(recipe, outlook)
    last, reference = list(recipe.models.items())[-1]
    run = artifact_of(recipe).run
    try:
        kind = outlook.look(reference, Use(f"models.{last}", ACCEPTS, glance=True), run)
    except UserError:
        return  # which is said of the model itself
    for name, gate in recipe.gate.items():
        field = f"gate.{name}"
        if problem := _unmeasured(name, recipe.tasks, kind):
            yield Mistake(field, problem)
        if gate.max_ratio_to_parent and _has_no_parent(recipe, outlook):
            problem = UserError(f"the parent of {last} is not among models", "add it to `models:`")
            yield Mistake(f"{field}.max_ratio_to_parent", problem)


def _has_no_parent(recipe: Schema, outlook: Outlook) -> bool:
    """Whether it is certain that the last model was made from none of the others."""
    run = artifact_of(recipe).run
    *others, last = recipe.models.values()
    if not outlook.named(last, run) or "@" in last:
        return True  # nothing tells what it was made from
    meant = {outlook.meaning(reference, run) for reference in others}
    try:
        starts = set(outlook.starts(last, run))
    except LookupError:
        return False
    same = starts & meant or (any(map(os.path.isabs, starts)) and any(map(os.path.isabs, meant)))
    return not same


def _unmeasured(name: str, tasks: list[AnyTask], kind: str | None) -> UserError | None:
    """Why no task gives the one number that a gate names, as far as can be told.

    `kind` of the model that is measured; None where that cannot be told.
    """
    measured = {task.label: task.metrics(kind) for task in tasks}
    known = [f"{label}.{metric}" for label, names in measured.items() for metric in names or ()]
    named = [metric for metric in known if name in (metric, metric.partition(".")[2])]
    if len(named) > 1 and kind:
        return UserError("several tasks have it", f"say of which one: {', '.join(named)}")
    unknown = [label for label, names in measured.items() if names is None]
    if named or (unknown and name.partition(".")[0] not in measured.keys() - set(unknown)):
        return None
    shown = ", ".join(known) or "nothing of a model of this kind"
    return UserError(f"no task measures it{near(name, known)}", f"measured are: {shown}")


def _answers(recipe: Schema) -> dict[str, int]:
    """Tokens of the longest answers, by the field that limits them."""
    return {
        f"tasks.{i}.max_new_tokens": task.max_new_tokens
        for i, task in enumerate(recipe.tasks)
        if hasattr(task, "max_new_tokens")
    }


def _without_room(recipe: Schema, outlook: Outlook) -> Iterator[Mistake]:
    """The answers that leave a model no room for a prompt."""
    run = artifact_of(recipe).run
    roots = {field: outlook.root(name, run) for field, name in recipe.references().items()}
    for field, tokens in _answers(recipe).items():
        try:
            check_answers({field: tokens}, {name: root for name, root in roots.items() if root})
        except UserError as error:
            if error.code != INTEGRITY:  # of a damaged model, which is said of the model itself
                yield Mistake(field, error)


# --- prepare --------------------------------------------------------------------------------------


def prepare(job: Job[Schema]) -> PreparedItems:
    """Rows -> items, and how many of them the models have seen in training."""
    from llmpipe.evaluation.items import items_of, seen_by

    recipe = job.recipe
    check_answers(_answers(recipe), job.models | job.bases)
    folder = job.prepared / f"eval-{job.plan.identity[:16]}"
    if is_sealed(folder):
        check(Kept(folder))
    measured = [Artifact(path.parent) for path in job.models.values()]
    trained = [*artifacts(job.artifact.run), *measured]
    tasks = {}
    with publishing(folder) as staging:
        for i, task in enumerate(recipe.tasks):
            if not isinstance(task, OnItems):
                continue
            items = items_of(task, job.plan.content, job.say)
            path = staging / f"{i}.jsonl"
            task.write(items, path)
            overlap = seen_by(items, trained)
            notes = [f"{n:,} asked in training of {name}" for name, n in overlap.items() if n]
            note = ", ".join(notes) or "none asked in training"
            job.say(f"{task.label}: {len(items):,} items; {note}")
            tasks[task.label] = TaskItems(items=path.name, n=len(items), overlap=overlap)
        PreparedItems(tasks=tasks).to_file(staging / RECORD)
        seal(staging, folder.name)
    return PreparedItems.of_folder(folder)


# --- measure --------------------------------------------------------------------------------------


def train(job: Job[Schema], prepared: PreparedItems) -> Made:
    """Score every model on every task, then put intervals to it all."""
    from llmpipe.evaluation.book import Book
    from llmpipe.evaluation.candidate import candidate, settings_of
    from llmpipe.models.device import keep_imports, take_device
    from llmpipe.parallel.world import World
    from llmpipe.report.terminal import measurements

    noise.silence()
    keep_imports()
    recipe, artifact, say = job.recipe, job.artifact, job.say
    take_device()
    settings = settings_of(recipe.precision, recipe.launch.batch_size, bool(job.bases))
    world = World.of(settings.device)
    book = Book(artifact.path / "samples.jsonl", settings, job.plan.identity, say, world)
    items = items_by_task(job, prepared)
    models = {}
    for label in recipe.models:
        at = f"models.{label}"
        with world.as_one():
            if world.is_first:  # on another machine a copy may have times of its own
                job.plan.models[at].refuse_changed()  # it may be hours ago that it was verified
        folders = (job.models[at], job.bases.get(at))
        with candidate(label, *folders, settings, world, say) as model:
            models[label] = model.describe(parent_of(label, job.plan.models))
            for task in recipe.tasks:
                if model.ranks and not task.for_reward_models:
                    say(f"{label} on {task.label}: a reward model has no part in {task.task}")
                    continue
                task.measure(model, items.get(task.label, []), book, recipe.seed, say)
    if not world.is_first:
        return Made(final={})
    book.close([task.label for task in recipe.tasks], list(models))
    with screen.doing("putting intervals to the numbers"):
        tasks = results_by_task(recipe, prepared, book)
    results = Results(models, tasks)
    results.to_file(artifact.path / "results.json")
    for line in measurements(results):
        say(line)
    return Made(final=results.values())


def items_by_task(job: Job[Schema], prepared: PreparedItems) -> dict[str, list[Item]]:
    """What `prepare` wrote; the harness has its own items."""
    folder = prepared.folder(job.prepared)
    return {
        task.label: task.read(folder / prepared.tasks[task.label].items)
        for task in job.recipe.tasks
        if isinstance(task, OnItems)
    }


def results_by_task(recipe: Schema, prepared: PreparedItems, book: Book) -> dict[str, TaskResults]:
    """The numbers of everything that was scored."""
    from llmpipe.evaluation.statistics import measured

    results = {}
    for task in recipe.tasks:
        numbers = measured(book.of(task.label), list(recipe.models), recipe.seed)
        items = prepared.tasks.get(task.label)
        results[task.label] = TaskResults(
            task=task.task,
            metrics=numbers.metrics,
            differences=numbers.differences,
            n=items.n if items else None,
            overlap=items.overlap if items else None,
        )
    return results


def parent_of(label: str, models: dict[str, Model]) -> str | None:
    """Which of the models a model was made from, directly or by way of others."""
    model = models[f"models.{label}"]
    if model.kind != "artifact" or model.folder is None:
        return None
    labels = {_key(model.identity): at for at, model in models.items() if at.startswith("models.")}
    artifact = model.folder.parent
    manifest = manifest_beside(artifact / "model")
    while manifest and (start := manifest.models.get("model")):
        if at := labels.get(_key(start)):
            return at.removeprefix("models.")
        manifest = manifest_beside(artifact.parent / str(start.get("artifact")) / "model")
        if manifest and manifest.fingerprint != start.get("fingerprint"):
            return None  # made anew since
    return None


def _key(identity: dict[str, Any]) -> str:
    """What two identities of one model share; whether an adapter was merged does not count."""
    not_the_model = ("reference", "merged")
    return digest({name: value for name, value in identity.items() if name not in not_the_model})


# --- judge ----------------------------------------------------------------------------------------


def judge(recipe: Schema, artifact: Artifact, say: Say) -> None:
    """Hold the last model against the recipe's gate.

    Raises UserError (4) naming every condition that fails.
    """
    if not recipe.gate:
        return
    measured = artifact.published("results.json")
    assert measured is not None  # the artifact is finished
    results = Results.from_file(measured)
    label = list(recipe.models)[-1]
    failures = []
    for name, gate in recipe.gate.items():
        number = judged(name, gate, label, results)
        shown = f"gate: {number.metric} of {label} is {number.value:.4g}"
        failures += [f"{shown}, not {condition}" for condition in number.failed]
    if failures:
        hint = f"the measurements are kept: llmpipe show {artifact.path}"
        raise UserError("\n".join(failures), hint, NUMERIC)
    say(f"gate: {label} passes {len(recipe.gate)} condition{'s' * (len(recipe.gate) > 1)}")
