"""The records that the page shows, section by section, gathered from the parts of a run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmpipe.errors import UserError
from llmpipe.files import flat, table_of
from llmpipe.report import charts
from llmpipe.report.charts import Lineage, Plot, Series, Source, Strip, drawable, plot, span
from llmpipe.report.parts import Part, Run, dig
from llmpipe.report.terminal import duration_of, size_of
from llmpipe.report.text import Clipped, clip, number, plain, text_of
from llmpipe.run.results import Cells, Results, TaskResults

POINTS = 400  # of a curve at most
ITEMS = 24  # of a list
CHARACTERS = 2000  # of a text

# Series of metrics.jsonl in the order of the page, with title and unit; others follow under their
# own names.
KNOWN = {
    "loss": ("loss", "nats per token"),
    "learning_rate": ("learning rate", ""),
    "grad_norm": ("gradient norm", ""),
    "val/grad_norm": ("gradient norm of the critic", ""),
    "tokens_per_second": ("speed", "tokens/s"),
    "memory_gb": ("memory", "GB"),
}
UNITLESS_LOSS = {"reward", "dpo", "ppo"}  # stages
COUNTS = {
    "read": "read",
    "kept": "kept",
    "rejected": "rejected",
    "truncated": "truncated",
    "split": "split",
    "duplicates": "duplicate",
    "unseen": "unseen",
    "train": "to train on",
    "eval": "held out",
}
ORIGIN = (
    "fingerprint",
    "identity",
    "finished",
    "seed",
    "llmpipe",
    "git",
    "versions",
    "machine",
    "hardware",
    "environment",
    "tokenizer",
    "verified",
)


@dataclass(frozen=True)
class Fact:
    name: str
    value: str


def known_facts(values: dict[str, str | None]) -> list[Fact]:
    """What is not known is left out."""
    return [Fact(name, value) for name, value in values.items() if value is not None]


@dataclass(frozen=True)
class Answer:
    """A text under its name, with a note below it."""

    name: str
    text: Clipped
    note: str | None = None


@dataclass(frozen=True)
class Card:
    """A prompt with answers side by side."""

    prompt: Clipped
    answers: list[Answer]


@dataclass(frozen=True)
class Fold:
    """Cards that are shown on request."""

    title: str
    cards: list[Card]


@dataclass(frozen=True)
class Column:
    name: str
    is_number: bool = False


Content = str | Clipped | Strip | None  # of a cell


@dataclass(frozen=True)
class Group:
    """Rows of a table with one heading."""

    name: str
    rows: list[list[Content]]
    note: str | None = None
    """Under the name."""


@dataclass(frozen=True)
class Table:
    label: str
    columns: list[Column]
    groups: list[Group]


# --- what was made from what ----------------------------------------------------------------------


def lineage(run: Run) -> Lineage:
    parts = {part.name: part for part in run.parts}
    sources = {}
    for part in run.parts:
        state = re.split("[,:]", part.status)[0]
        note = f"{part.known('kind') or 'made'} by {part.stage}, {state}"
        sources[part.name] = Source(part.name, note, is_outside=False)
    made_from: dict[tuple[str, str], None] = {}
    for part in run.parts:
        for model in part.known("models").values():
            parent = parts.get(model.get("artifact"))
            reference = model["reference"]
            if parent and ("checkpoint" in model or _is_the_same(parent, model)):
                key = parent.name
            else:
                key = f"from {reference}"
                note = "was made anew since" if parent else "from outside this run"
                sources.setdefault(key, Source(reference, note, is_outside=True))
            made_from[key, part.name] = None
    return charts.lineage(sources, list(made_from))


def _is_the_same(parent: Part, model: dict[str, Any]) -> bool:
    """Whether an artifact is still the one that was used."""
    return parent.known("fingerprint") in ({}, model.get("fingerprint"))


# --- training -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlotGroup:
    """Series whose names begin alike."""

    title: str
    plots: list[Plot]


@dataclass(frozen=True)
class Trained:
    """Status, key numbers and curves of an artifact."""

    name: str
    facts: list[Fact]
    groups: list[PlotGroup]
    tradeoff: Plot | None
    """Of ppo: the score by the KL it costs."""
    rollouts: Fold | None
    undrawn: str | None


def trained(part: Part, scale: int) -> Trained:
    facts = {"status": part.status, "kind": part.known("kind") or None, "stage": part.stage}
    for name, value in results_of(part).items():
        facts[name.replace("eval_", "held-out ").replace("_", " ")] = number(value)
    if "training" in part.manifest:
        facts["seconds"] = None  # the duration says it
        facts["duration"] = duration_of(part.manifest["training"]["seconds"])
        facts["size"] = size_of(table_of(part.manifest["files"]))
    rollout = part.known("asked", "recipe", "rollout")
    if dig(rollout, "top_k") or dig(rollout, "top_p") not in ({}, 1):
        facts["KL"] = "of answers from a part of the distribution: above zero at the parent, too"
    undrawn = part.curves.undrawn
    return Trained(
        name=part.name,
        facts=known_facts(facts),
        groups=plot_groups({"": part}, POINTS // scale),
        tradeoff=_tradeoff(part),
        rollouts=_rollouts(part, ITEMS // scale),
        undrawn=f"{undrawn:,} values or lines of metrics.jsonl are not numbers and not drawn."
        if undrawn
        else None,
    )


def results_of(part: Part) -> dict[str, Any]:
    """The last metrics, and what the training took."""
    return flat(part.known("final")) | part.known("training")


def plot_groups(parts: dict[str, Part], most: int) -> list[PlotGroup]:
    """Every series of metrics.jsonl in small pictures, grouped by what stands before the slash.

    Two runs share the pictures: `parts` are labelled.
    """
    curves = {label: part.curves.points for label, part in parts.items()}
    names = dict.fromkeys(
        name.removeprefix("eval_") for points in curves.values() for name in points
    )
    known = list(KNOWN)
    order = sorted(names, key=lambda name: known.index(name) if name in KNOWN else len(KNOWN))
    ends = [
        step
        for points in curves.values()
        for series in points.values()
        for step, _ in (series[0], series[-1])
    ]
    loss_has_unit = not UNITLESS_LOSS & {part.stage for part in parts.values()}
    groups: dict[str, list[Plot]] = {}
    for name in order:
        group, _, rest = name.rpartition("/")
        title, unit = KNOWN.get(name, (rest.replace("_", " "), ""))
        if name == "loss" and not loss_has_unit:
            unit = ""
        picture = plot(title, unit, _series(name, curves), span(ends), most)
        groups.setdefault(group, []).append(picture)
    return [PlotGroup(title, plots) for title, plots in groups.items()]


def _series(name: str, curves: dict[str, dict[str, list[charts.Point]]]) -> list[Series]:
    """A series of every part, and the held-out one of the same name in the same picture."""
    held_out = f"eval_{name}"
    are_two = any(held_out in points for points in curves.values())
    series = []
    for i, (label, points) in enumerate(curves.items()):
        if name in points:
            kind = "train" if are_two else ""
            series.append(Series(f"{label} {kind}".strip(), 2 * i, points[name]))
        if held_out in points:
            series.append(Series(f"{label} held out".strip(), 2 * i + 1, points[held_out]))
    return series


def _tradeoff(part: Part) -> Plot | None:
    points = part.curves.points
    scores = dict(points.get("objective/scores", []))
    kl = dict(points.get("objective/kl", []))
    path = [(kl[step], score) for step, score in scores.items() if step in kl]
    if not path:
        return None
    nats = span([x for x, _ in path])
    series = [Series("", 0, path)]
    return plot("score by KL", "update by update", series, nats, POINTS, along="nats")


def _rollouts(part: Part, most: int) -> Fold | None:
    """The last answers of ppo that were written down."""
    cards = []
    for line in list(part.lines("rollouts.jsonl"))[-most:]:
        prompt = line.get("prompt")
        turns = prompt if isinstance(prompt, list) else [{"content": prompt}]
        text = "\n\n".join(text_of(dig(turn, "content")) for turn in turns)
        name = f"update {text_of(line.get('step'))}, score {number(line.get('score'))}"
        note = None if line.get("ended") else "cut off"
        answer = Answer(name, clip(text_of(line.get("answer")), CHARACTERS), note)
        cards.append(Card(clip(text, CHARACTERS), [answer]))
    return Fold(f"the last {len(cards)} answers that were shown", cards) if cards else None


# --- data -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rejections:
    """The first of the rows that were rejected."""

    title: str
    rows: list[Clipped]


@dataclass(frozen=True)
class Data:
    """Rows read, kept and rejected, where they come from, and the first of those rejected."""

    tables: list[Table]
    rejected: list[Rejections]


def data(run: Run) -> Data:
    tables = []
    rows = [_counts(part) for part in run.parts if part.known("data", "rows")]
    if rows:
        sources = [_sources(part) for part in run.parts if part.known("data", "sources")]
        counts = [Column(name, is_number=True) for name in COUNTS.values()]
        shares = [Column("tokens", is_number=True), Column("supervised", is_number=True)]
        heads = [Column("artifact"), *counts, *shares, Column("rejected for")]
        tables = [Table("rows", heads, rows), Table("sources", SOURCE_COLUMNS, sources)]
    rejected = [_rejections(part) for part in run.parts]
    return Data(tables, [rejections for rejections in rejected if rejections])


SOURCE_COLUMNS = [
    Column("artifact"),
    Column("source"),
    Column("format"),
    Column("files", is_number=True),
    Column("read", is_number=True),
    Column("kept", is_number=True),
    Column("revision"),
]


def _counts(part: Part) -> Group:
    rows = part.known("data", "rows")
    tokens = part.known("data", "tokens")
    share = tokens.get("train_supervised", 0) / max(tokens.get("train", 0), 1)
    reasons = dig(rows, "rejected_by_reason").items()
    why = ", ".join(f"{count:,} {reason}" for reason, count in reasons)
    counts = [number(rows.get(key)) for key in COUNTS]
    return Group(part.name, [[*counts, number(tokens.get("train")), f"{share:.0%}", why or "–"]])


def _sources(part: Part) -> Group:
    rows: list[list[Content]] = []
    for source in part.known("data", "sources"):
        files = dig(source, "files")
        count = len(files) if isinstance(files, list) else 0
        counts = (count or None, source.get("read"), source.get("kept"))
        named = [plain(source.get(name)) for name in ("path", "format")]
        revision = plain(source.get("revision") or "–")[:12]
        rows.append([*named, *map(number, counts), revision])
    return Group(part.name, rows)


def _rejections(part: Part) -> Rejections | None:
    lines = [line for line in part.lines("rejected.jsonl") if line]
    rows = []
    for line in lines[:20]:
        rows.append(clip(": ".join(str(value) for value in line.values() if value != ""), 300))
    title = f"{part.name}: {len(rows)} of {len(lines):,} rejected rows"
    return Rejections(title, rows) if rows else None


# --- evaluation -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskNumbers:
    name: str
    summary: str
    tables: list[Table]


@dataclass(frozen=True)
class Evaluated:
    """Every number with its interval, and the differences between models on the same items."""

    name: str
    facts: list[Fact]
    tasks: list[TaskNumbers]


def evaluated(part: Part) -> Evaluated:
    facts: dict[str, str | None] = {"status": part.status}
    path = part.path / "results.json"
    try:
        results = Results.from_file(path) if path.exists() else Results({}, {})
    except UserError as error:
        return Evaluated(part.name, [Fact("results", error.message)], [])
    for label, model in results.models.items():
        reference = part.known("models", f"models.{label}", "reference")
        facts[label] = f"{reference}, {number(model.parameters)} parameters"
    tasks = [_task_numbers(name, task) for name, task in results.tasks.items()]
    return Evaluated(part.name, known_facts(facts), tasks)


def _task_numbers(name: str, task: TaskResults) -> TaskNumbers:
    facts = []
    if task.n is not None:
        facts.append(f"{task.n:,} items")
    if task.overlap:
        seen = [f"{n:,} asked in training of {label}" for label, n in task.overlap.items() if n]
        facts += seen or ["none asked in training"]
    tables = [
        _numbers(name, task.metrics, are_differences=False),
        _numbers(name, task.differences, are_differences=True),
    ]
    return TaskNumbers(name, "; ".join(facts), [table for table in tables if table.groups])


def _numbers(task: str, metrics: dict[str, Cells], *, are_differences: bool) -> Table:
    """A task's metrics, or its paired differences."""
    title = "difference" if are_differences else "metric"
    heads = [
        Column(f"{title} and scale"),
        Column("model"),
        Column("value", is_number=True),
        Column("95 % interval", is_number=True),
        Column("n", is_number=True),
        Column("picture"),
    ]
    if are_differences:
        heads.append(Column("verdict"))
    groups = [_metric(name, cells, are_differences) for name, cells in metrics.items()]
    return Table(f"{task}: {title}s", heads, groups)


