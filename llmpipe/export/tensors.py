"""Whether the weights that a reader holds are the source's, each by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmpipe.errors import INTEGRITY, UserError

UNLIKE = 0.5
"""Of its own length that a weight may be away from the source's at most, however few bits it has:
another weight of the same size is 1.4 lengths away, and three bits move one by 0.15."""

ABSENT = 0.5
"""Share of an adapter's update that a weight of 8 bits may miss, or have too much of. 4 bits are
not held to it: a base that had 4 bits itself, as one that was a GGUF file, is rounded back to them,
and a small update is gone; how far the model is away then, `accept:` judges."""
SURE = 4
"""Standard deviations of rounding that this has to be, too."""


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """A model's weights by name; of those that share their numbers the first one."""
    weights: dict[str, Tensor] = {}
    places = set()
    for name, weight in model.state_dict().items():
        place = weight.data_ptr() or id(weight)  # what is quantized lies in several places
        if place not in places:
            places.add(place)
            weights[name] = weight
    return weights


def same_weights(
    expected: Mapping[str, Tensor],
    seen: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    *,
    updates: Mapping[str, Tensor],
    moves_scales: bool = False,
) -> int:
    """Compare weights by name; returns how many there are.

    `dtype`: to which they were rounded, and nothing else was done to them; None where they are
    quantized. `updates`: of an adapter, to which quantized weights are held, where they have 8
    bits. `moves_scales`: they are also scaled by row and by column. Raises UserError (3) naming the
    first that is missing, left over, or another one.
    """
    for name in sorted(expected.keys() | seen.keys()):
        if name not in seen:
            refuse(f"{name} is missing")
        if name not in expected:
            refuse(f"{name} is left over")
        ours, theirs = expected[name], seen[name]
        if moves_scales and ours.shape == theirs.shape:
            theirs = unscaled(ours, theirs)
        _same(name, ours, theirs, dtype)
        if dtype is None and name in updates:
            _updated(name, ours, theirs, updates[name])
    return len(expected)


def unscaled(expected: Tensor, seen: Tensor) -> Tensor:
    """Weights with the scales of their rows and columns taken back, as far as such, none of them
    negative, explain what differs; each number of a vector has one."""
    ours, theirs = expected.float(), seen.float()
    if ours.dim() == 1:
        return torch.where(ours * theirs >= 0, ours, theirs)
    for dim in (0, 1, 0, 1):
        along = (theirs * ours).sum(dim, keepdim=True)
        square = theirs.square().sum(dim, keepdim=True).clamp(min=1e-30)
        theirs = theirs * (along / square).clamp(min=0)
    return theirs


def _same(name: str, expected: Tensor, seen: Tensor, dtype: torch.dtype | None) -> None:
    if expected.shape != seen.shape:
        refuse(f"{name} has the shape {list(seen.shape)}, not {list(expected.shape)}")
    if not seen.isfinite().all():
        refuse(f"{name} holds NaN or Inf")
    if dtype is not None:
        # norms may be kept in fp32 beside rounded matrices
        rounded = expected.to(dtype).float()
        if not (torch.equal(seen.float(), rounded) or torch.equal(seen.float(), expected.float())):
            refuse(f"{name} is not the weight that was published")
        return
    distance = float((seen.float() - expected.float()).norm())
    length = float(expected.float().norm())
    if distance > UNLIKE * length:
        share = distance / max(length, 1e-30)
        refuse(f"{name} is not the weight that was published: {share:.2f} of its length away")


def _updated(name: str, expected: Tensor, seen: Tensor, update: Tensor) -> None:
    """Refuse a weight that an adapter's update is not in, though that is shorter than what bits
    take away: rounding goes either way, and cancels out along the update."""
    along = update.float()
    square = along.square().sum()
    is_cast = torch.equal(seen, expected.to(seen.dtype))  # beside few bits all else is in bf16
    if not square or (is_cast and seen.dtype != torch.float32):
        return
    off = expected.float() - seen.float()
    share = float((off * along).sum() / square)
    spread = float((off * along).norm() / square)  # of sums of as many roundings, each its own way
    if abs(share) > max(ABSENT, SURE * spread):
        there = 1 - share
        refuse(f"{name} holds {there:.0%} of what the adapter adds to it")


def refuse(problem: str) -> NoReturn:
    hint = "what was written is not the model that was published"
    raise UserError(f"the export is refused: {problem}", hint, INTEGRITY)
