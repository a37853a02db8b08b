"""Scores of answers, and what a set of scores says: a number, its 95 % interval, and paired differences.

A metric is a ratio of sums over items (a mean where every weight is 1), or a corpus score of all answers at once (BLEU,
chrF). Shares of right answers get Wilson's interval (Wilson 1927), everything else the percentiles of a bootstrap over
items (Efron 1979). Two models are compared on the same resampled items, so that what is hard for both cancels out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

RESAMPLES, CORPUS_RESAMPLES = 2000, 200

Z95 = 1.959963984540054  # of the normal distribution

Line = dict[str, Any]


def pass_at(k: int, n: int, right: int) -> float:
    """Chance that at least one of k answers is right, from `right` of n: 1 - C(n-c, k) / C(n, k) (Chen 2021, eq. 1)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def wilson(right: float, n: int) -> tuple[float, float]:
    """95 % interval of a share."""
    share, z2 = right / n, Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return (0.0 if right == 0 else middle - half), (1.0 if right == n else middle + half)


def resampled(a: np.ndarray, b: np.ndarray, seed: int) -> np.ndarray:
    """Ratios of sums `a`/`b`, float64 (models, items) each, on RESAMPLES draws of items: (models, RESAMPLES).

    The draws depend on the seed and the number of items alone: models and metrics are compared on the same ones.
    """
    n = a.shape[1]
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(RESAMPLES // 100):
        draws = rng.multinomial(n, np.full(n, 1 / n), size=100)
        parts.append((a @ draws.T) / (b @ draws.T))
    return np.concatenate(parts, axis=1)


def interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def _corpus(kind: str) -> Callable[[Sequence[Line]], float]:
    from sacrebleu import BLEU, CHRF

    library = BLEU() if kind == "bleu" else CHRF()
    return lambda lines: (
        library.corpus_score(
            [x["answers"][0] for x in lines], [[x["reference"] for x in lines]]
        ).score
    )


def _corpus_resampled(kind: str, by_model: list[list[Line]], seed: int) -> np.ndarray:
    rng, value = np.random.default_rng(seed), _corpus(kind)
    n = len(by_model[0])
    draws = [rng.integers(0, n, n) for _ in range(CORPUS_RESAMPLES)]
    return np.array([[value([lines[i] for i in draw]) for draw in draws] for lines in by_model])


def table(lines: list[Line], models: list[str], seed: int) -> dict[str, Any]:
    """{"metrics": {metric: {model: cell}}, "differences": {metric: {"b - a": cell}}} of one task's lines.

    A line is one item of one model: {"model", "item", "scores": {metric: value or [numerator, denominator]}}; `corpus`
    names metrics over all answers. A cell is {value, low, high, n}. A line with `reported` holds a library's own
    numbers {metric: [value, standard error, n]}: they count, with the items' interval where they are the items' mean.
    """
    by_model = {
        m: sorted((x for x in lines if x["model"] == m and "scores" in x), key=item_key)
        for m in models
    }
    by_model = {m: own for m, own in by_model.items() if own}
    metrics: dict[str, dict[str, Any]] = {}
    differences: dict[str, dict[str, Any]] = {}
    names = dict.fromkeys(
        name for own in by_model.values() for line in own for name in line["scores"]
    )
    corpus = dict.fromkeys(
        name for own in by_model.values() for line in own for name in line.get("corpus", ())
    )
    for name in (*names, *corpus):
        chosen = {
            m: [x for x in own if name in x["scores"] or name in x.get("corpus", ())]
            for m, own in by_model.items()
        }
        chosen = {m: own for m, own in chosen.items() if own}
        items = {m: [x["item"] for x in own] for m, own in chosen.items()}
        draws: dict[str, np.ndarray] = {}
        values: dict[str, float] = {}
        groups: dict[tuple, list[str]] = {}
        for m, own in items.items():
            groups.setdefault(tuple(own), []).append(m)
        for (
            group
        ) in groups.values():  # models that were measured on the same items share their draws
            if name in corpus:
                drawn = _corpus_resampled(name, [chosen[m] for m in group], seed)
                values |= {m: _corpus(name)(chosen[m]) for m in group}
            else:
                pairs = np.array(
                    [[_pair(x["scores"][name]) for x in chosen[m]] for m in group], np.float64
                )
                drawn = resampled(pairs[..., 0], pairs[..., 1], seed)
                values |= dict(
                    zip(group, (pairs[..., 0].sum(1) / pairs[..., 1].sum(1)).tolist(), strict=True)
                )
                if name == "perplexity":
                    drawn, values = np.exp(drawn), values | {m: math.exp(values[m]) for m in group}
            draws |= dict(zip(group, drawn, strict=True))
        metrics[name] = {}
        for m, own in chosen.items():
            shares = name not in corpus and all(x["scores"][name] in (0, 1) for x in own)
            low, high = wilson(values[m] * len(own), len(own)) if shares else interval(draws[m])
            metrics[name][m] = {"value": values[m], "low": low, "high": high, "n": len(own)}
        listed = list(chosen)
        for i, b in enumerate(listed):
            for a in listed[:i]:
                if items[a] == items[b]:
                    low, high = interval(draws[b] - draws[a])
                    cell = {
                        "value": values[b] - values[a],
                        "low": low,
                        "high": high,
                        "n": len(items[a]),
                    }
                    differences.setdefault(name, {})[f"{b} - {a}"] = cell
    for line in lines:
        for name, (value, error, n) in line.get("reported", {}).items():
            cell = metrics.setdefault(name, {}).get(line["model"])
            if cell is None or abs(cell["value"] - value) > 1e-9:
                half = Z95 * error if error is not None else math.nan
                cell = metrics[name][line["model"]] = {
                    "low": value - half,
                    "high": value + half,
                    "n": n,
                }
            cell["value"] = value
    return {"metrics": metrics, "differences": differences}


def item_key(line: Line) -> tuple[int, str]:
    """Sorts the items of a task: by number, the harness's by name."""
    return (line["item"], "") if isinstance(line["item"], int) else (0, line["item"])


def _pair(value: float | list[float]) -> tuple[float, float]:
    return (value[0], value[1]) if isinstance(value, list) else (value, 1.0)