def _metric(name: str, cells: Cells, are_differences: bool) -> Group:
    known = [
        value
        for cell in cells.values()
        for value in (cell.low, cell.value, cell.high)
        if drawable(value)
    ]
    low, high = span([0, 0 if are_differences else 1, *known])
    decimals = _decimals(max(map(abs, known), default=0) or 1)
    sign = "+" if are_differences else ""
    rows: list[list[Content]] = []
    for label, cell in cells.items():
        value, a, b = (number(x, decimals, sign) for x in (cell.value, cell.low, cell.high))
        picture = charts.strip(cell, low, high)
        bounds = f"[{a}, {b}]" if cell.has_interval else cell.lacks
        row: list[Content] = [label, value, bounds, number(cell.n), picture]
        if are_differences:
            row.append("differs" if cell.differs else "not shown to differ")
        rows.append(row)
    return Group(name, rows, note=f"{number(low)} to {number(high)}")


def _decimals(largest: float) -> int:
    """Four digits that count of the largest number of a metric, within reason."""
    least = 2 if largest < 1000 else 0
    most = 12 if largest < 0.1 else 3
    return min(max(3 - math.floor(math.log10(largest)), least), most)


# --- samples --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """The recipes' prompts before and after each training, then items of the evaluations."""

    summary: str
    cards: list[Card]
    items: list[Fold]


