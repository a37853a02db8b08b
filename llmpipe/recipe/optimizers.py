"""The optimizers: forms of AdamW by their names in a recipe, and what the libraries call them.

A new one is its name in `OptimizerName` and its line in `OPTIMIZERS`.

None has moments in bf16. Of a second moment that forgets a thousandth a step, rounding to 8 bits
keeps what it was: 1.0 after 5,000 steps where fp32 has 0.255. Blocks of 8 bits have a scale each.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]


class Optimizer(NamedTuple):
    """What the libraries call it."""

    in_trainer: str | None
    """`optim` of transformers' TrainingArguments; None leaves it as it is."""
    in_bitsandbytes: str | None
    """The class in `bitsandbytes.optim`; None is PyTorch's AdamW."""
    moments: int
    """Bytes of a device that the moments of a number take."""
    paged: bool = False
    """Whether moments move to the CPU's memory when a GPU is full."""


OPTIMIZERS: dict[OptimizerName, Optimizer] = {
    "adamw": Optimizer(None, None, 8),
    "adamw_8bit": Optimizer("adamw_bnb_8bit", "AdamW8bit", 2),
    "paged_adamw": Optimizer("paged_adamw_32bit", "PagedAdamW", 0, paged=True),
    "paged_adamw_8bit": Optimizer("paged_adamw_8bit", "PagedAdamW8bit", 0, paged=True),
}
