"""Weights in half precision for as long as answers are drawn with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class _RoundedLayer:
    """A linear layer, and its parameters as products read them under autocast."""

    layer: nn.Linear
    rounded: dict[str, nn.Parameter]


class RoundedWeights:
    """The weights of products in autocast's type, made once for a rollout: the same numbers as
    autocast gives, which would round the fp32 weights anew for every token, reading and writing
    three times what a product reads."""

    def __init__(self, model: nn.Module):
        device = next(model.parameters()).device.type
        self.layers: list[_RoundedLayer] = []
        if not torch.is_autocast_enabled(device):
            return
        dtype = torch.get_autocast_dtype(device)
        apart = set()  # DoRA computes with the weights themselves, in fp32
        for module in model.modules():
            if getattr(module, "lora_variant", None):
                apart |= set(module.modules())
        for module in model.modules():
            if type(module) is nn.Linear and module not in apart:
                wide = _wide(module)
                rounded = {
                    name: nn.Parameter(weight.detach().to(dtype), requires_grad=False)
                    for name, weight in wide.items()
                }
                if rounded:
                    self.layers.append(_RoundedLayer(module, rounded))

    @property
    def bytes(self) -> int:
        return sum(weight.nbytes for each in self.layers for weight in each.rounded.values())

    @torch.no_grad()
    def refresh(self) -> None:
        """Round again what an optimizer has moved, in the same places."""
        for each in self.layers:
            for name, rounded in each.rounded.items():
                rounded.copy_(getattr(each.layer, name))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Compute with them; the parameters themselves are back afterwards. A weight that is an
        embedding as well stays what it is there."""
        kept = [dict(each.layer._parameters) for each in self.layers]
        try:
            for each in self.layers:
                each.layer._parameters.update(each.rounded)
            yield
        finally:
            for each, parameters in zip(self.layers, kept, strict=True):
                each.layer._parameters.update(parameters)


def _wide(layer: nn.Linear) -> dict[str, nn.Parameter]:
    """The parameters of a layer that are in fp32."""
    named = layer.named_parameters(recurse=False)
    return {name: weight for name, weight in named if weight.dtype == torch.float32}
