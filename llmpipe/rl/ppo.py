"""Proximal policy optimization (Schulman 2017) of a language model (Ziegler 2019; Ouyang 2022): a
critic says what an answer was expected to be worth, token by token, and its advantage over that is
learned from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from llmpipe.data.prepared import PreparedRows
from llmpipe.recipe.ppo import PPORecipe
from llmpipe.rl import loop, policy_gradient
from llmpipe.rl.experience import Experience, Measured
from llmpipe.rl.method import Answer, Batch, Draw, Ground, Total
from llmpipe.rl.packing import pack
from llmpipe.rl.state import State
from llmpipe.rl.watch import Metrics, RolloutSums
from llmpipe.run.job import Job
from llmpipe.run.made import Made


def train(job: Job[PPORecipe], prepared: PreparedRows) -> Made:
    """Train a policy and publish it; returns what the manifest says of it."""
    return loop.train(job, prepared, PPO)


class PPO:
    """What the loop does by PPO."""

    watched: tuple[str, ...] = (
        "loss/policy",
        "loss/value",
        "policy/approxkl",
        "policy/clipfrac",
        "policy/entropy",
        "val/ratio",
        "val/clipfrac",
    )

    def __init__(self, ground: Ground[PPORecipe], state: State):
        self.recipe = ground.recipe
        self.actors = ground.actors
        self.hardware = ground.hardware
        self.world = ground.world
        self.state = state

    def rollout(self, draw: Draw) -> Batch:
        """One answer to each prompt."""
        answers = draw(range(self.recipe.prompts), 0)
        return Batch(answers, answers, {})

    # --- judging ---

    def judge(
        self, measured: Measured, answers: Sequence[Answer], worth: Tensor
    ) -> tuple[dict[int, Experience], Metrics]:
        """Advantages over what the critic expected, of the score at the last token less the KL
        penalty at each."""
        assert measured.values is not None and measured.reference is not None
        algorithm, coefficient = self.recipe.algorithm, self.state.coefficient.value
        mask = measured.mask
        estimates = policy_gradient.kl_penalty(
            measured.log_probs, measured.reference, self.recipe.reference.estimator
        )
        kl = estimates * mask
        rewards = policy_gradient.token_rewards(self._shaped(worth), kl, mask, coefficient)
        advantages, returns = policy_gradient.advantages(
            rewards, measured.values, mask, algorithm.discount, algorithm.smoothing
        )
        if algorithm.whiten:
            advantages = policy_gradient.whitened(advantages, mask, self.world.sum)
        scores = torch.tensor([answer.score for answer in answers])
        sums = RolloutSums.of(measured, scores, worth, kl)
        totals = RolloutSums(**self.world.totals(asdict(sums)))
        metrics = totals.metrics() | totals.held(coefficient)
        fit = ValueSums.of(measured.values, returns, mask)
        metrics |= ValueSums(**self.world.totals(asdict(fit))).metrics()
        experiences = measured.experiences(
            advantages=advantages, values=measured.values, returns=returns
        )
        places = [answer.place for answer in answers]
        return dict(zip(places, experiences, strict=True)), metrics

    def _shaped(self, scores: Tensor) -> Tensor:
        """Scores by their running deviation, and clipped, where the recipe says so."""
        algorithm, moments = self.recipe.algorithm, self.state.moments
        if algorithm.normalize_scores:
            wide = scores.double()
            sums = {"count": len(wide), "total": wide.sum(), "squares": (wide**2).sum()}
            moments.add(**self.world.totals(sums))
            scores = (scores - moments.mean) / moments.deviation
        limit = algorithm.clip_scores
        return scores if limit is None else scores.clamp(-limit, limit)

    # --- learning ---

    def learn(self, chosen: Sequence[Experience], total: Total) -> dict[str, Tensor]:
        """The clipped surrogate, the entropy bonus and the critic's loss, means over the tokens of
        the minibatch."""
        algorithm, critic = self.recipe.algorithm, self.recipe.critic
        batch = pack([each.text for each in chosen])
        old = torch.cat([each.old for each in chosen])
        advantages = torch.cat([each.advantages for each in chosen])
        returns = torch.cat([each.returns for each in chosen])
        before = torch.cat([each.values for each in chosen])
        with self.hardware.autocast():
            log_probs, entropy, values = self.actors.policy(batch)
        losses, metrics = policy_gradient.policy_losses(
            log_probs - old, advantages, algorithm.clip, algorithm.clip
        )
        loss = losses.sum()
        objective = loss - algorithm.entropy * entropy.sum() if algorithm.entropy else loss
        if values is None:
            # one graph after the other: activations of both models need not exist at once
            (objective / total.tokens).backward()
            objective = 0.0
        with self.actors.as_critic():  # the backward pass, too, may compute the layers again
            if values is None:
                with self.hardware.autocast():
                    values = self.actors.values(batch)
            value_loss, more = policy_gradient.value_loss(values, before, returns, critic.clip)
            ((objective + critic.coefficient * value_loss) / total.tokens).backward()
        return {
            **metrics,
            **more,
            "loss/policy": loss,
            "loss/value": value_loss,
            "policy/entropy": entropy.sum(),
        }

    def loss(self, means: Metrics) -> float:
        return means["loss/policy"] + self.recipe.critic.coefficient * means["loss/value"]


@dataclass(frozen=True)
class ValueSums:
    """Sums over the tokens of a rollout: of this process, or of all."""

    tokens: float
    squared_errors: float
    """Of the values."""
    returns: float
    squared_returns: float

    @classmethod
    def of(cls, values: Tensor, returns: Tensor, mask: Tensor) -> ValueSums:
        """Each [episodes, tokens]."""
        return cls(
            tokens=float(mask.sum()),
            squared_errors=float(((returns - values) ** 2 * mask).sum()),
            returns=float((returns * mask).sum()),
            squared_returns=float((returns.double() ** 2 * mask).sum()),
        )

    def metrics(self) -> Metrics:
        """1 - the values' mean squared error by the returns' variance."""
        variance = self.squared_returns / self.tokens - (self.returns / self.tokens) ** 2
        explained = 1 - self.squared_errors / self.tokens / variance if variance > 0 else 0.0
        return {"val/explained_variance": explained}
