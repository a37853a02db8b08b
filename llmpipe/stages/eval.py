"""`llmpipe eval`: measure models on the same items, and say which differences are real.

Inputs: models (artifacts, folders, Hub ids, GGUF files) and tasks. Makes: an `evaluation`, results.json with an
interval to every number and every difference, and samples.jsonl with every prompt, answer and score. The story is
`train` (the worker's name for the main part of a stage): models one after the other, tasks within.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llmpipe.errors import NUMERIC, UserError, near
from llmpipe.files import digest, read_json, write_json
from llmpipe.recipe.sections import (
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
from llmpipe.run.artifact import MANIFEST, Artifact
from llmpipe.run.artifact import artifacts as artifacts_of
from llmpipe.run.job import Job
from llmpipe.run.manifest import Made
from llmpipe.run.reference import Model

ACCEPTS = ("model", "adapter", "reward-model")
MAKES = "evaluation"
PROGRESS = "samples.jsonl"
NEEDS = {
    "math_verify": "math_verify",
    "rouge": "rouge_score",
    "bleu": "sacrebleu",
    "chrf": "sacrebleu",
}
COMPARED = {
    "exact_match",
    "contains",
    "number",
    "math_verify",
    "rouge",
    "bleu",
    "chrf",
}  # with a reference

Items = Annotated[list[Rows], Field(min_length=1)]
Template = Literal["auto", "none"]


class Task(Section):
    name: Name | None = None
    """What the results call it; the kind of task unless set."""


class OnItems(Task):
    data: Items
    """The items: sources of rows as in `data.train` of a training recipe. A row that cannot be used stops the stage."""


class Perplexity(OnItems):
    task: Literal["perplexity"]
    """Negative log-likelihood per token: of texts with a sliding window, of conversations on the assistant's turns.
    Bits per byte compare models with different tokenizers."""
    window: Annotated[int, Field(ge=2)] = 1024
    """Most tokens that the model sees at once."""
    stride: Positive = 512
    """New tokens per window: smaller gives each more context and takes longer."""

    @model_validator(mode="after")
    def _fits(self) -> Perplexity:
        if self.stride >= self.window:
            raise ValueError(
                f"stride ({self.stride}) must be below window ({self.window}), or tokens go unscored"
            )
        return self


class Generate(OnItems):
    task: Literal["generate"]
    """Answers to prompts, compared with references. The reference is the last assistant turn of a row."""
    max_new_tokens: Positive = 128
    """Longest answer in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the likeliest token each time; above 0 answers are drawn, with the recipe's seed."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw from this many likeliest tokens; 0 is all of them."""
    template: Template = "auto"
    """`auto`: the model's own chat template, the one it was trained with; `none`: prompts as bare text."""

    score: Annotated[
        list[
            Literal[
                "exact_match",
                "contains",
                "regex",
                "number",
                "math_verify",
                "json",
                "rouge",
                "bleu",
                "chrf",
            ]
        ],
        Field(min_length=1),
    ]
    """exact_match, contains, number (the last one in the answer), math_verify: against the reference; regex: `pattern`
    in the answer, its group against the reference; json: parses; rouge, bleu, chrf: the libraries' scores."""
    pattern: str | None = None
    """What `regex` looks for; with a group, what it holds must equal the reference."""
    samples: Positive = 1
    """Answers per prompt, for pass@k."""
    pass_at: list[Positive] = [1]
    """The k of pass@k, the chance that one of k answers is right: unbiased (Chen 2021, eq. 1)."""

    @model_validator(mode="after")
    def _fits(self) -> Generate:
        if self.samples > 1 and not self.temperature:
            raise ValueError("samples above 1 needs a temperature: greedy answers are all the same")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(f"pattern: {error}") from None
        if max(self.pass_at) > self.samples:
            raise ValueError(f"pass_at {max(self.pass_at)} needs as many samples")
        if ("regex" in self.score) != (self.pattern is not None):
            raise ValueError("score: regex and pattern go together")
        return self


class Choice(OnItems):
    task: Literal["choice"]
    """Multiple choice by log-likelihood: accuracy by the sum, and by the sum per character (lm-eval's acc_norm)."""
    template: Template = "auto"
    """`auto`: the question as a user's turn, the choice as the answer; `none`: question, space, choice."""


class Preference(OnItems):
    task: Literal["preference"]
    """Pairs: how often the chosen answer is ranked first, by a reward model's score, or by a policy's summed and mean
    log-probability."""


class Harness(Task):
    task: Literal["harness"]
    """Tasks of EleutherAI's lm-evaluation-harness."""
    tasks: Annotated[list[str], Field(min_length=1)]
    """Their names."""
    folder: str | None = None
    """A folder with task files of your own."""
    fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question; the task's own number unless set."""
    limit: Positive | None = None
    """Take this many items of each task."""
    template: Template = "none"
    """`auto` is the harness's --apply_chat_template."""


