"""`llmpipe show`: the short form of a run, as text."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING

from llmpipe.errors import UserError
from llmpipe.files import SMALL, Table, in_bytes
from llmpipe.report.curves import curves_of
from llmpipe.run.artifact import Artifact, artifacts

if TYPE_CHECKING:
    from llmpipe.run.manifest import Manifest
    from llmpipe.run.results import Results

BARS = "▁▂▃▄▅▆▇█"


def show_run(path: Path) -> str:
    """Every artifact of a run, or one of them, a paragraph each."""
    if os.path.exists(path / "recipe.yaml"):
        return "\n".join(describe(Artifact(path)))
    paragraphs = ["\n".join(describe(artifact)) for artifact in artifacts(path)]
    if not paragraphs:
        hint = "give the folder that `run:` of a recipe names"
        raise UserError(f"{path}: holds no artifacts", hint)
    return "\n\n".join(paragraphs)


def describe(artifact: Artifact) -> list[str]:
    """One artifact: status, lineage, rows, training, size."""
    status, manifest = status_of(artifact)
    if manifest is None:
        return [f"{artifact.path}  {status}", *losses(artifact)]
    by = f"{manifest.finished}  {manifest.kind} by {manifest.stage}  {manifest.fingerprint[:12]}"
    lines = [f"{artifact.path}  {status} {by}"]
    if manifest.data is None or manifest.training is None:  # an evaluation
        from llmpipe.run.results import Results  # an evaluation alone has some

        try:
            return lines + measurements(Results.from_file(artifact.path / "results.json"))
        except UserError as error:
            return [*lines, f"  {error.message.removeprefix(f'{artifact.path}/')}"]
    rows = manifest.data.rows
    tokens = manifest.data.tokens
    training = manifest.training
    rejected = ", ".join(f"{n} {reason}" for reason, n in rows.rejected_by_reason.items()) or "none"
    parents = ", ".join(f"{p.name} ({p.fingerprint[:12]})" for p in manifest.parents)
    outside = ", ".join(model["reference"] for model in manifest.models.values())
    lines.append(f"  from       {parents or outside or 'random weights'}")
    lines.append(
        f"  rows       {rows.read:,} read = {rows.kept:,} kept + {rows.rejected:,} rejected "
        f"({rejected}); {rows.truncated:,} truncated, {rows.split:,} split; "
        f"{rows.train:,} train, {rows.eval:,} held out"
    )
    share = f"{tokens.train_supervised / max(tokens.train, 1):.0%} supervised"
    share = "prompts, to be answered" if manifest.stage == "ppo" else share
    lines.append(f"  tokens     {tokens.train:,} per epoch, {share}")
    lasted = duration_of(training.seconds)
    resumed = "" if training.exact_resume else "; resumed, and not exactly"
    size = size_of(manifest.files)
    lines.append(f"  training   {training.steps:,} steps, {lasted}, {size}{resumed}")
    if ranking := manifest.final.get("ranking"):
        low, high = ranking["accuracy_interval"]
        pairs = f"{ranking['n']:,} pairs {'held out' if ranking['held_out'] else 'trained on'}"
        lines.append(
            f"  ranking    {ranking['accuracy']:.3f} [{low:.3f}, {high:.3f}] of {pairs} right"
        )
    return lines + losses(artifact)


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


def measurements(results: Results) -> list[str]:
    """An evaluation in lines: every number and every difference, with its interval."""
    lines = []
    for name, task in results.tasks.items():
        seen = max((task.overlap or {}).values(), default=0)
        note = f"; {seen:,} of {task.n:,} asked in training" if seen else ""
        lines.append(f"  {name}: {task.task}{note}")
        for metric, cells in task.metrics.items():
            for label, cell in cells.items():
                bounds = f"[{cell.low:.4f}, {cell.high:.4f}]" if cell.has_interval else cell.lacks
                value = f"{cell.value:10.4f}  {bounds}  n={cell.n:,}"
                lines.append(f"    {metric:<16} {label:<14} {value}")
            for pair, cell in task.differences.get(metric, {}).items():
                bounds = f"[{cell.low:+.4f}, {cell.high:+.4f}]" if cell.has_interval else cell.lacks
                value = f"{cell.value:+10.4f}  {bounds}"
                verdict = "  differs" if cell.differs else ""
                lines.append(f"    {'':<16} {pair:<14} {value}{verdict}")
    return lines


CURVES = {
    "loss": "loss",
    "eval_loss": "held out",
    "objective/scores": "score",
    "objective/kl": "KL",
    "eval_score": "held out",
}


def losses(artifact: Artifact) -> list[str]:
    """Curves of metrics.jsonl as sparklines: losses, and for ppo scores and KL."""
    points = curves_of(artifact.path / "metrics.jsonl").points
    shown = []
    for name, title in CURVES.items():
        if values := [value for _, value in points.get(name, [])]:
            ends = f"{values[0]:.4f} -> {values[-1]:.4f}"
            shown.append(f"  {title:<10} {ends}  {sparkline(values)}")
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
