"""`llmpipe show`: the short form of a run, as text of 80 columns."""

from __future__ import annotations

import itertools
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llmpipe.errors import UserError
from llmpipe.files.tables import SMALL, Table, in_bytes
from llmpipe.report.curves import curves_of, rise_of
from llmpipe.report.sampled import told
from llmpipe.report.text import counted, in_words
from llmpipe.run.artifact import Artifact, artifacts
from llmpipe.run.exports import read_exports

if TYPE_CHECKING:
    from llmpipe.data.counts import RowCounts
    from llmpipe.run.manifest import Manifest
    from llmpipe.run.results import Results, TaskResults

COLUMNS = 80
LABEL = 10  # characters of what stands before a line
BARS = "▁▂▃▄▅▆▇█"


def show_run(path: Path) -> str:
    """Every artifact of a run in a paragraph, or all of one of them."""
    if os.path.exists(path / "recipe.yaml"):
        return "\n".join(describe(Artifact(path), in_full=True))
    paragraphs = ["\n".join(describe(artifact)) for artifact in artifacts(path)]
    if not paragraphs:
        hint = "give the folder that `run:` of a recipe names"
        raise UserError(f"{path}: holds no artifacts", hint)
    next_command = f"Curves, answers side by side, every number: llmpipe report {path}"
    return "\n\n".join([*paragraphs, next_command])


def describe(artifact: Artifact, *, in_full: bool = False) -> list[str]:
    """One artifact: status, lineage, rows, training, size; of an evaluation what it found.

    `in_full`: an evaluation with its numbers.
    """
    status, manifest = status_of(artifact)
    lines = [str(artifact.path)]
    if manifest is None:
        return [*lines, *labelled("status", status), *losses(artifact)]
    if manifest.kind == "export":
        exports = _exports(artifact)
        return [*lines, *labelled("status", f"{status} {manifest.finished}"), *exports]
    made = f"{manifest.kind} by {manifest.stage}, {manifest.fingerprint[:12]}"
    lines += labelled("status", f"{status} {manifest.finished}, {made}")
    if manifest.data is None or (manifest.training is None and manifest.kind != "dataset"):
        return lines + _evaluation(artifact, in_full)
    parents = ", ".join(f"{p.name} ({p.fingerprint[:12]})" for p in manifest.parents)
    outside = ", ".join(model["reference"] for model in manifest.models.values())
    lines += labelled("from", parents or outside or "random weights")
    use = "to answer" if manifest.kind == "dataset" else "to train on"
    lines += labelled("rows", _rows(manifest.data.rows, use))
    if manifest.training is None:
        return lines + _sampled(manifest)
    tokens, training = manifest.data.tokens, manifest.training
    share = f"{tokens.train_supervised / max(tokens.train, 1):.0%} supervised"
    share = "prompts, to be answered" if manifest.stage in ("ppo", "grpo") else share
    lines += labelled("tokens", f"{tokens.train:,} per epoch, {share}")
    resumed = "" if training.exact_resume else "; resumed, and not exactly"
    steps = counted(training.steps, "step")
    size = size_of(manifest.files)
    lines += labelled("training", f"{steps}, {duration_of(training.seconds)}, {size}{resumed}")
    if ranked := ranked_by(manifest):
        lines += labelled("ranking", ranked)
    lines += losses(artifact)
    held_out = curves_of(artifact.path / "metrics.jsonl").points.get("eval_loss", [])
    if rise := rise_of(held_out, training.published_step):
        lines += labelled("but", f"{rise}: see evaluation.keep_best")
    return lines


def _sampled(manifest: Manifest) -> list[str]:
    write = str(manifest.asked.recipe.get("write", "rows"))
    return [
        line for name, text in told(manifest.final, write).items() for line in labelled(name, text)
    ]


def _exports(artifact: Artifact) -> list[str]:
    """What each format is, and how far from the model."""
    try:
        exports = read_exports(artifact.path)
    except UserError as error:
        return labelled("formats", error.message.removeprefix(f"{artifact.path}/"))
    return [line for one in exports for line in labelled(one.format, one.told)]


def ranked_by(manifest: Manifest) -> str:
    """How many pairs a reward model has in the right order; empty for any other model."""
    ranking = manifest.final.get("ranking")
    if not ranking:
        return ""
    low, high = ranking["accuracy_interval"]
    pairs = f"{ranking['n']:,} pairs {'held out' if ranking['held_out'] else 'trained on'}"
    return f"{ranking['accuracy']:.0%} [{low:.0%}, {high:.0%}] of {pairs} right"