Kind = Annotated[Perplexity | Generate | Choice | Preference | Harness, Field(discriminator="task")]


class Gate(Section):
    min: float | None = None
    """The number must not be lower."""
    max: float | None = None
    """The number must not be higher."""
    max_ratio_to_parent: Annotated[float, Field(gt=0)] | None = None
    """The number must not be higher than this many times that of the model's parent, also among `models`."""


class Machines(Machine):
    batch_size: Positive = 32
    """Prompts answered, or sequences scored, at once."""


class Schema(Recipe):
    stage: Literal["eval"] = "eval"
    """Evaluation."""
    models: Annotated[dict[Name, Reference], Field(min_length=1)]
    """What is measured: a name for the tables, and a Hub id, a folder, a GGUF file or an artifact."""
    tasks: Annotated[list[Kind], Field(min_length=1)]
    """What is measured on."""
    gate: dict[str, Gate] = cosmetic({})
    """Conditions on the last of `models`, by METRIC or TASK.METRIC; where one fails the stage ends with exit code 4."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the weights and the arithmetic; `auto` is bf16 where the hardware has it and fp32 elsewhere."""
    launch: Machines = cosmetic(default_factory=Machines)
    """The machine: never part of the result's identity."""

    @model_validator(mode="after")
    def _names(self) -> Schema:
        names = [name_of(task) for task in self.tasks]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two tasks are called '{twice}'; give one a name")
        for task in self.tasks:
            folder = getattr(task, "folder", None)
            if folder and not Path(folder).expanduser().is_dir():
                raise ValueError(f"folder: {folder}: no such folder")
        return self

    def references(self) -> dict[str, str]:
        return {f"models.{label}": reference for label, reference in self.models.items()}

    def rows(self) -> dict[str, Rows]:
        tasks = [(i, task.data) for i, task in enumerate(self.tasks) if isinstance(task, OnItems)]
        return {f"tasks.{i}.data.{j}": source for i, data in tasks for j, source in enumerate(data)}

    def files(self) -> dict[str, str]:
        tasks = enumerate(self.tasks)
        return {
            f"tasks.{i}.folder": t.folder for i, t in tasks if isinstance(t, Harness) and t.folder
        }


def name_of(task: Task) -> str:
    return task.name or task.task


class TaskItems(Record):
    """The items of a task, one a line of a file."""

    items: str
    n: int
    overlap: dict[str, int]
    """How many of them an artifact of the run was trained on, by its name."""


class PreparedItems(Record):
    """prepared.json of an evaluation."""

    folder: str
    """In the run's `.prepared/`."""
    tasks: dict[str, TaskItems]


PREPARED = PreparedItems


def prepare(job: Job) -> PreparedItems:
    """Rows -> items, and how many of them the models have seen in training."""
    from llmpipe.evaluation.items import items_of, seen_by

    recipe = job.recipe
    for task in recipe.tasks:
        packages = {NEEDS[name] for name in getattr(task, "score", ()) if name in NEEDS}
        packages |= {"lm_eval"} if isinstance(task, Harness) else set()
        for package in sorted(packages):
            if importlib.util.find_spec(package) is None:
                extra = "harness" if package == "lm_eval" else "eval"
                raise UserError(
                    f"tasks: {name_of(task)}: {package} is not installed",
                    f"pip install 'llmpipe[{extra}]'",
                )
    folder = job.prepared / f"eval-{job.plan.identity[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    artifacts = artifacts_of(job.artifact.run) + [
        Artifact(path.parent) for path in job.models.values()
    ]
    tasks = {}
    for i, task in enumerate(recipe.tasks):
        if not isinstance(task, OnItems):
            continue
        pinned = job.plan.content
        bare, compared = (
            getattr(task, "template", "auto") == "none",
            bool(COMPARED & set(getattr(task, "score", ()))),
        )
        items = items_of(task.data, task.task, bare=bare, compared=compared, pinned=pinned)
        lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        (folder / f"{i}.jsonl").write_text(lines, encoding="utf-8")
        overlap = seen_by(items, artifacts)
        note = ", ".join(
            f"{count:,} asked in training of {name}" for name, count in overlap.items() if count
        )
        job.say(f"{name_of(task)}: {len(items):,} items; {note or 'none asked in training'}")
        tasks[name_of(task)] = TaskItems(items=f"{i}.jsonl", n=len(items), overlap=overlap)
    return PreparedItems(folder=folder.name, tasks=tasks)


