"""The processes of a run and what they tell each other: sums, the greatest, and the first error."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from llmpipe.errors import UserError


class World:
    """All processes, as one of them sees them. With one process nothing is sent."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.device = accelerator, accelerator.device
        self.rank, self.size = accelerator.process_index, accelerator.num_processes

    def add(self, value: Tensor, greatest: bool = False) -> Tensor:
        """The sum over processes, or the greatest, on the CPU."""
        if self.size == 1:
            return value
        shared = value.to(self.device)
        op = torch.distributed.ReduceOp.MAX if greatest else torch.distributed.ReduceOp.SUM
        torch.distributed.all_reduce(shared, op=op)
        return shared.cpu()

    def totals(self, sums: dict[str, Any]) -> dict[str, float]:
        """Every number's sum over processes."""
        values = torch.tensor([float(value) for value in sums.values()], dtype=torch.float64)
        return dict(zip(sums, self.add(values).tolist(), strict=True))

    def agree(self, error: UserError | None) -> None:
        """Raise in all processes what one has met: none may wait for another."""
        errors = [error and (error.message, error.hint, error.code)]
        if self.size > 1:
            errors *= self.size
            torch.distributed.all_gather_object(errors, errors[0])
        if first := next(filter(None, errors), None):
            raise UserError(*first)
