"""A model that is too large to be held twice: its weights stay in their files, mapped into memory,
in the precision that they have there. Each part of it, a layer or what stands beside the layers,
borrows its own in the precision and on the device that it computes with, and gives them back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from llmpipe.models.pretrained import load_model
from llmpipe.run.folders import tensors_of

HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}

Precision = Mapping[nn.Parameter, torch.dtype]
"""What each weight that lies in a file is computed with."""


@dataclass(frozen=True)
class Part:
    """What computes by itself, and is held by itself."""

    name: str
    """In the model: that of its tensors begins with it."""
    module: nn.Module
    whole: bool
    """Whether it is the module with all that is in it, or its own tensors alone."""

    def parameters(self) -> list[nn.Parameter]:
        return list(self.module.parameters(recurse=self.whole))


def load_mapped(folder: Path, scores: bool = False) -> PreTrainedModel:
    """A model that takes no memory for the weights that its files hold as they are. Raises
    UserError as `load_model` does.
    """
    return load_model(folder, dtype=dtype_in(folder), scores=scores).eval()


def dtype_in(folder: Path) -> torch.dtype:
    """The precision of the weights in a folder where they have one, and it is at most fp32."""
    kinds = {tensor.dtype for tensor in tensors_of(folder).values()}
    return HALVES.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def parts_of(model: nn.Module, name: str = "") -> Iterator[Part]:
    """A model in parts: layers, and outside of them the smallest modules with weights of their
    own. What PEFT has put around a module is one with it.
    """
    if isinstance(model, nn.ModuleList):
        for place, layer in model.named_children():
            yield Part(f"{name}{place}.", layer, whole=True)
    elif isinstance(model, BaseTunerLayer | AuxiliaryTrainingWrapper) or not _has_layers(model):
        if any(True for _ in model.parameters()):
            yield Part(name, model, whole=True)
    else:
        if any(True for _ in model.parameters(recurse=False)):
            yield Part(name, model, whole=False)
        for child, inside in model.named_children():
            yield from parts_of(inside, f"{name}{child}.")


def _has_layers(model: nn.Module) -> bool:
    return any(isinstance(module, nn.ModuleList) for module in model.modules())


@contextmanager
def borrowed(part: Part, precision: Precision, device: torch.device) -> Iterator[None]:
    """A part with its weights on `device`, which go back to their files after it."""
    lent = _borrow(part, precision, device)
    try:
        yield
    finally:
        _give_back(lent)


Lent = list[tuple[nn.Parameter, torch.Tensor]]


def _borrow(part: Part, precision: Precision, device: torch.device) -> Lent:
    lent = [(weight, weight.data) for weight in part.parameters() if weight in precision]
    for weight, data in lent:
        weight.data = data.to(device, precision[weight])
    return lent


def _give_back(lent: Lent) -> None:
    for weight, data in lent:
        weight.data = data


@contextmanager
def lending(
    model: Any, precision: Precision, device: torch.device, merged: bool = False
) -> Iterator[None]:
    """Let a model, or PEFT's model of one, compute: each part borrows its weights.

    `merged`: with the adapter's update in them, as PEFT merges it. The adapter's own tensors come
    to `device` and stay there.
    """
    for weight in model.parameters():
        if weight not in precision:
            weight.data = weight.data.to(device)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    hooks = []
    for part in parts_of(model):
        loan = _Loan(part, precision, device, merged)
        hooks.append(part.module.register_forward_pre_hook(loan.begin, prepend=True))
        hooks.append(part.module.register_forward_hook(loan.end, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class _Loan:
    """What a part does before and after it computes."""

    part: Part
    precision: Precision
    device: torch.device
    merged: bool
    lent: Lent | None = None

    def begin(self, *_: Any) -> None:
        self.lent = _borrow(self.part, self.precision, self.device)
        for tuner in self._tuners():
            tuner.merge(safe_merge=True)

    def end(self, *_: Any) -> None:
        _give_back(self.lent or [])
        for tuner in self._tuners():
            tuner.merged_adapters.clear()

    def _tuners(self) -> list[Any]:
        inside = self.part.module.modules() if self.merged and self.part.whole else ()
        return [module for module in inside if isinstance(module, BaseTunerLayer)]
