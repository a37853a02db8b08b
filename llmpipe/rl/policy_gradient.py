"""The equations of PPO for language models, as functions of tensors; `group_relative` has what GRPO
has in their place.

An episode is one answer; a step of it is a token y_t in the state s_t = prompt, y_1 ... y_(t-1).
Episodes of several lengths lie in [episodes, tokens] with a mask that is 1 for their tokens; losses
take flat [tokens].

Of an episode of several turns these are the policy's own tokens, one turn's behind another's. What
an environment says in between is no step: it is part of the state of the tokens behind it, as if it
were drawn by the world. So no loss, mean or count has a place for it, and an advantage goes from
the last token of a turn straight to the first of the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def kl_penalty(log_probs: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Estimates of KL(policy || reference) from tokens that the policy drew, any shape (Schulman
    2020, http://joschu.net/blog/kl-approx.html): k1 = log p/q, k3 = q/p - 1 + log p/q."""
    log_ratio = log_probs - reference
    return log_ratio if estimator == "k1" else torch.expm1(-log_ratio) + log_ratio


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """-coefficient x KL at every token, and at the last one the answer's score too (Ziegler 2019,
    eq. 2).

    scores [episodes], kl and mask [episodes, tokens] -> [episodes, tokens].
    """
    rewards = -coefficient * kl * mask
    rewards[torch.arange(len(scores)), mask.sum(1).long() - 1] += scores
    return rewards


def advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, discount: float, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimates and returns (Schulman 2016, eq. 16), [episodes, tokens] each.

    delta_t = r_t + discount V(s_(t+1)) - V(s_t), and nothing follows the last token; A_t = delta_t
    + discount smoothing A_(t+1); the return is A_t + V(s_t). At the end of a turn t + 1 is the next
    turn's first token, and s_(t+1) has what the environment said: discount and smoothing count the
    policy's own tokens alone.
    """
    estimates = torch.zeros_like(rewards)
    next_value = torch.zeros(len(rewards))
    next_advantage = torch.zeros(len(rewards))
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + discount * next_value - values[:, t]
        next_advantage = (delta + discount * smoothing * next_advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        estimates[:, t] = next_advantage
    return estimates, (estimates + values) * mask


def whitened(values: Tensor, mask: Tensor, add: Callable[[Tensor], Tensor]) -> Tensor:
    """`values` under `mask` with mean 0 and deviation 1. `add` sums a tensor over processes."""
    count, total = add(torch.stack([mask.sum(), (values * mask).sum()]).double())
    mean = total / count
    squares = add((((values - mean) ** 2) * mask).sum().double())
    return ((values - mean) * torch.rsqrt(squares / count + 1e-8) * mask).to(values.dtype)


def policy_losses(
    log_ratio: Tensor, advantage: Tensor, low: float, high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate of every token (Schulman 2017, eq. 7), [tokens], and sums of what is
    worth watching. The ratio is held in [1 - low, 1 + high]: one bound there, two in DAPO (Yu 2025,
    eq. 10)."""
    ratio = log_ratio.exp()
    free = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - low, 1 + high)
    with torch.no_grad():
        watched = {
            "policy/approxkl": moved(log_ratio),
            "policy/clipfrac": (clipped > free).sum(),
            "val/ratio": ratio.sum(),
        }
    return torch.maximum(free, clipped), watched


def moved(log_ratio: Tensor) -> Tensor:
    """How far the policy is from what drew the tokens: k3 of each, summed."""
    with torch.no_grad():
        return (torch.expm1(log_ratio) - log_ratio).sum()


def value_loss(
    values: Tensor, old: Tensor, returns: Tensor, clip: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error, of the worse of the value and the value held within `clip` of the old
    one, summed over tokens (Huang 2024, detail 9 of PPO's)."""
    free = (values - returns) ** 2
    if clip is None:
        return 0.5 * free.sum(), {"val/clipfrac": free.new_zeros(())}
    clipped = (old + (values - old).clamp(-clip, clip) - returns) ** 2
    return 0.5 * torch.maximum(free, clipped).sum(), {"val/clipfrac": (clipped > free).sum()}


@dataclass
class Coefficient:
    """The weight of the KL penalty: fixed, or steered towards `target` nats per answer (Ziegler
    2019, section 2.2)."""

    value: float
    target: float | None
    horizon: int

    def adapt(self, kl: float, episodes: int) -> None:
        """Move by the KL, nats per answer, of so many episodes."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * episodes / self.horizon


@dataclass
class Moments:
    """Mean and deviation of every score so far (Chan 1979)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, count: float, total: float, squares: float) -> None:
        """`squares`: the sum of the squares of `count` scores whose sum is `total`."""
        mean = total / count
        all_count = self.count + count
        shift = mean - self.mean
        self.squares += squares - count * mean**2 + shift**2 * self.count * count / all_count
        self.mean += shift * count / all_count
        self.count = all_count

    @property
    def deviation(self) -> float:
        return math.sqrt(max(self.squares / max(self.count - 1, 1), 1e-8))
