"""What the processes of a run tell each other. All of it is collective: every process has to call
it, in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor
from torch import distributed as dist

from llmpipe.errors import UserError
from llmpipe.files.tables import FileEntry
from llmpipe.mirror import copy_of, mirrors
from llmpipe.parallel.group import accelerator, join, patient
from llmpipe.parallel.tensors import is_part
from llmpipe.run.signals import Signals

T = TypeVar("T")

TOGETHER = 1 << 26  # numbers that are sent at once: a quarter of a GB in fp32


class World:
    """All processes of a run, as one of them sees them. With one process nothing is sent."""

    def __init__(self, accelerator: Accelerator | PartialState):
        self.accelerator: Any = accelerator
        self.device: torch.device = accelerator.device
        self.rank: int = accelerator.process_index
        self.size: int = accelerator.num_processes

    @classmethod
    def of(cls, device: str) -> World:
        """All processes that were started together, on CPUs or on a GPU each."""
        join(device)
        return cls(accelerator(device))

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when every process has come here, however long one of them works alone."""
        if self.size > 1:
            dist.barrier(patient())

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes of a tensor of any shape; on the CPU where there are several
        processes.
        """
        return self._reduced(value, dist.ReduceOp.SUM)

    def greatest(self, value: float) -> float:
        """The greatest of the processes' numbers, the same in all of them."""
        return float(self._reduced(torch.tensor(float(value)), dist.ReduceOp.MAX))

    def all(self, value: bool) -> bool:
        """Whether this is so in every process. No device is asked, nor waited for."""
        if self.size == 1:
            return value
        shared = torch.tensor(int(value))
        dist.all_reduce(shared, dist.ReduceOp.MIN, patient())
        return bool(shared)

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
        this is for a loop without it. Those in parts were added up on the way, see `add_gradients`.
        """
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if not is_part(parameter):
                gradients.append(parameter.grad)
        self.add_up(gradients)

    def evened(self, passes: Sequence[T]) -> list[T | None]:
        """Passes of this process, and None behind them until every process has as many."""
        missing = int(self.greatest(len(passes))) - len(passes)
        return [*passes, *[None] * missing]

    def gather(self, value: T) -> list[T]:
        """Every process's object, which is pickled on the way, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, patient())
        return values

    def told(self, value: Callable[[], T]) -> T:
        """What rank 0 finds, which alone looks for it. Collective, also of what it raises."""
        values: list[T] = []
        with self.as_one():
            if self.is_first:
                values.append(value())
        return next(iter(self.gather(values)[0]))

    def agree(self, error: UserError | None) -> None:
        """Raise in all processes what one of them has met, the first by rank: none may wait for
        another.
        """
        told = (error.message, error.hint, error.code) if error else None
        first = next((each for each in self.gather(told) if each), None)
        if first:
            raise UserError(*first)

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """Around what each process does alone: raise in all of them what the first by rank of them
        has met, a user's mistake.
        """
        error: UserError | None = None
        try:
            yield
        except UserError as met:
            error = met
        self.agree(error)

    @property
    def is_mirrored(self) -> bool:
        """Whether a machine does not see what rank 0 writes."""
        return self.size > 1 and mirrors() is not None

    def place(self, path: Path | None) -> Path:
        """Where rank 0's path, which it alone has to know, is for this process. Collective."""
        known = mirrors() if self.size > 1 else None
        told = str(known.way(path) if known and path else path)
        told = self.gather(told)[0]
        return known.run / told if known else Path(told)

    def bring(self, path: Path | None) -> Path:
        """Let every process see what lies in rank 0's folder at a path, if anything: where it is
        for this one. Collective. Raises UserError in all, where a machine cannot have it.
        """
        place = self.place(path)
        if self.is_mirrored and (known := mirrors()):
            with self.as_one():
                known.bring(lambda: [copy_of(place, known.run)])
        return place

    def staged(self, path: Path | None) -> Path:
        """A folder that rank 0 has made: where this process writes its part of it. Collective."""
        place = self.place(path)
        if self.is_mirrored and (known := mirrors()):
            with self.as_one():
                known.clear(place)
        return place

    def collect(self, folder: Path, hashed: Mapping[str, FileEntry]) -> None:
        """Let rank 0 see what all processes have written into a folder that `staged` gave.
        `hashed`: what the writers have hashed. Collective; raises as `bring` does.
        """
        if self.is_mirrored and (known := mirrors()):
            with self.as_one():
                known.collect(folder, hashed)

    def keep(self, folder: Path, target: Path) -> None:
        """Let machines that do not see what rank 0 has published as `target` keep their part of it,
        which they need not be sent again. Collective.
        """
        if self.is_mirrored and (known := mirrors()):
            self.wait()
            with self.as_one():
                known.keep(folder, target)

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
