"""`llmpipe lora`: supervised fine-tuning of a low-rank adapter (Hu 2021).

It is `sft` with `adapter:` required.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from llmpipe.recipe.sections import Adapter
from llmpipe.stages import sft
from llmpipe.stages.sft import ACCEPTS, PROGRESS, prepare, shapes, train

__all__ = ["ACCEPTS", "MAKES", "PROGRESS", "Schema", "prepare", "shapes", "train"]
MAKES = "adapter"


class LowRank(sft.Supervised):
    """The recipe of `lora`, and of the stage that narrows it."""

    narrows: ClassVar[str | None] = "sft"

    adapter: Adapter
    """The low-rank adapter to train; the model stays frozen."""


class Schema(LowRank):
    stage: Literal["lora"] = "lora"
    """Supervised fine-tuning of an adapter."""
