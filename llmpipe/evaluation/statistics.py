"""What a set of scores says: a number, its 95 % interval, and paired differences.

A metric is a ratio of sums over items (a mean where every weight is 1), or a corpus score of all
answers at once (BLEU, chrF). Two models are compared item by item, so that what is hard for both
cancels out.

shares      of right answers have Wilson's interval (Wilson 1927), and differences of shares the one
            that fits McNemar's exact test (see `paired`), for any number of items
all else    has the percentiles of a bootstrap over items (Efron 1979), of which two models share
            the draws. Of fewer than LEAST_ITEMS there is no interval, and so no verdict; where the
            models part on fewer than LEAST_PARTED, the interval of their difference holds zero
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from llmpipe.evaluation import paired
from llmpipe.evaluation.book import Line, Reported, Score
from llmpipe.run.results import LEAST_ITEMS, Cell, Cells
from llmpipe.scores.thinking import answer_to

RESAMPLES = 2000

CORPUS_RESAMPLES = 200  # each one scores every answer again

Z95 = 1.959963984540054  # of the normal distribution

LEAST_PARTED = 6
"""Items on which two models have to part before a difference is shown. That all of five favour one
model is a chance of 1 in 16 (a two-sided sign test), which a bootstrap does not see."""

PERPLEXITY = "perplexity"  # the one metric that is the exponential of its ratio of sums


def wilson(right: float, n: int) -> tuple[float, float]:
    """95 % interval of a share."""
    share = right / n
    z2 = Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low = 0.0 if right == 0 else middle - half
    high = 1.0 if right == n else middle + half
    return low, high


def interval(draws: np.ndarray) -> tuple[float, float]:
    """95 % interval of a resampled number."""
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(low), float(high)


def bootstrapped(draws: np.ndarray, n: int) -> tuple[float, float]:
    """95 % interval of a number that was resampled from `n` items.

    NaN where these are too few, or where the number is not finite.
    """
    if n < LEAST_ITEMS or not np.isfinite(draws).all():
        return math.nan, math.nan
    return interval(draws)


def resampled(numerators: np.ndarray, denominators: np.ndarray, seed: int) -> np.ndarray:
    """Ratios of sums on RESAMPLES draws of items: float64 (models, items) -> (models, RESAMPLES).

    The draws depend on the seed and the number of items alone: models and metrics are compared on
    the same ones.
    """
    n = numerators.shape[1]
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(RESAMPLES // 100):
        counts = rng.multinomial(n, np.full(n, 1 / n), size=100)
        parts.append((numerators @ counts.T) / (denominators @ counts.T))
    return np.concatenate(parts, axis=1)


# --- one metric -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A metric of one model: its value, and its values on resampled items."""

    lines: list[Line]
    value: float
    draws: np.ndarray

    @property
    def items(self) -> list[int | str]:
        return [line.item for line in self.lines]


# (metric, lines of each model on the same items, seed) -> value of each model, draws of each model
Estimator = Callable[[str, list[list[Line]], int], tuple[list[float], np.ndarray]]


def ratios_of_sums(
    metric: str, lines_of_models: list[list[Line]], seed: int
) -> tuple[list[float], np.ndarray]:
    """An `Estimator`: the sum of the items' numerators by the sum of their denominators."""
    fractions = np.array(
        [[_fraction((line.scores or {})[metric]) for line in lines] for lines in lines_of_models],
        np.float64,
    )
    numerators, denominators = fractions[..., 0], fractions[..., 1]
    draws = resampled(numerators, denominators, seed)
    values = (numerators.sum(1) / denominators.sum(1)).tolist()
    if metric == PERPLEXITY:
        with np.errstate(over="ignore"):  # to infinity
            return np.exp(values).tolist(), np.exp(draws)
    return values, draws


def _fraction(score: Score) -> tuple[float, float]:
    return (score[0], score[1]) if isinstance(score, list) else (score, 1.0)


def corpus_scores(
    metric: str, lines_of_models: list[list[Line]], seed: int
) -> tuple[list[float], np.ndarray]:
    """An `Estimator`: sacrebleu's score of all answers at once."""
    from sacrebleu import BLEU, CHRF

    library = BLEU() if metric == "bleu" else CHRF()

    def value(lines: list[Line]) -> float:
        shown = [line.shown for line in lines]
        answers = [answer_to(each["prompt"], each["answers"][0]) for each in shown]
        references = [_listed(line.shown["reference"]) for line in lines]
        streams = zip_longest(*references)  # the first one of each, the second one of each, ...
        return float(library.corpus_score(answers, [list(stream) for stream in streams]).score)

    n = len(lines_of_models[0])
    rng = np.random.default_rng(seed)
    draws = [rng.integers(0, n, n) for _ in range(CORPUS_RESAMPLES)]
    drawn = [[value([lines[i] for i in draw]) for draw in draws] for lines in lines_of_models]
    return [value(lines) for lines in lines_of_models], np.array(drawn)


def _listed(reference: str | list[str]) -> list[str]:
    return reference if isinstance(reference, list) else [reference]


