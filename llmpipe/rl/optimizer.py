"""The optimizer of a loop that is llmpipe's own, by transformers' rules, and its learning rate: the
section `optim` of a recipe means what it means where the loop is TRL's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from llmpipe.parallel.tensors import is_part
from llmpipe.recipe.optimizers import OPTIMIZERS
from llmpipe.recipe.ppo import PPORecipe
from llmpipe.recipe.reinforcement import RLRecipe
from llmpipe.rl.actors import CRITIC, Actors
from llmpipe.training.schedule import make_scheduler


def of_critic(name: str) -> bool:
    """Whether a parameter is the critic's."""
    return name.startswith((f"{CRITIC}.", "value.")) or f".{CRITIC}." in name


def make_optimizer(actors: Actors, recipe: RLRecipe) -> Any:
    """AdamW of what learns: the policy, and a critic with a learning rate of its own."""
    optim = recipe.optim
    groups = _groups(actors, recipe)
    options = {
        "lr": optim.learning_rate,
        "betas": (optim.beta1, optim.beta2),
        "eps": optim.epsilon,
    }
    name = OPTIMIZERS[optim.optimizer].in_bitsandbytes
    if name is None:
        return torch.optim.AdamW(groups, **options, fused=True)
    import bitsandbytes

    return getattr(bitsandbytes.optim, name)(groups, **options)


def _groups(actors: Actors, recipe: RLRecipe) -> list[dict[str, Any]]:
    """What learns, by its learning rate and by whether it decays: norms and biases do not, as in
    every other stage. What is in parts and what is not take no step together."""
    optim = recipe.optim
    # the method is a function of its argument alone: it reads nothing of a trainer
    decaying = set(Trainer.get_decay_parameter_names(None, actors.modules))
    of_its_own = recipe.critic.learning_rate if isinstance(recipe, PPORecipe) else None
    rates = {False: optim.learning_rate, True: of_its_own or optim.learning_rate}
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for name, weight in actors.learned().items():
        kind = (of_critic(name), name in decaying, is_part(weight))
        groups.setdefault(kind, []).append(weight)
    return [
        {
            "params": weights,
            "lr": rates[critic],
            "weight_decay": optim.weight_decay if decays else 0.0,
        }
        for (critic, decays, _), weights in groups.items()
    ]


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the step, so that it has no state to keep."""

    optimizer: Any
    scheduler: Any
    """A LambdaLR: a peak and a function of the step for every group."""

    @classmethod
    def of(cls, optimizer: Any, recipe: RLRecipe, steps: int) -> Schedule:
        """`steps`: of the whole training."""
        return cls(optimizer, make_scheduler(recipe, optimizer, steps))

    def set_rate(self, step: int) -> float:
        """Set the rates of a step, the first being 0, and return the first group's."""
        peaks, shares = self.scheduler.base_lrs, self.scheduler.lr_lambdas
        rates = [peak * share(step) for peak, share in zip(peaks, shares, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return float(rates[0])
