"""Weights of few bits are the source's, and an adapter's update is in them, however small."""

import pytest
import torch

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.export.tensors import same_weights

NAME = "model.layers.0.self_attn.q_proj.weight"


def rounded(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """To the nearest of 2^bits - 1 numbers around zero, a scale for each group of a row."""
    groups = weight.reshape(len(weight), -1, group)
    scale = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return ((groups / scale).round() * scale).reshape(weight.shape)


@pytest.fixture(params=[(8, 512, 0.003), (4, 32, 0.03)], ids=["8 bits", "4 bits"])
def case(request):
    """(base, update, how it is rounded): the update is shorter than what rounding takes away."""
    bits, group, length = request.param
    torch.manual_seed(0)
    base = torch.randn(256, 512)
    update = torch.randn(256, 2) @ torch.randn(2, 512)
    update *= length * base.norm() / update.norm()
    away = rounded(base + update, bits, group) - base - update
    assert update.norm() < away.norm()
    return base, update, lambda weight: rounded(weight, bits, group)


def compared(base, update, seen):
    updates = {NAME: update.bfloat16()}
    return same_weights({NAME: base + update}, {NAME: seen}, None, updates=updates)


def test_an_update_that_is_there_is_seen(case):
    base, update, to_few_bits = case
    assert compared(base, update, to_few_bits(base + update)) == 1


@pytest.mark.parametrize(
    ("times", "share"), [(0, "[0-9]"), (2, "(20|19)[0-9]"), (-1, "(10|9)[0-9]")]
)
def test_an_update_that_is_lost_or_twice_there_is_refused(case, times, share):
    base, update, to_few_bits = case
    problem = f"{NAME} holds -?{share}% of what the adapter adds to it"
    with pytest.raises(UserError, match=problem) as caught:
        compared(base, update, to_few_bits(base + times * update))
    assert caught.value.code == INTEGRITY


def test_what_rounding_hides_is_no_loss():
    """Too short an update among too few weights: nobody could say whether it is there."""
    torch.manual_seed(0)
    base, update = torch.randn(8, 32), 1e-4 * torch.randn(8, 32)
    assert compared(base, update, rounded(base, 3, 32)) == 1


def test_a_weight_without_an_update_is_held_to_itself_alone(case):
    base, _, to_few_bits = case
    assert compared(base, torch.zeros_like(base), to_few_bits(base)) == 1
