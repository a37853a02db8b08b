"""Whether training moved what is published: a model that equals its parent is no result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmpipe.parallel.tensors import part_of, whole

LOW_RANK = (".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B.")

UNIT = 2.0**-24
"""What a weight has to move by, about. Of 0 any step makes another number, so that the row of a pad
token or a bias would move at a rate at which nothing is learned."""

AT_ONCE = 1 << 24  # weights


@dataclass(frozen=True)
class Start:
    """The weights that learn as they were before the first step: of each a sum of its bits, which
    is soon taken, and no second copy."""

    sums: dict[str, int]
    in_units: bool = False
    """Whether an update of low rank is itself a part of the weights, as PiSSA's and OLoRA's are."""

    @classmethod
    def of(cls, model: nn.Module) -> Start:
        """Of a model that has not been trained yet, a reward model's new head included."""
        learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
        in_units = hasattr(model, "began_with")
        return cls({name: _sum(name, p, in_units) for name, p in learned.items()}, in_units)

    def moved(self, model: Any) -> bool:
        """Whether a reader of the files would find other weights than before training.

        An update of low rank counts where it changes a weight that it is added to: one of 1e-30
        beside weights of 0.02 is none.
        """
        weights = dict(model.named_parameters())
        names = self.sums.keys() & weights.keys()  # a critic's adapter is gone by now
        changed = [
            name for name in names if _sum(name, weights[name], self.in_units) != self.sums[name]
        ]
        if not all(map(_is_low_rank, changed)):
            return True
        return bool(changed) and any(_has_effect(layer) for layer in model.modules())


def _is_low_rank(name: str) -> bool:
    return any(part in name for part in LOW_RANK)


def _sum(name: str, weight: Tensor, in_units: bool) -> int:
    """A sum of a tensor's bits; of what is no update of low rank, or `in_units`, in whole units. Of
    one that is sharded: of this process's part.
    """
    weight = part_of(weight)
    if _is_low_rank(name) and not in_units:
        return _sum_of_bits(weight)
    parts = weight.detach().flatten().split(AT_ONCE)
    # 0.0 is added since -0.0 and 0.0 have other bits
    return sum(_sum_of_bits((part.float() / UNIT).round() + 0.0) for part in parts)


def _sum_of_bits(weight: Tensor) -> int:
    """The sum of a tensor's bytes, eight at a time, modulo 2^64."""
    flat = weight.detach().contiguous().flatten()
    whole = flat.nbytes // 8 * 8
    words = flat.view(torch.uint8)[:whole]
    rest = flat.view(torch.uint8)[whole:]
    if words.storage_offset() % 8 or words.data_ptr() % 8:
        words = words.clone()
    return int(words.view(torch.int64).sum()) + int(rest.sum())


@torch.no_grad()
def _has_effect(layer: Any) -> bool:
    """Whether a layer is one of PEFT's whose update changes its weight, in fp32, as it is merged.

    What is held in few bits is not compared with: any update that is not 0 counts.
    """
    if not hasattr(layer, "lora_A") or "default" not in layer.scaling:
        return False
    update = layer.get_delta_weight("default").float()
    weight = whole(layer.get_base_layer().weight)
    if weight.shape != update.shape or not weight.is_floating_point():
        return bool(update.any())
    return not torch.equal(weight.float() + update, weight.float())
