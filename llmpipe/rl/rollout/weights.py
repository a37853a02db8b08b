"""The policy's weights as a checkpoint has them, for an engine that holds a copy."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from llmpipe import upstream
from llmpipe.rl.actors import POLICY, Actors

Named = list[tuple[str, Tensor]]


@torch.no_grad()
def weights_of(actors: Actors) -> Iterator[Named]:
    """Layer by layer, each weight once, under the names that it is saved under.

    Adapters are merged in fp32, in copies of a layer at a time: the policy is not touched.
    """
    model = actors.causal
    for _, group in groupby(_plain(model, "", set()), key=lambda named: _layer_of(named[0])):
        tensors = {name: weight.detach() for name, weight in group}
        yield list(upstream.as_saved(model, tensors).items())


def _layer_of(name: str) -> str:
    """What is renamed together: a layer of the model, or what lies outside of all."""
    layer = re.match(r".*?\.\d+\.", name)
    return layer[0] if layer else ""


def _plain(module: nn.Module, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Weights by the names that they have without adapters; of those that are one tensor one."""
    if isinstance(module, BaseTunerLayer):
        # copies, which nothing shares and whose numbers others get once they are gone
        yield from _merged(module).named_parameters(prefix.rstrip("."))
        return
    for name, weight in module.named_parameters(recurse=False):
        if id(weight) not in seen:
            seen.add(id(weight))
            yield prefix + name, weight
    for name, child in module.named_children():
        yield from _plain(child, f"{prefix}{name}.", seen)


def _merged(layer: Any) -> nn.Module:
    """A copy of an adapted layer with the policy's update in its weights."""
    layer = copy.deepcopy(layer)
    layer.get_base_layer().float()  # rounded once, by the engine
    layer.merge(safe_merge=True, adapter_names=[POLICY])
    merged: nn.Module = layer.get_base_layer()
    return merged
