"""A tensor of which each process holds a part, as FSDP2 cuts it.

Who asks here need not know whether it is: of a tensor that each process holds whole, all of this is
true, too. `whole` also takes what DeepSpeed has cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from llmpipe.parallel import zero

T = TypeVar("T")


def is_part(tensor: Tensor) -> bool:
    """Whether each process holds a part of it."""
    return isinstance(tensor, DTensor)


def whole(tensor: T) -> T:
    """A tensor of which each process has a part, as one; anything else as it is. Collective."""
    if zero.is_part(tensor):
        return zero.whole(tensor)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of one that is not in parts."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: Tensor, parts: Tensor) -> Tensor:
    """What this process would hold of a whole tensor, were it in parts as another one is."""
    if not isinstance(parts, DTensor):
        return tensor
    tensor = tensor.to(parts.device)
    mesh, placements = parts.device_mesh, parts.placements
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None).to_local()


def clipped_norm(weights: Sequence[nn.Parameter], most: float) -> Tensor:
    """Clip the gradients of weights, in parts or not, to a norm of `most` together; their norm
    before it. Collective; no process reads the device.
    """
    parts = [weight for weight in weights if is_part(weight)]
    if not parts:
        return clip_grad_norm_(weights, most)
    rest = [weight for weight in weights if not is_part(weight)]
    norms = [get_total_norm([w.grad for w in some if w.grad is not None]) for some in (parts, rest)]
    norm = torch.stack([whole(each).to(weights[0].device) for each in norms]).norm()
    factor = (most / (norm + 1e-6)).clamp(max=1.0)  # as PyTorch has it
    for weight in weights:
        if weight.grad is not None:
            part_of(weight.grad).mul_(factor)
    return norm