def samples(run: Run) -> Samples:
    most = CHARACTERS // run.scale
    count = ITEMS // run.scale
    prompts: dict[str, list[Answer]] = {}
    for part in run.parts:
        for line in part.lines("samples.jsonl"):
            if "when" in line:
                name = f"{part.name}, {text_of(line['when'])}"
                note = None if line.get("ended") else "cut off"
                answer = Answer(name, clip(text_of(line.get("answer")), most), note)
                prompts.setdefault(text_of(line.get("prompt")), []).append(answer)
    shown = [Card(clip(prompt, most), answers) for prompt, answers in prompts.items()][:count]
    folds = [fold for part in run.evaluations for fold in _item_folds(part, most, count)]
    return Samples(f"{len(shown):,} of {len(prompts):,} prompts of the recipes", shown, folds)


def _item_folds(part: Part, most: int, count: int) -> Iterator[Fold]:
    """Items of each task, the models side by side; those whose scores differ stand first."""
    tasks: dict[str, dict[Any, dict[str, dict[str, Any]]]] = {}
    for line in part.lines("samples.jsonl"):
        if "prompt" in line:
            task, item, model = (text_of(line.get(name)) for name in ("task", "item", "model"))
            tasks.setdefault(task, {}).setdefault(item, {})[model] = line
    for task, items in tasks.items():
        differ = [item for item, lines in items.items() if _scores_differ(lines)]
        first = list(dict.fromkeys([*differ, *items]))[:count]
        title = (
            f"{part.name}, {task}: {len(first):,} of {len(items):,} items; "
            f"the scores differ on {len(differ):,}, shown first"
        )
        yield Fold(title, [_item_card(items[item], most) for item in first])


