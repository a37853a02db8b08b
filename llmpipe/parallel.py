"""How a model is spread over processes, and what these tell each other.

Today every process holds the whole model: one process alone, or several under
DistributedDataParallel, which Accelerate puts around it. Nothing else in llmpipe calls
`torch.distributed`, so whatever comes after DDP has one place to go.

All methods of `World` that speak to the other processes are collective: every process has to call
them, in one order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch import distributed as dist

from llmpipe.errors import UserError
from llmpipe.run.signals import Signals

T = TypeVar("T")

TOGETHER = 1 << 26  # numbers that are sent at once: a quarter of a GB in fp32


class World:
    """All processes of a run, as one of them sees them. With one process nothing is sent."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.rank: int = accelerator.process_index
        self.size: int = accelerator.num_processes

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when every process has come here."""
        self.accelerator.wait_for_everyone()

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes of a tensor of any shape; on the CPU where there are several
        processes.
        """
        return self._reduced(value, dist.ReduceOp.SUM)

    def greatest(self, value: float) -> float:
        """The greatest of the processes' numbers, the same in all of them."""
        return float(self._reduced(torch.tensor(float(value)), dist.ReduceOp.MAX))

    def totals(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """The sum over processes of every number, added in float64. All processes have the same
        names in one order.
        """
        values = torch.tensor([float(value) for value in sums.values()], dtype=torch.float64)
        return dict(zip(sums, self.sum(values).tolist(), strict=True))

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Add tensors up over processes, in place and where they are: together, up to `TOGETHER`
        numbers of one type.
        """
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            parts = flat.split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Add the gradients up in place, those that are missing as zeros. DDP averages them itself;
        this is for a loop without it.
        """
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self.add_up(gradients)

    def gather(self, value: T) -> list[T]:
        """Every process's object, which is pickled on the way, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def agree(self, error: UserError | None) -> None:
        """Raise in all processes what one of them has met, the first by rank: none may wait for
        another.
        """
        told = (error.message, error.hint, error.code) if error else None
        first = next((each for each in self.gather(told) if each), None)
        if first:
            raise UserError(*first)

    def stop_code(self, signals: Signals) -> int:
        """The exit code of a signal that any process was sent, 0 for none; the same in all
        processes.
        """
        return int(self.greatest(signals.code or 0))

    def _reduced(self, value: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return value
        shared = value.to(self.device, copy=True)
        dist.all_reduce(shared, op=operation)
        return shared.cpu()


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type that have at most `TOGETHER` numbers together, or are one alone."""
    bucket: list[Tensor] = []
    numbers = 0
    for tensor in tensors:
        full = numbers + tensor.numel() > TOGETHER
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, numbers = [], 0
        bucket.append(tensor)
        numbers += tensor.numel()
    if bucket:
        yield bucket
