"""Whether a measured model passes the conditions of its recipe.

Without pydantic: `llmpipe report` says it, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from llmpipe.errors import UserError, near
from llmpipe.run.results import Results

ByMetric = dict[str, dict[str, float]]
"""{TASK.METRIC: {model: value}}"""


class Conditions(Protocol):
    """On one number, see `stages.eval.Gate`."""

    @property
    def min(self) -> float | None: ...
    @property
    def max(self) -> float | None: ...
    @property
    def max_ratio_to_parent(self) -> float | None: ...


@dataclass(frozen=True)
class Judged:
    """One number, held against its conditions."""

    metric: str
    """TASK.METRIC."""
    model: str
    value: float
    asked: list[str]
    """Every condition, in words."""
    failed: list[str]
    """Those that do not hold."""


def judged(name: str, gate: Conditions, label: str, results: Results) -> Judged:
    """The number that a gate names, of one model. NaN passes no condition.

    Raises UserError where no one number is meant, or the parent was not measured.
    """
    values = results.values()
    metric = _metric(name, label, values)
    of_models = values[metric]
    value = of_models[label]
    conditions: dict[str, bool] = {}
    if gate.min is not None:
        conditions[f"at least {gate.min:.4g}"] = value >= gate.min
    if gate.max is not None:
        conditions[f"at most {gate.max:.4g}"] = value <= gate.max
    if gate.max_ratio_to_parent is not None:
        parent = results.models[label].parent
        if parent not in of_models:
            problem = f"gate: {name}: the parent of {label} is not among models"
            raise UserError(problem, "add it to `models:`")
        limit = gate.max_ratio_to_parent * of_models[parent]
        words = f"at most {gate.max_ratio_to_parent:g} x {parent}'s {limit:.4g}"
        conditions[words] = value <= limit
    failed = [words for words, holds in conditions.items() if not holds]
    return Judged(metric, label, value, list(conditions), failed)


def _metric(name: str, label: str, values: ByMetric) -> str:
    """The one measured TASK.METRIC that a gate names, with or without its task."""
    named = [metric for metric in values if name in (metric, metric.partition(".")[2])]
    if len(named) == 1 and label in values[named[0]]:
        return named[0]
    problem = "several tasks have it" if len(named) > 1 else f"not measured{near(name, values)}"
    known = ", ".join(metric for metric, of_models in values.items() if label in of_models)
    raise UserError(f"gate: {name}: {problem}", f"there are: {known}")
