"""The interval of a difference of paired shares: McNemar's verdict, and what it covers."""

import math

import pytest

from llmpipe.evaluation.paired import interval, sign_test


def mcnemar(b, c):
    """The exact test's two-sided p, by its definition."""
    m = b + c
    tail = sum(math.comb(m, heads) for heads in range(max(b, c), m + 1)) / 2**m
    return min(1.0, 2 * tail)


@pytest.mark.parametrize("n", [1, 5, 6, 12, 40, 1000])
def test_it_leaves_zero_out_where_the_exact_test_rejects(n):
    for b in range(min(n, 14) + 1):
        for c in range(min(n - b, 5) + 1):
            low, high = interval(b, c, n)
            assert -1 <= low <= (b - c) / n <= high <= 1
            assert (low > 0 or high < 0) == (mcnemar(b, c) < 0.05), (b, c)
            assert (low, high) == pytest.approx([-x for x in reversed(interval(c, b, n))])


def test_the_sign_test_of_many():
    assert sign_test(3, 1) == pytest.approx(5 / 16)
    assert sign_test(0, 5) == pytest.approx(1)
    assert sign_test(30_300, 29_700) == pytest.approx(0.00724, abs=1e-5)


def test_bounds_are_those_of_the_equation():
    """Integrated over the two beta distributions of Fay and Lumbard (2021), with scipy."""
    from scipy.integrate import quad
    from scipy.optimize import brentq
    from scipy.stats import beta

    def bound(b, c, n):
        m = b + c

        def chance(difference):
            def gains(part):
                share = min(difference / (2 * part - 1), 1)
                return beta.pdf(part, b, c + 1) * beta.cdf(share, m, n - m + 1)

            area, _ = quad(gains, 0.5, 1, points=[0.5 + difference / 2], limit=500)
            return beta.cdf(0.5, b, c + 1) + area - 0.025

        return brentq(chance, 1e-6, 0.99)

    for counts in ((6, 0, 6), (6, 0, 10), (15, 5, 20), (12, 2, 50), (30, 0, 100)):
        assert interval(*counts)[0] == pytest.approx(bound(*counts), abs=1e-4)


def test_where_one_model_alone_is_right_it_is_that_of_clopper_and_pearson():
    # of 10 among 20 they give 0.2720 to 0.7280 (1934), of 0 among 10 up to 0.3085
    assert interval(10, 0, 20)[1] == pytest.approx(0.7280, abs=1e-3)
    assert interval(0, 0, 10) == pytest.approx((-0.3085, 0.3085), abs=1e-3)
    low, high = interval(10, 10, 20)  # all of them part: 2 x 0.2720 - 1, made wider
    assert -0.47 < low < -0.4559 and 0.4559 < high < 0.47


@pytest.mark.parametrize("n", [1, 6, 15])
def test_it_covers_what_is_true(n):
    """In at least 95 of 100 cases, whatever the shares: summed over every outcome."""
    counts = [(b, c) for b in range(n + 1) for c in range(n + 1 - b)]
    bounds = {(b, c): interval(b, c, n) for b, c in counts}
    shares = [0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.95, 1]
    for first in shares:
        for second in (share for share in shares if first + share <= 1):
            covered = 0.0
            for (b, c), (low, high) in bounds.items():
                ways = math.comb(n, b) * math.comb(n - b, c)
                equal = max(1 - first - second, 0.0) ** (n - b - c)
                if low <= first - second <= high:
                    covered += ways * first**b * second**c * equal
            assert covered >= 0.95, (first, second)
