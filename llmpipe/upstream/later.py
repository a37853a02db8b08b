"""TRL's trainers of preferences, without a word to the host in a step: they read a dozen numbers of
each micro-batch for their metrics, and a device computes nothing while it is waited for.

All of them are gathered over processes first, so what gathers hands out numbers to be read later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


class Later:
    """A tensor of a metric, in the arithmetic that TRL does with it on the host.

    What is divided by none is 0: TRL asks for that first, and takes 0 as well.
    """

    def __init__(self, value: Tensor):
        self.value = value.detach()

    def item(self) -> Later:
        """As Python's number: in double precision from here on."""
        return Later(self.value.double())

    def sum(self) -> Later:
        return Later(self.value.sum())

    def mean(self) -> Later:
        return Later(self.value.mean())

    def min(self) -> Later:
        return Later(self.value.min())

    def max(self) -> Later:
        return Later(self.value.max())

    def chunk(self, parts: int, dim: int = 0) -> tuple[Later, ...]:
        return tuple(map(Later, self.value.chunk(parts, dim)))

    def __getitem__(self, at: Any) -> Later:
        """Where `at` is a mask, 0 in place of what it leaves out: what follows is a sum."""
        if isinstance(at, Tensor):
            return Later(torch.where(at, self.value, 0))
        return Later(self.value[at])

    def __gt__(self, other: float) -> bool:
        assert other == 0  # whether there is anything to divide by
        return True

    def __truediv__(self, by: Later) -> Later:
        return Later(torch.where(by.value == 0, 0, self.value / by.value))

    def __floordiv__(self, by: int) -> Later:
        return Later(self.value // by)

    def __radd__(self, other: int) -> Later:
        return Later(self.value + other)


def now(value: Any) -> Any:
    """The tensor of a number that is to be read later; anything else as it is."""
    return value.value if isinstance(value, Later) else value


@contextmanager
def reading_later(accelerator: Accelerator, *, even: bool) -> Iterator[None]:
    """Let what is gathered meanwhile be read later.

    `even`: whether all processes have as many examples; else what is not one number a process stays
    with it, since `gather` wants tensors of one shape, and processes would not meet.
    """
    gather, for_metrics = accelerator.gather, accelerator.gather_for_metrics

    def gathered(tensor: Tensor) -> Later:
        return Later(gather(tensor) if even or tensor.ndim == 0 else tensor)

    def gathered_for_metrics(value: Any) -> Any:
        return for_metrics(now(value))  # which calls `gather`

    with instead(accelerator, gather=gathered, gather_for_metrics=gathered_for_metrics):
        yield


@contextmanager
def instead(accelerator: Accelerator, **functions: Callable[..., Any]) -> Iterator[None]:
    """Let an accelerator have these in place of its methods of their names, and then what it had
    before.
    """
    before = dict(vars(accelerator))
    vars(accelerator).update(functions)
    try:
        yield
    finally:
        for name in functions:
            del vars(accelerator)[name]
            if name in before:
                setattr(accelerator, name, before[name])


def with_later_logits(model: Callable[..., Any]) -> Callable[..., Any]:
    """`model`, of whose mean logits TRL picks those with a label by a mask on the device."""

    def forward(*arguments: Any, **options: Any) -> Any:
        outputs = model(*arguments, **options)
        outputs.mean_logits = Later(now(outputs.mean_logits))
        return outputs

    return forward