def train(job: Job, prepared: PreparedItems) -> Made:
    """Score every model on every task, then put intervals to it all."""
    from llmpipe import upstream
    from llmpipe.evaluation import tasks as scoring
    from llmpipe.evaluation.book import Book
    from llmpipe.evaluation.candidate import candidate, machine
    from llmpipe.evaluation.statistics import table
    from llmpipe.report.terminal import measurements

    upstream.silence()
    recipe, artifact, say = job.recipe, job.artifact, job.say
    book = Book(artifact.path / "samples.jsonl", machine(recipe))
    items = {}
    for name, task in prepared.tasks.items():
        text = (job.prepared / prepared.folder / task.items).read_text(encoding="utf-8")
        items[name] = [json.loads(line) for line in text.split("\n") if line]
    models = {}
    for label in recipe.models:
        at = f"models.{label}"
        with candidate(label, job.models[at], job.bases.get(at), recipe, say) as model:
            models[label] = model.describe() | {"parent": parent_of(label, job.plan.models)}
            for task in recipe.tasks:
                scoring.score(
                    model, task, name_of(task), items.get(name_of(task)), book, recipe, say
                )
    book.close([name_of(task) for task in recipe.tasks], list(models))
    results = {"models": models, "tasks": {}}
    for task in recipe.tasks:
        name = name_of(task)
        about: dict[str, Any] = {"task": task.task}
        if known := prepared.tasks.get(name):
            about |= {"n": known.n, "overlap": known.overlap}
        results["tasks"][name] = about | table(book.of(name), list(models), recipe.seed)
    write_json(artifact.path / "results.json", results)
    for line in measurements(results):
        say(line)
    return Made(final=summary(results))


def parent_of(label: str, models: dict[str, Model]) -> str | None:
    """Which of the models a model was made from, directly or by way of others."""
    start = models[f"models.{label}"]
    if start.kind != "artifact" or start.folder is None:
        return None
    known = {_key(model.identity): at for at, model in models.items() if at.startswith("models.")}
    run = start.folder.parent.parent
    manifest = read_json(start.folder.parent / MANIFEST) or {}
    while made_from := manifest.get("models", {}).get("model"):
        if at := known.get(_key(made_from)):
            return at.removeprefix("models.")
        manifest = read_json(run / str(made_from.get("artifact")) / MANIFEST) or {}
        if manifest.get("fingerprint") != made_from.get("fingerprint"):
            return None  # made anew since
    return None


def _key(identity: dict[str, Any]) -> str:
    """What two identities of one model share: whether an adapter was merged does not make it another model."""
    return digest(
        {key: value for key, value in identity.items() if key not in ("reference", "merged")}
    )


def summary(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{task.metric: {model: value}}."""
    return {
        f"{task}.{metric}": {label: cell["value"] for label, cell in cells.items()}
        for task, about in results["tasks"].items()
        for metric, cells in about["metrics"].items()
    }


def judge(recipe: Schema, artifact: Artifact, say: Any) -> None:
    """Hold the last model against the recipe's gate. Raises UserError (4) naming every condition that fails."""
    if not recipe.gate:
        return
    results = read_json(artifact.path / "results.json")
    label = list(recipe.models)[-1]
    parent = results["models"][label]["parent"]
    found = summary(results)
    failures = []
    for name, gate in recipe.gate.items():
        metrics = [metric for metric in found if metric == name or metric.partition(".")[2] == name]
        if len(metrics) != 1 or label not in found[metrics[0]]:
            known = ", ".join(metric for metric in found if label in found[metric])
            several = (
                "several tasks have it"
                if len(metrics) > 1
                else f"not measured{near(name, list(found))}"
            )
            raise UserError(f"gate: {name}: {several}", f"there are: {known}")
        value = found[metrics[0]][label]
        if gate.max_ratio_to_parent is not None and parent not in found[metrics[0]]:
            raise UserError(
                f"gate: {name}: the parent of {label} is not among models", "add it to `models:`"
            )
        reference = found[metrics[0]].get(parent, 0.0)
        limits = [
            (
                "at least",
                gate.min,
                gate.min is not None and not value >= gate.min,
            ),  # NaN passes nothing
            ("at most", gate.max, gate.max is not None and not value <= gate.max),
        ]
        if ratio := gate.max_ratio_to_parent:
            limits.append(
                (
                    f"at most {ratio:g} x {parent}'s",
                    ratio * reference,
                    not value <= ratio * reference,
                )
            )
        failures += [
            f"gate: {metrics[0]} of {label} is {value:.4g}, not {words} {limit:.4g}"
            for words, limit, failed in limits
            if failed
        ]
    if failures:
        raise UserError(
            "\n".join(failures), f"the measurements are kept: llmpipe show {artifact.path}", NUMERIC
        )
    say(f"gate: {label} passes {len(recipe.gate)} condition{'s' * (len(recipe.gate) > 1)}")