def _estimates(
    metric: str, lines_by_model: dict[str, list[Line]], estimator: Estimator, seed: int
) -> dict[str, Estimate]:
    """A metric of every model that has it; those measured on the same items share their draws."""
    measured = {}
    for model, lines in lines_by_model.items():
        if having := [line for line in lines if line.has(metric)]:
            measured[model] = having
    sharing: dict[tuple[int | str, ...], list[str]] = {}
    for model, lines in measured.items():
        sharing.setdefault(tuple(line.item for line in lines), []).append(model)
    estimates = {}
    for models in sharing.values():
        values, draws = estimator(metric, [measured[model] for model in models], seed)
        for model, value, drawn in zip(models, values, draws, strict=True):
            estimates[model] = Estimate(measured[model], value, drawn)
    return {model: estimates[model] for model in measured}


def _scores(metric: str, estimate: Estimate) -> list[Score | None]:
    return [(line.scores or {}).get(metric) for line in estimate.lines]


def _is_share(scores: list[Score | None]) -> bool:
    """Whether each item is right or wrong."""
    return all(score in (0, 1) for score in scores)


def _cell(metric: str, estimate: Estimate) -> Cell:
    """A model's number."""
    n = len(estimate.lines)
    if _is_share(_scores(metric, estimate)):
        low, high = wilson(estimate.value * n, n)
    else:
        low, high = bootstrapped(estimate.draws, n)
    return Cell(estimate.value, low, high, n)


def _difference(metric: str, a: Estimate, b: Estimate) -> Cell:
    """`b` less `a`, on the same items."""
    n = len(b.lines)
    pairs = list(zip(_answers(metric, b), _answers(metric, a), strict=True))
    if _is_share(_scores(metric, a)) and _is_share(_scores(metric, b)):
        low, high = paired.interval(pairs.count((1.0, 0.0)), pairs.count((0.0, 1.0)), n)
        return Cell(b.value - a.value, low, high, n)
    with np.errstate(invalid="ignore"):  # of two that are infinite
        low, high = bootstrapped(b.draws - a.draws, n)
    if sum(mine != other for mine, other in pairs) < LEAST_PARTED:
        low, high = min(low, 0.0), max(high, 0.0)
    return Cell(b.value - a.value, low, high, n)


def _answers(metric: str, estimate: Estimate) -> list[Any]:
    """What a metric is made of, item by item: scores, or the answers of a corpus score."""
    return [(line.scores or {}).get(metric, line.shown.get("answers")) for line in estimate.lines]


def _differences(metric: str, estimates: dict[str, Estimate]) -> Cells:
    """Every model less every one before it, of those that were measured on the same items."""
    cells = {}
    models = list(estimates)
    for i, model in enumerate(models):
        for other in models[:i]:
            b, a = estimates[model], estimates[other]
            if a.items == b.items:
                cells[f"{model} - {other}"] = _difference(metric, a, b)
    return cells


# --- one task -------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """The numbers of one task."""

    metrics: dict[str, Cells]
    """{metric: {model: cell}}."""
    differences: dict[str, Cells]
    """{metric: {"b - a": cell}}, on the same items."""


def measured(lines: list[Line], models: list[str], seed: int) -> Measured:
    """The numbers and the differences of one task's lines, in the order of `models`."""
    lines_by_model = _scored(lines, models)
    every = [line for scored in lines_by_model.values() for line in scored]
    per_item = dict.fromkeys(metric for line in every for metric in line.scores or ())
    corpus = dict.fromkeys(metric for line in every for metric in line.corpus or ())
    estimators: dict[str, Estimator] = dict.fromkeys(per_item, ratios_of_sums)
    estimators |= dict.fromkeys(corpus, corpus_scores)

    metrics: dict[str, Cells] = {}
    differences: dict[str, Cells] = {}
    for metric, estimator in estimators.items():
        estimates = _estimates(metric, lines_by_model, estimator, seed)
        metrics[metric] = {model: _cell(metric, of) for model, of in estimates.items()}
        if cells := _differences(metric, estimates):
            differences[metric] = cells
    for line in lines:
        for metric, number in (line.reported or {}).items():
            cells = metrics.setdefault(metric, {})
            cells[line.model] = _reported(number, cells.get(line.model))
    return Measured(metrics, differences)


def _scored(lines: list[Line], models: list[str]) -> dict[str, list[Line]]:
    """The scored items of every model that has some, in the order of the items."""
    lines_by_model: dict[str, list[Line]] = {}
    for model in models:
        scored = [line for line in lines if line.model == model and line.scores is not None]
        if scored:
            lines_by_model[model] = sorted(scored, key=lambda line: line.order)
    return lines_by_model


def _reported(number: Reported, cell: Cell | None) -> Cell:
    """A library's own number counts, with the interval of the items where it is their mean."""
    if cell and not abs(cell.value - number.value) > 1e-9:
        return cell._replace(value=number.value)
    half = math.nan if number.standard_error is None else Z95 * number.standard_error
    return Cell(number.value, number.value - half, number.value + half, number.n)