def labelled(label: str, text: str) -> list[str]:
    """A text behind its label, in as many lines as it takes; only at spaces is it cut."""
    return textwrap.wrap(
        text,
        COLUMNS,
        initial_indent=f"  {label:<{LABEL}} ",
        subsequent_indent=" " * (LABEL + 3),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _rows(rows: RowCounts, use: str) -> str:
    """What became of the rows that were read; what did not occur is not said."""
    why = ", ".join(f"{count:,} {reason}" for reason, count in rows.rejected_by_reason.items())
    rejected = f"{rows.rejected:,} rejected" + (f" ({why})" if why else "")
    told = {
        rejected: rows.rejected,
        f"{rows.truncated:,} truncated": rows.truncated,
        f"{rows.split:,} split": rows.split,
        f"{rows.duplicates:,} duplicate": rows.duplicates,
        f"{rows.unseen:,} left out by weight": rows.unseen,
    }
    parts = [f"{rows.read:,} read", *(text for text, count in told.items() if count)]
    return f"{', '.join(parts)}; {rows.train:,} {use}, {rows.eval:,} held out"


def status_of(artifact: Artifact) -> tuple[str, Manifest | None]:
    """How far an artifact is, and its manifest; a damaged one is said, not raised."""
    if artifact.finished:
        try:
            manifest = artifact.manifest()
        except UserError as error:
            return f"DAMAGED: {error.message.replace(f'{artifact.path}/', '')}", None
        return _altered(artifact.differences(manifest, most=SMALL)) or "finished", manifest
    from llmpipe.run.outcome import Outcome

    steps = artifact.steps
    at = f"checkpoint at step {max(steps):,}" if steps else "no checkpoint yet"
    outcome = Outcome.read(artifact)
    end = f"; last ended with: {outcome.message}" if outcome and outcome.message else ""
    return f"not finished, {at}{end}", None


def _altered(problems: list[str]) -> str:
    """What differs from the manifest, at a glance, in a line; nothing where nothing does."""
    if not problems:
        return ""
    more = f", and {len(problems) - 1:,} more: llmpipe verify" if len(problems) > 1 else ""
    return f"altered: {problems[0]}{more}; finished"


# --- evaluations ----------------------------------------------------------------------------------


def _evaluation(artifact: Artifact, in_full: bool) -> list[str]:
    from llmpipe.run.results import Results  # an evaluation alone has some

    try:
        results = Results.from_file(artifact.path / "results.json")
    except UserError as error:
        return labelled("results", error.message.removeprefix(f"{artifact.path}/"))
    return measurements(results) if in_full else list(findings(results))


def measurements(results: Results) -> list[str]:
    """An evaluation in lines: each number with its interval, then what differs, in sentences."""
    from llmpipe.report.scoreboard import lines_of, scoreboard

    lines = [f"  {line}" for line in lines_of(scoreboard(results))]
    return [*lines, *findings(results)]


def findings(results: Results) -> Iterator[str]:
    """What each model is against the one that it was made from, and what takes from that."""
    from llmpipe.report.scoreboard import scoreboard, sentences

    for sentence in sentences(scoreboard(results)):
        model, _, rest = sentence.partition(" ")
        yield from labelled(model, rest)
    seen = [trained_on(name, task) for name, task in results.tasks.items()]
    if said := in_words([text for text in seen if text]):
        yield from labelled("but", f"asked in training were {said}")


def trained_on(name: str, task: TaskResults) -> str:
    """How many items of a task the models were trained on; empty for none."""
    seen = max((task.overlap or {}).values(), default=0)
    return f"{seen:,} of {task.n or 0:,} items of {name}" if seen else ""


# --- curves ---------------------------------------------------------------------------------------

CURVES = {
    "loss": "loss",
    "eval_loss": "held out",
    "objective/scores": "score",
    "objective/kl": "KL",
    "eval_score": "held out",
}


def losses(artifact: Artifact) -> list[str]:
    """Curves of metrics.jsonl as sparklines: losses, and of a policy that draws scores and KL."""
    points = curves_of(artifact.path / "metrics.jsonl").points
    shown = []
    for name, title in CURVES.items():
        if values := [value for _, value in points.get(name, [])]:
            ends = f"{values[0]:.4g} → {values[-1]:.4g}"
            shown.append(f"  {title:<{LABEL}} {ends:<20}  {sparkline(values)}")
    return shown


def sparkline(values: list[float], width: int = 40) -> str:
    """Values as a row of bars, at most `width` of them, from the lowest to the highest."""
    if len(values) > width:
        edges = [round(i * len(values) / width) for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(BARS[round((v - low) / span * (len(BARS) - 1))] for v in values)


def size_of(files: Table) -> str:
    """Bytes of the published files, 1,234,567 -> '1.2 MB'."""
    return in_bytes(sum(entry.size for entry in files.values()))


def duration_of(seconds: float) -> str:
    """75 -> '1m15s'."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
