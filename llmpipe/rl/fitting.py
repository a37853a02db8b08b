"""Whether a training pass fits in a GPU's memory, seen before the first update learns anything: the
longest episodes that the recipe allows are passed forward and backward, and what comes of it is
thrown away. Where they do not fit, passes are cut in halves; then activations are computed again.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmpipe.faults import of_memory
from llmpipe.models.drawing.draw import Episode
from llmpipe.recipe.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    from llmpipe.rl.loop import Loop

DEVICES = {"cuda"}
"""Whose memory is all that there is, as in `training.memory`."""

KINDS = ("none", "selective", "full")
"""Of what is computed again, by their time."""


def fit_passes(loop: Loop, prompt: int, response: int) -> None:
    """Cut the passes of a training until they fit, where the recipe leaves that to us. Collective.

    `prompt`, `response`: tokens of the longest episode. Raises torch's OutOfMemoryError where not
    even that one fits alone.
    """
    launch = loop.recipe.launch
    if loop.hardware.device not in DEVICES:
        return
    if "auto" not in (launch.micro_batch_size, launch.checkpointing):
        return
    ended = Episode([0] * prompt, [0] * response, True, torch.zeros(response), None)
    while problem := _try(loop, ended):
        size = loop.learner.pass_size
        smaller = size.halved(ended.tokens)
        kinds = KINDS[KINDS.index(loop.hardware.activation_checkpointing) + 1 :]
        if smaller:
            loop.say(f"memory: passes of {size.words} do not fit; trying {smaller.words}")
            loop.learner.pass_size = smaller
        elif launch.checkpointing == "auto" and kinds:
            loop.say(f"memory: not one episode fits; trying activation_checkpointing: {kinds[0]}")
            loop.compute_again(kinds[0])
        else:
            raise torch.OutOfMemoryError(problem)


def _try(loop: Loop, longest: Episode) -> str:
    """Fill a pass with the longest episode; how memory was short in any of the processes, nothing
    where it was not.
    """
    learner, problem = loop.learner, ""
    stand_ins: list[Tensor] = []
    try:
        stand_ins.append(_moments(loop))
        for weight in learner.weights.values():
            weight.grad = torch.zeros_like(weight)
        learner.attempt(longest)
    except RuntimeError as error:
        if not of_memory(error):
            raise
        problem = str(error)  # alone: its traceback holds what was computed
    stand_ins.clear()
    learner.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return next(filter(None, loop.world.gather(problem)), "")


def _moments(loop: Loop) -> Tensor:
    """As many bytes as the optimizer's moments will take."""
    numbers = sum(weight.numel() for weight in loop.learner.weights.values())
    count = OPTIMIZERS[loop.recipe.optim.optimizer].moments * numbers
    return torch.empty(count, dtype=torch.uint8, device=loop.world.device)
