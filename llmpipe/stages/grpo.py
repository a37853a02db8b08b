"""`llmpipe grpo`: group relative policy optimization (Shao 2024) and its kin.

Inputs: a policy, mostly what `sft` or `lora` made, prompts, and one or several rewards, as for
`ppo`. Makes: a `model`, or an adapter. Every update draws a group of answers to each prompt, scores
them, and makes likelier what scored above its group: no critic is learned. How that is done is
`algorithm`'s: docs/road/grpo.md has which settings are which paper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from llmpipe.recipe.grpo import GRPORecipe
from llmpipe.stages import ppo

if TYPE_CHECKING:  # they read the whole of a run, which checking a recipe does not need
    from llmpipe.data.prepared import PreparedRows
    from llmpipe.run.job import Job
    from llmpipe.run.made import Made

ACCEPTS = ppo.ACCEPTS
MAKES = ppo.MAKES
PROGRESS = ppo.PROGRESS

foresee = ppo.foresee
shapes = ppo.shapes
prepare = ppo.prepare


class Schema(GRPORecipe):
    stage: Literal["grpo"] = "grpo"
    """Group relative policy optimization."""


def train(job: Job[Schema], prepared: PreparedRows) -> Made:
    """Train, publish `model/` and return what the manifest says of it."""
    from llmpipe.rl import grpo

    return grpo.train(job, prepared)
