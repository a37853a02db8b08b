"""The difference of two shares of right answers on the same items, with an interval that is exact
in its verdict.

The interval of Fay and Lumbard (2021, Statistics in Medicine 40:1147), made for pairs of right and
wrong: it leaves zero out where the exact test of McNemar (1947; two-sided, the sign test on the
items where the two part) rejects equality at 5 %, and nowhere else. Fewer than six such items never
do. There is no proof that it covers the true difference in at least 95 % of cases, but it does
wherever it was computed.

Of n items, m are right in one model alone, b of these in the first. What is known of the share of
m, and of b among m, are the confidence distributions that belong to Clopper and Pearson's intervals
(1934): beta distributions. The bounds are quantiles of what the difference is under them.
"""

from __future__ import annotations

import math

import numpy as np

TAIL = 0.025  # on each side of a 95 % interval

POINTS = 8001  # of a tabulated distribution
QUANTILES = 8000


def interval(only_first: int, only_second: int, n: int) -> tuple[float, float]:
    """95 % interval of the share right in the first less that in the second.

    `only_first`, `only_second`: items right in one of them alone, of `n` > 0.
    """
    low = _lower(only_first, only_second, n)
    high = -_lower(only_second, only_first, n)
    return low, high


def _lower(b: int, c: int, n: int) -> float:
    """The lower bound: a quantile of share x (2 part - 1), each as low as its data allow."""
    m = b + c
    part = _Beta(b, c + 1)
    share_below, share_above = _Beta(m, n - m + 1), _Beta(m + 1, n - m)
    levels = (np.arange(QUANTILES) + 0.5) / QUANTILES
    leanings = 2 * part.quantile(levels) - 1

    def chance(bound: float) -> float:
        """That the difference is at most `bound`."""
        # a share that is low makes a gain small, and one that is high a loss large
        if bound < 0:
            losing = leanings[leanings < 0]
            return float((1 - share_above.cdf(bound / losing)).sum()) / QUANTILES
        gaining = leanings[leanings > 0]
        gains = share_below.cdf(np.minimum(bound / gaining, 1.0)).sum()
        return 1 - len(gaining) / QUANTILES + float(gains) / QUANTILES

    below, above = -1.0, 1.0
    for _ in range(30):
        middle = (below + above) / 2
        if chance(middle) < TAIL:
            below = middle
        else:
            above = middle
    # which side of zero it lies on is known exactly
    return max(above, 1e-12) if sign_test(b, c) < TAIL else min(below, 0.0)


def sign_test(b: int, c: int) -> float:
    """Chance of at least b heads in b + c throws of a fair coin: McNemar's exact p, one-sided."""
    m = b + c
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, m + 1)))])  # logarithms
    heads = np.arange(b, m + 1)
    chances = factorials[m] - factorials[heads] - factorials[m - heads] - m * math.log(2)
    return float(np.exp(chances).sum())


class _Beta:
    """A beta distribution of whole parameters; of 0 and c it is the point 0, of b and 0 the point
    1."""

    def __init__(self, a: int, b: int):
        if not (a and b):
            point = 1.0 if a else 0.0
            self.values, self.levels = np.array([point, point]), np.array([0.0, 1.0])
            return
        mean = a / (a + b)
        width = 15 * math.sqrt(mean * (1 - mean) / (a + b + 1))
        x = np.linspace(max(mean - width, 0), min(mean + width, 1), POINTS)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = _times_log(a - 1, x) + _times_log(b - 1, 1 - x)
        density = np.exp(logs - logs.max())
        area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
        self.values, self.levels = x, area / area[-1]

    def cdf(self, x: np.ndarray) -> np.ndarray:
        return np.interp(x, self.values, self.levels, left=0.0, right=1.0)

    def quantile(self, level: np.ndarray) -> np.ndarray:
        return np.interp(level, self.levels, self.values)


def _times_log(factor: int, x: np.ndarray) -> np.ndarray:
    return factor * np.log(x) if factor else np.zeros_like(x)
