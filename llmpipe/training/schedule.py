"""The learning rate of every step, for TRL's loops and for that of `rl`: transformers' shapes
behind a warm-up that begins above 0.

A warm-up of w steps gives step s, counted from 0, the share s / w in transformers: the first step
learns nothing, and of a short run that is all there is. Here it is (s + 1) / (w + 1), as torchtitan
has it: step 1 learns, the peak is reached at the same step, and what follows is transformers' own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from llmpipe.errors import INTEGRITY, Say, UserError
from llmpipe.recipe import sections

Shape = Callable[[int], float]
"""The share of the peak that a step has, the first being 0."""


def in_transformers_words(recipe: sections.Training) -> dict[str, Any]:
    """The recipe's schedule as fields of TrainingArguments."""
    optim: Any = recipe.optim  # `decay` and `final` are those of pretrain
    final = getattr(optim, "final", 0.0)
    fields: dict[str, Any] = {
        "warmup_steps": optim.warmup if optim.warmup < 1 else int(optim.warmup)
    }
    if optim.scheduler == "wsd":
        fields["lr_scheduler_type"] = "warmup_stable_decay"
        fields["lr_scheduler_kwargs"] = {
            "num_decay_steps": max(1, round(optim.decay * recipe.steps)),
            "min_lr_ratio": final,
        }
    elif optim.scheduler == "cosine" and final:
        fields["lr_scheduler_type"] = "cosine_with_min_lr"
        fields["lr_scheduler_kwargs"] = {"min_lr_rate": final}
    elif optim.scheduler == "constant":
        fields["lr_scheduler_type"] = "constant_with_warmup"
    else:
        fields["lr_scheduler_type"] = optim.scheduler
    return fields


def warmup_steps(warmup: float, steps: int) -> int:
    """Steps of the warm-up: a share of all is rounded up, and leaves one step at the peak."""
    if warmup >= 1:
        return int(warmup)
    return min(math.ceil(steps * warmup), steps - 1)


def say_if_peak_is_missed(recipe: sections.Training, steps: int, say: Say) -> None:
    """Say that the warm-up is as long as the training of so many steps, or longer."""
    warmup = warmup_steps(recipe.optim.warmup, steps)
    if warmup >= steps:
        highest = steps / (warmup + 1)
        say(
            f"warning: optim.warmup: {warmup:,} steps, and the training has {steps:,}: "
            f"the learning rate ends at {highest:.2g} of its peak"
        )


def make_scheduler(recipe: sections.Training, optimizer: Any, steps: int) -> LambdaLR:
    """The schedule of a training of so many optimizer steps; peaks are the groups' own rates."""
    warmup = warmup_steps(recipe.optim.warmup, steps)
    fields = in_transformers_words(recipe) | getattr(recipe, "trainer", {})
    theirs = get_scheduler(
        fields["lr_scheduler_type"],
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        scheduler_specific_kwargs=fields.get("lr_scheduler_kwargs"),
    )
    # `partial`, since a checkpoint keeps the attributes of any other callable
    shares = [partial(share_of_peak, warmup=warmup, then=shape) for shape in theirs.lr_lambdas]
    return LambdaLR(optimizer, shares)


def share_of_peak(step: int, *, warmup: int, then: Shape) -> float:
    """The share of the peak that `step` has, the first being 0; behind the warm-up by `then`."""
    return (step + 1) / (warmup + 1) if step < warmup else then(step)


def refuse_another_schedule(scheduler: LambdaLR, checkpoint: str) -> None:
    """Raise UserError (3) when a checkpoint that was just loaded stood at another rate.

    Versions before the one that warms up from the first step wrote such ones within the warm-up;
    behind it the rates are the same.
    """
    pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    rates = [peak * share(scheduler.last_epoch) for peak, share in pairs]
    before = scheduler.get_last_lr()
    if all(math.isclose(*pair, rel_tol=1e-9) for pair in zip(before, rates, strict=True)):
        return
    raise UserError(
        f"{checkpoint}: was written within the warm-up of another version of llmpipe: its learning "
        f"rate is {before[0]:.2e}, and here the step has {rates[0]:.2e}",
        "finish it with that version, or begin anew: --fresh moves what is there aside",
        INTEGRITY,
    )
