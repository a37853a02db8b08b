"""`llmpipe lora`: supervised fine-tuning of a low-rank adapter (Hu 2021). It is `sft` with `adapter:` required."""

from __future__ import annotations

from typing import ClassVar, Literal

from llmpipe.recipe.sections import Adapter
from llmpipe.stages import sft
from llmpipe.stages.sft import ACCEPTS, PREPARED, PROGRESS, prepare, train

__all__ = ["ACCEPTS", "MAKES", "PREPARED", "PROGRESS", "Schema", "prepare", "train"]
MAKES = "adapter"


class Schema(sft.Schema):
    narrows: ClassVar[str] = "sft"

    stage: Literal["lora"] = "lora"
    """Supervised fine-tuning of an adapter."""
    adapter: Adapter
    """The low-rank adapter to train; the model stays frozen."""
