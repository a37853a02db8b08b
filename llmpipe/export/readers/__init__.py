"""Who will use an export, a file each: a reader loads what was written as its user will, and
answers the questions of the probe.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from llmpipe.run.probe import Probe


class Reader(Protocol):
    """Somebody's engine with a model in it."""

    name: str
    """With its version."""
    tensors: int
    """Of the export, that it applied."""
    computes_in: torch.dtype
    """To which it rounds what it computes."""

    def probe(self) -> Probe:
        """What it makes of the questions, by its own template engine and tokenizer."""

    def predicts(self, ids: list[int]) -> Tensor:
        """Logits of every token of a sequence: float32 [tokens, vocabulary], on the CPU."""

    def close(self) -> None:
        """Give its memory back."""
