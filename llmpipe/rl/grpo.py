"""Group relative policy optimization (Shao 2024) and its kin: several answers to one prompt, each
judged by the others, so that no critic is needed. The equations are in `group_relative`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from llmpipe.data.prepared import PreparedRows
from llmpipe.recipe.grpo import GRPORecipe
from llmpipe.rl import group_relative, loop, policy_gradient
from llmpipe.rl.experience import Experience, Measured
from llmpipe.rl.method import Answer, Batch, Draw, Ground, Total, worths
from llmpipe.rl.packing import pack, sent
from llmpipe.rl.state import State
from llmpipe.rl.watch import Metrics, RolloutSums
from llmpipe.run.job import Job
from llmpipe.run.made import Made

ROUNDS = 10  # in which prompts are drawn in the place of those without spread


def train(job: Job[GRPORecipe], prepared: PreparedRows) -> Made:
    """Train a policy and publish it; returns what the manifest says of it."""
    return loop.train(job, prepared, GRPO)


class GRPO:
    """What the loop does by GRPO."""

    def __init__(self, ground: Ground[GRPORecipe], state: State):
        self.recipe = ground.recipe
        self.actors = ground.actors
        self.hardware = ground.hardware
        self.world = ground.world
        self.state = state
        self.in_loss = self.recipe.has_reference and self.recipe.reference.place == "loss"
        self.watched = (
            "loss/policy",
            *(("loss/kl",) if self.in_loss else ()),
            "policy/approxkl",
            "policy/clipfrac",
            "policy/entropy",
            "val/ratio",
        )
        self.verifier = next(
            (i for i, source in enumerate(self.recipe.reward) if source.tells_right), None
        )
        """Which source of reward says what is right, where one does."""

    # --- drawing ---

    def rollout(self, draw: Draw) -> Batch:
        """A group of answers to each prompt. Where the recipe says so, a group without spread makes
        way for one of the next prompt, and what still has none in the end is skipped."""
        without_spread, prompts = self.recipe.rollout.without_spread, self.recipe.prompts
        kept: dict[int, Answer] = {}
        drawn: list[Answer] = []
        groups = Groups()
        slots, asked = list(range(prompts)), 0
        for _ in range(1 + (ROUNDS if without_spread == "resample" else 0)):
            answers = draw(slots, asked)
            asked += len(slots)
            drawn += answers
            kept |= {answer.place: answer for answer in answers}
            worth, score, right = self._of_all(answers, self._told(answers))[:, slots]
            groups.add(worth, score, right)
            spread = group_relative.have_spread(worth).tolist()
            slots = [slot for slot, has in zip(slots, spread, strict=True) if not has]
            if not slots:
                break
        skipped = 0 if without_spread == "keep" else len(slots)
        self.state.replaced += asked - prompts
        self.state.skipped += skipped
        metrics = groups.metrics(knows_right=self.verifier is not None)
        return Batch(list(kept.values()), drawn, metrics | {"groups/skipped": float(skipped)})

    def _told(self, answers: Sequence[Answer]) -> Tensor:
        """What each answer is worth, what it scored, and whether it is right, float64
        [3, answers]."""
        by_source = [list(answer.by_source.values()) for answer in answers]
        right = [self.verifier is not None and each[self.verifier] == 1 for each in by_source]
        scores = [answer.score for answer in answers]
        told = torch.tensor([scores, scores, right], dtype=torch.float64)
        told[0] = worths(answers, self.recipe)
        return told

    def _of_all(self, answers: Sequence[Answer], values: Tensor) -> Tensor:
        """`values` [kinds, answers] of this process's answers, from all processes by their places,
        and 0 where nobody has an answer: [kinds, prompts, group]. Every process then computes the
        same of a group, whoever drew it."""
        places = [answer.place for answer in answers]
        table = torch.zeros(len(values), self.recipe.optim.batch_size, dtype=torch.float64)
        table[:, places] = values.double()
        return self.world.sum(table).unflatten(1, (-1, self.recipe.group))

    # --- judging ---

    def judge(
        self, measured: Measured, answers: Sequence[Answer], worth: Tensor
    ) -> tuple[dict[int, Experience], Metrics]:
        """The advantage of an answer is that of each of its tokens."""
        recipe, coefficient = self.recipe, self.state.coefficient.value
        kl = self._kl(measured)
        rewards = worth if self.in_loss else worth - coefficient * kl.sum(1)
        worth_of_all, rewards_of_all = self._of_all(answers, torch.stack([worth, rewards]))
        advantages = group_relative.advantages(
            rewards_of_all, recipe.algorithm.baseline, recipe.algorithm.normalize
        )
        places = [answer.place for answer in answers]
        mask = measured.mask
        columns = {"advantages": advantages.flatten()[places].to(mask)[:, None] * mask}
        if self.in_loss:
            assert measured.reference is not None
            columns["reference"] = measured.reference
        experiences = dict(zip(places, measured.experiences(**columns), strict=True))
        if recipe.rollout.without_spread != "keep":
            spread = group_relative.have_spread(worth_of_all).tolist()
            experiences = {
                place: each for place, each in experiences.items() if spread[place // recipe.group]
            }
        scores = torch.tensor([answer.score for answer in answers])
        sums = RolloutSums.of(measured, scores, worth, kl)
        totals = RolloutSums(**self.world.totals(asdict(sums)))
        held = totals.held(coefficient) if recipe.has_reference else {}
        return experiences, totals.metrics() | held

    def _kl(self, measured: Measured) -> Tensor:
        """Estimates of the KL from the reference, as the penalty has them, [episodes, tokens]; 0
        where there is none."""
        if measured.reference is None:
            return torch.zeros_like(measured.mask)
        estimator = "k3" if self.in_loss else "k1"
        log_probs, reference = measured.log_probs, measured.reference
        return policy_gradient.kl_penalty(log_probs, reference, estimator) * measured.mask

    # --- learning ---

    def learn(self, chosen: Sequence[Experience], total: Total) -> dict[str, Tensor]:
        """The clipped surrogate, the KL penalty where it is in the loss, and the entropy bonus,
        each token by its weight in the minibatch."""
        algorithm = self.recipe.algorithm
        batch = pack([each.text for each in chosen])
        lengths = [len(each.old) for each in chosen]
        old = torch.cat([each.old for each in chosen])
        advantages = torch.cat([each.advantages for each in chosen])
        weights = group_relative.weights(lengths, algorithm.loss, total, self.recipe.max_response)
        weights = sent(weights.to(old.dtype), old.device)
        with self.hardware.autocast():
            log_probs, entropy, _ = self.actors.policy(batch)
        log_ratio = by_token = log_probs - old
        if algorithm.ratio == "sequence":
            log_ratio = group_relative.of_sequences(by_token, lengths)
        high = algorithm.clip if algorithm.clip_high is None else algorithm.clip_high
        losses, metrics = policy_gradient.policy_losses(log_ratio, advantages, algorithm.clip, high)
        objective = loss = (losses * weights).sum()
        if algorithm.entropy:
            objective = objective - algorithm.entropy * (entropy * weights).sum()
        if self.in_loss:
            reference = torch.cat([each.reference for each in chosen])
            estimates = policy_gradient.kl_penalty(log_probs, reference, "k3")
            kl = (estimates * weights).sum()
            metrics["loss/kl"] = kl * total.tokens
            objective = objective + self.state.coefficient.value * kl
        objective.backward()
        return {
            **metrics,
            "policy/approxkl": policy_gradient.moved(by_token),
            "policy/entropy": entropy.sum(),
            "loss/policy": loss * total.tokens,
        }

    def loss(self, means: Metrics) -> float:
        return means["loss/policy"] + self.state.coefficient.value * means.get("loss/kl", 0.0)


@dataclass
class Groups:
    """What the groups of an update are like, those as well that made way."""

    count: int = 0
    mixed: int = 0
    """Whose answers have several scores."""
    all_right: int = 0
    none_right: int = 0
    scores: float = 0.0
    """The sum of the groups' means."""

    def add(self, worth: Tensor, score: Tensor, right: Tensor) -> None:
        """Of groups, [groups, group] each; `right` is 1 or 0."""
        self.count += len(worth)
        self.mixed += int(group_relative.have_spread(worth).sum())
        self.all_right += int(right.all(1).sum())
        self.none_right += int((~right.any(1)).sum())
        self.scores += float(score.mean(1).sum())

    def metrics(self, *, knows_right: bool) -> Metrics:
        """Shares of the groups; `knows_right`: whether a reward tells what is right."""
        shares = {"mixed": self.mixed}
        if knows_right:
            shares |= {"all_right": self.all_right, "none_right": self.none_right}
        metrics = {f"groups/{name}": number / self.count for name, number in shares.items()}
        return {
            **metrics,
            "groups/drawn": float(self.count),
            "objective/scores": self.scores / self.count,
        }
