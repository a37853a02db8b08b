"""One light file per stage: its recipe and its story. `STAGES` is the one table of them."""

from __future__ import annotations

import difflib
import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from llmpipe.errors import UserError

if TYPE_CHECKING:
    from llmpipe.recipe.sections import Recipe

STAGES = {
    "pretrain": "pretraining: from raw text to a model",
    "sft": "supervised fine-tuning: learn to answer from examples",
    "lora": "sft of a low-rank adapter on a frozen model",
    "qlora": "sft of an adapter on a model held in 4 or 8 bits",
    "reward": "reward modelling: learn which of two answers people prefer",
    "ppo": "proximal policy optimization: answer so that a reward is high",
    "dpo": "direct preference optimization: answer as people prefer",
    "eval": "evaluation: measure models on the same items, with intervals",
}

CHECKPOINTS = (
    "checkpoints/step-*"  # what an unfinished artifact of a stage that trains goes on from
)


def stage(name: str) -> ModuleType:
    """The module of a stage: `Schema`; `ACCEPTS` and `MAKES`, artifact kinds; `PROGRESS`, a glob of what an unfinished
    artifact goes on from; `prepare(job)` and `train(job, prepared)`; where it has one, `judge(recipe, artifact)`."""
    if name not in STAGES:
        match = difflib.get_close_matches(str(name), STAGES, n=1)
        hint = f"; did you mean '{match[0]}'?" if match else ""
        raise UserError(f"stage: '{name}' is not a stage{hint}", f"there are: {', '.join(STAGES)}")
    return importlib.import_module(f"llmpipe.stages.{name}")


def schema(name: str) -> type[Recipe]:
    """The recipe class of a stage."""
    return stage(name).Schema
