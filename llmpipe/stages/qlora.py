"""`llmpipe qlora`: an adapter on a quantized model (Dettmers 2023).

It is `lora` with `quantization:` required.
"""

from __future__ import annotations

from typing import Literal

from llmpipe.recipe.sections import Quantization
from llmpipe.stages import lora
from llmpipe.stages.lora import ACCEPTS, MAKES, PROGRESS, prepare, shapes, train

__all__ = ["ACCEPTS", "MAKES", "PROGRESS", "Schema", "prepare", "shapes", "train"]


class Schema(lora.LowRank):
    stage: Literal["qlora"] = "qlora"
    """Supervised fine-tuning of an adapter on a quantized model."""
    quantization: Quantization
    """How the frozen model is held."""
