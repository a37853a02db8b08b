"""The three curves that matter of a stage, each with what it says in words.

Everything else of metrics.jsonl is folded away: what changes in small plots, what does not in a
list.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from llmpipe.report.curves import Point
from llmpipe.report.parts import Part
from llmpipe.report.plots import Caption, Plot, Series, plot, span
from llmpipe.report.series import named, scaled
from llmpipe.report.text import number

MOST = 400  # points of a curve


@dataclass(frozen=True)
class Told:
    """Curves that are spoken about: by their label in the legend."""

    points: dict[str, list[Point]]

    def of(self, label: str) -> list[Point]:
        return self.points.get(label, [])


Words = Callable[[Told], str]


@dataclass(frozen=True)
class Panel:
    """A plot of one stage: series by their label, the first of them naming it."""

    series: dict[str, str]
    words: Words
    title: str = ""
    """Where it is not that of the first series."""


def panels_of(stage: str) -> list[Panel]:
    """What matters of a stage, most first; three that a run has are shown."""
    return PANELS.get(stage, SUPERVISED)


# --- words ----------------------------------------------------------------------------------------


def around(points: list[Point], *, at_end: bool = False) -> float:
    """The mean of the first tenth of a curve, or of the last."""
    count = max(len(points) // 10, 1)
    part = points[-count:] if at_end else points[:count]
    return sum(value for _, value in part) / count


def course(points: list[Point]) -> str:
    """`fell from 4.41 to 0.443`; each end is the mean of a tenth."""
    before, after = around(points), around(points, at_end=True)
    low, high = span([value for _, value in points])
    finest = (high - low) / 20  # what is less is not to be seen in the plot
    decimals = min(max(-math.floor(math.log10(finest)), 0), 12)
    if abs(after - before) < 0.05 * (high - low):
        return f"stayed near {number(after, decimals)}"
    moved = "rose" if after > before else "fell"
    return f"{moved} from {number(before, decimals)} to {number(after, decimals)}"


def _loss(told: Told) -> str:
    said = []
    if train := told.of("train"):
        said.append(f"Over the training rows it {course(train)}.")
    held_out = told.of("held out")
    if len(held_out) < 2:
        return " ".join(said)
    first, last = held_out[0][1], held_out[-1][1]
    step, lowest = min(held_out, key=lambda point: point[1])
    ends = f"On held-out rows it was {number(first, digits=3)} before"
    if step == held_out[-1][0]:
        return " ".join([*said, f"{ends} and is lowest at the end, {number(last, digits=3)}."])
    at = f"lowest at step {number(step)}, {number(lowest, digits=3)}"
    return " ".join([*said, f"{ends}, {at}, and {number(last, digits=3)} at the end."])


def _token_accuracy(told: Told) -> str:
    return f"How often the likeliest token is the one of the row. {_courses(told, ' %')}"


def _gradient(told: Told) -> str:
    (points,) = told.points.values()
    step, most = max(points, key=lambda point: point[1])
    return (
        f"Length of the gradient before it is clipped: it {course(points)}, at most "
        f"{number(most, digits=3)}, at step {number(step)}. Spikes that grow mean that the "
        "learning rate is too high."
    )


def _reward_margin(told: Told) -> str:
    return f"Reward of the chosen answer less that of the rejected one. {_courses(told)}"


def _accuracy(told: Told) -> str:
    return f"Pairs whose chosen answer comes first; half is chance. {_courses(told, ' %')}"


def _both_rewards(told: Told) -> str:
    chosen = told.of("chosen")
    said = f"How much likelier the answers became than under the parent. {_courses(told)}"
    if chosen and around(chosen, at_end=True) < 0:
        said += " Chosen ones below zero: they became less likely, too."
    return said


def _likelihoods(told: Told) -> str:
    said = f"How likely the policy finds a token of the answers. {_courses(told)}"
    chosen = told.of("chosen")
    if chosen and around(chosen, at_end=True) < around(chosen):
        said += " Chosen ones became less likely, too."
    return said


def _length(told: Told) -> str:
    return _courses(told, " tokens")


def _groups(told: Told) -> str:
    return (
        f"What the answers to one prompt had for scores. {_courses(told, ' %')} Only mixed groups "
        "teach anything."
    )


def _score(told: Told) -> str:
    return f"The mean score of the answers. {_courses(told)}"


def _entropy(told: Told) -> str:
    (points,) = told.points.values()
    return (
        f"How undecided the policy is about the next token: it {course(points)}. At zero it would "
        "give one answer only."
    )


SUBJECTS = {"train": "in training it", "held out": "held out it"}
"""Of sentences about series; others are called as in the legend."""


def _courses(told: Told, unit: str = "") -> str:
    """`In training it rose from 1 to 2; held out it stayed near 1.`"""
    said = "; ".join(
        f"{SUBJECTS.get(label, label)} {course(points)}{unit}"
        for label, points in told.points.items()
    )
    return f"{said[:1].upper()}{said[1:]}."


# --- panels ---------------------------------------------------------------------------------------

LOSS = Panel({"train": "loss", "held out": "eval_loss"}, _loss)
GRADIENT = Panel({"": "grad_norm"}, _gradient)
SUPERVISED = [LOSS, Panel({"train": "mean_token_accuracy"}, _token_accuracy), GRADIENT]
PREFERENCES = [
    Panel({"train": "rewards/margins", "held out": "eval_rewards/margins"}, _reward_margin),
    Panel({"train": "rewards/accuracies", "held out": "eval_rewards/accuracies"}, _accuracy),
    Panel(
        {
            "chosen": "rewards/chosen",
            "rejected": "rewards/rejected",
            "chosen, held out": "eval_rewards/chosen",
        },
        _both_rewards,
        "rewards of both answers",
    ),
    Panel(  # of objectives without a reference, which have no reward of one answer
        {
            "chosen": "logps_per_token/chosen",
            "rejected": "logps_per_token/rejected",
            "chosen, held out": "eval_logps_per_token/chosen",
        },
        _likelihoods,
        "log-probability of a token",
    ),
    LOSS,
]
LENGTH = Panel({"drawn": "answers/tokens", "held out": "eval_tokens"}, _length)
PANELS = {
    "reward": [
        Panel({"train": "accuracy", "held out": "eval_accuracy"}, _accuracy),
        Panel({"train": "margin", "held out": "eval_margin"}, _reward_margin),
        LOSS,
    ],
    "dpo": PREFERENCES,
    "kto": PREFERENCES,
    "ppo": [
        LENGTH,
        Panel({"": "objective/entropy"}, _entropy),
    ],
    "grpo": [
        Panel(
            {
                "mixed": "groups/mixed",
                "all right": "groups/all_right",
                "none right": "groups/none_right",
            },
            _groups,
            "groups by their scores",
        ),
        LENGTH,
        Panel({"drawn": "objective/scores", "held out": "eval_score"}, _score),
        Panel({"": "objective/entropy"}, _entropy),
    ],
}


@dataclass(frozen=True)
class Panels:
    """The plots of a stage, and what else was recorded."""

    plots: list[Plot]
    more: list[Plot]
    constant: list[str]
    """What never changed, with its value."""


def panels(parts: dict[str, Part], most: int = MOST, count: int = 3) -> Panels:
    """Of one artifact, or of the artifacts of one name in two runs, which are labelled."""
    stage = next(iter(parts.values())).stage
    curves = {label: part.curves.points for label, part in parts.items()}
    every = [series for points in curves.values() for series in points.values()]
    steps = span([step for series in every for step, _ in (series[0], series[-1])] or [0])
    plots = _tradeoff(curves, most) if stage in ("ppo", "grpo") else []
    used = set()
    for panel in panels_of(stage):
        if len(plots) < count and (picture := _picture(panel, stage, curves, steps, most)):
            plots.append(picture)
            used |= set(panel.series.values())
    more, constant = _others(stage, curves, used, steps, most)
    return Panels(plots, more, constant)


ByRun = dict[str, dict[str, list[Point]]]
"""{label of a run: {name of a series: points}}"""


def _picture(
    panel: Panel, stage: str, curves: ByRun, steps: tuple[float, float], most: int
) -> Plot | None:
    first, *_ = panel.series.values()
    known = named(first, stage)
    series: list[Series] = []
    told = {}
    for number_of_run, (run, points) in enumerate(curves.items()):
        for place, (label, name) in enumerate(panel.series.items()):
            if not points.get(name):
                continue
            shown = scaled(points[name], known)
            style = (2 * number_of_run + place) % 4 if len(curves) > 1 else place
            series.append(Series(f"{run} {label}".strip(), style, shown))
            told[label] = shown
    if not series:
        return None
    words = panel.words(Told(told)) if len(curves) == 1 else ""
    caption = Caption(panel.title or known.title, known.unit, words)
    return plot(caption, series, steps, most)


def _tradeoff(curves: ByRun, most: int) -> list[Plot]:
    """The score by the KL that it costs; of one run alone, since two would be a tangle."""
    points = next(iter(curves.values()))
    scores, kl = dict(points.get("objective/scores", [])), dict(points.get("objective/kl", []))
    path = [(kl[step], score) for step, score in scores.items() if step in kl]
    if len(path) < 2 or len(curves) > 1:
        return []
    score, cost = [value for _, value in path], [value for value, _ in path]
    words = (
        f"What the reward gave against what it cost: the score {course(list(enumerate(score)))} "
        f"while KL {course(list(enumerate(cost)))} nats per answer. KL that runs away under a "
        "rising score is a reward that is gamed."
    )
    caption = Caption("score against KL", "score", words, "KL from the reference, nats per answer")
    return [plot(caption, [Series("", 0, path)], span(cost, 0.06), most, is_path=True)]


def _others(
    stage: str, curves: ByRun, used: set[str], steps: tuple[float, float], most: int
) -> tuple[list[Plot], list[str]]:
    """Small plots of what is not among the panels, and what never changed."""
    names = dict.fromkeys(name for points in curves.values() for name in points)
    titles = dict.fromkeys(name.removeprefix("eval_") for name in names if name not in used)
    more, constant = [], []
    for name in titles:
        held_out = f"eval_{name}"
        panel = Panel({"train": name, "held out": held_out}, lambda told: "")
        if held_out not in names:
            panel = Panel({"": name}, lambda told: "")
        known = named(name, stage)
        values = {value for points in curves.values() for _, value in points.get(name, [])}
        values |= {value for points in curves.values() for _, value in points.get(held_out, [])}
        if len(values) == 1:
            value = number(values.pop() * known.factor)
            constant.append(f"{known.title} {value} {known.unit}".strip())
        elif picture := _picture(panel, stage, curves, steps, most):
            more.append(picture)
    return more, constant