def _scores_differ(lines: dict[str, dict[str, Any]]) -> bool:
    return len({plain(line["scores"]) for line in lines.values() if "scores" in line}) > 1


def _item_card(lines: dict[str, dict[str, Any]], most: int) -> Card:
    """An item, with a line of each model."""
    first = next(iter(lines.values()))
    answers = []
    if right := first.get("reference"):
        texts = right if isinstance(right, list) else [right]
        answers.append(Answer("expected answer", clip(" | ".join(map(text_of, texts)), most)))
    for model, line in lines.items():
        given = line.get("answers")
        if isinstance(given, list):
            text = "\n\n".join(map(text_of, given))
        else:
            text = plain(line.get("values"))
        answers.append(Answer(model, clip(text, most), plain(line.get("scores", ""))))
    return Card(clip(text_of(first.get("prompt")), most), answers)


# --- recipes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What was asked, and with what it was made."""

    name: str
    recipe: Clipped
    origin: list[Fact]


def asked(part: Part) -> Asked:
    origin = {key: plain(part.known(key)) or None for key in ORIGIN}
    return Asked(part.name, clip(part.recipe, 20_000), known_facts(origin))


# --- two runs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """Artifacts of one name in both runs: what was asked differently, what came of it, curves."""

    name: str
    only_in: str | None = None
    recipe: Table | None = None
    results: Table | None = None
    groups: tuple[PlotGroup, ...] = ()


def comparison(a: Run, b: Run) -> list[Compared]:
    others = {part.name: part for part in b.parts}
    compared = []
    for part in a.parts:
        other = others.pop(part.name, None)
        if other:
            compared.append(_compared(part, other, a, b))
        else:
            compared.append(Compared(part.name, only_in=a.name))
    return compared + [Compared(name, only_in=b.name) for name in others]


def _compared(part: Part, other: Part, a: Run, b: Run) -> Compared:
    from llmpipe.run.identity import changes

    recipe = [
        Group(at, [[clip(plain(x), 200), clip(plain(y), 200)]])
        for at, x, y in changes(part.known("asked"), other.known("asked"))
    ]
    ours, theirs = results_of(part), results_of(other)
    results = [
        Group(name, [[number(ours.get(name)), number(theirs.get(name))]]) for name in ours | theirs
    ]
    heads = [Column("differs in"), Column(a.name), Column(b.name)]
    numbers = [Column("result"), Column(a.name, is_number=True), Column(b.name, is_number=True)]
    return Compared(
        part.name,
        recipe=Table("recipe", heads, recipe) if recipe else None,
        results=Table("results", numbers, results),
        groups=tuple(plot_groups({"A": part, "B": other}, POINTS // a.scale)),
    )
