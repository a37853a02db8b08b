"""What a reader has to know before believing a run: what failed, what was left out, what looks
wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from llmpipe.errors import SIGINT, SIGTERM
from llmpipe.report.curves import rise_of
from llmpipe.report.evaluation import Evaluated
from llmpipe.report.parts import Part, Run, dig
from llmpipe.report.text import number, text_of

Level = Literal["problem", "caution"]
STOPPED = {75, SIGINT, SIGTERM}  # codes of what can be gone on with as it is
MOST_CUT_OFF = 0.1  # share of answers


@dataclass(frozen=True)
class Notice:
    level: Level
    about: str
    """The artifact's name."""
    text: str


def notices(run: Run, evaluations: list[Evaluated]) -> list[Notice]:
    """Problems first, each kind in the order of the run."""
    found = [
        Notice(level, part.name, text)
        for part in run.parts
        for level, text in [*_of_status(part), *_of_rows(part), *_of_curves(part)]
    ]
    for one in evaluations:
        found += [Notice(level, one.name, text) for level, text in _of_evaluation(one)]
    return sorted(found, key=lambda notice: notice.level != "problem")


Said = Iterator[tuple[Level, str]]


def _of_status(part: Part) -> Said:
    if part.status.startswith(("DAMAGED", "altered")):
        yield "problem", part.status.removesuffix("; finished")
    elif part.status != "finished":
        outcome = part.outcome
        if outcome is None or not outcome.message:
            yield "problem", f"{part.status}: it is at work, or was killed"
            return
        where = part.status.partition(";")[0].removeprefix("not finished, ")
        how = "was stopped" if outcome.code in STOPPED else "failed"
        hint = f" Remedy: {text_of(outcome.hint)}." if outcome.hint else ""
        if outcome.code in STOPPED:
            hint = " The same command goes on from there."
        yield "problem", f"{how}: {outcome.message.rstrip('.')}; {where}.{hint}"
    if dig(part.manifest, "training", "exact_resume") is False:
        yield "caution", "was resumed on another machine or in other ways, so not bit by bit"


def _of_rows(part: Part) -> Said:
    rows = part.known("data", "rows")
    read = dig(rows, "read") or 0
    if rejected := dig(rows, "rejected"):
        reasons = ", ".join(
            f"{number(count)} {text_of(why)}"
            for why, count in dig(rows, "rejected_by_reason").items()
        )
        yield "caution", f"{number(rejected)} of {number(read)} rows were rejected ({reasons})"
    if truncated := dig(rows, "truncated"):
        yield (
            "caution",
            f"{number(truncated)} of {number(read)} rows were cut at the longest length",
        )
    if overlap := dig(rows, "overlap"):
        yield "caution", f"{number(overlap)} held-out rows are trained on as well"


def _of_curves(part: Part) -> Said:
    points = part.curves.points
    if said := overfitting(part):
        yield "caution", said
    ended = points.get("eval_ended") or points.get("answers/ended") or []
    if ended and ended[-1][1] < 1 - MOST_CUT_OFF:
        share = number((1 - ended[-1][1]) * 100, 0)
        yield "caution", f"{share} % of the answers were cut off before they ended"
    rollout = part.known("asked", "recipe", "rollout")
    if dig(rollout, "top_k") or dig(rollout, "top_p") not in ({}, 1):
        yield (
            "caution",
            "KL is of answers drawn from a part of the distribution (top_k, top_p): it is above "
            "zero even at the parent",
        )
    if part.curves.undrawn:
        count = number(part.curves.undrawn)
        yield "caution", f"{count} values or lines of metrics.jsonl are no numbers, and not drawn"


def overfitting(part: Part) -> str:
    """That the held-out loss of what is published was lower before; empty where it was not."""
    held_out = part.curves.points.get("eval_loss", [])
    published = part.known("training", "published_step")
    rise = rise_of(held_out, published)
    if not rise:
        return ""
    kept = "evaluation.keep_best: true publishes the best step"
    if len(held_out) == 2:
        kept = "evaluation.every and evaluation.keep_best find and publish the best step"
    which = "which is published" if published else "so far"
    return f"{rise}, {which}: {kept}"


def _of_evaluation(one: Evaluated) -> Said:
    if one.problem:
        yield "problem", one.problem
    for gate in one.gates:
        if gate.failed:
            yield "problem", f"the gate does not hold: {gate.text}"
    if one.seen:
        yield "caution", f"asked in training were {one.seen}: part of the numbers is memory"
    if one.without_interval:
        yield (
            "caution",
            f"too few items for an interval, so nothing is shown to differ: {one.without_interval}",
        )
