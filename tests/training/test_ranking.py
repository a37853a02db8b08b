"""What a few pairs say of a reward model."""

import numpy as np
import pytest

from llmpipe.training.ranking import describe


@pytest.mark.parametrize("n", [1, 3, 19])
def test_few_pairs_give_the_margin_no_interval(n):
    few = describe(np.random.default_rng(0).normal(size=(n, 2)), 0, held_out=True)
    assert few.margin_interval is None
    low, high = few.accuracy_interval
    assert low < few.accuracy < high or few.accuracy in (low, high)
    assert high - low > 0.2


def test_many_pairs_give_it_one():
    many = describe(np.random.default_rng(0).normal(size=(50, 2)), 0, held_out=True)
    low, high = many.margin_interval
    assert low < many.margin < high
