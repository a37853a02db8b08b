"""What a few pairs say of a reward model."""

import numpy as np
import pytest
import torch

from llmpipe.training.ranking import describe, in_order


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


def test_scores_of_several_processes_lie_as_their_pairs_do():
    pairs = torch.arange(14.0).reshape(7, 2)  # in batches of two; the last process has a filler
    ranks = [(pairs[:2], pairs[6:]), (pairs[2:4], pairs[:1]), (pairs[4:6], pairs[:1])]
    assert in_order(ranks, 7).tolist() == pairs.tolist()
