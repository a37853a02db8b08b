"""What is worth watching while a policy learns."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from llmpipe.errors import NUMERIC, Say, UserError
from llmpipe.rl.experience import Measured

Metrics = dict[str, float]  # by the name that metrics.jsonl has

TELLING = 10  # updates of one score alone that are no accident


def not_finite(step: int, name: str, value: float) -> UserError:
    """What stops a training before the optimizer sees it; `step`: updates that are done."""
    return UserError(
        f"step {step + 1}: {name} is {value}; stopped before the optimizer step",
        "lower optim.learning_rate, or set optim.precision: fp32; "
        "nothing was published, checkpoints are kept",
        NUMERIC,
    )


@dataclass
class Sameness:
    """Whether every response so far had one score, from which nothing can be learned."""

    score: float | None = None
    """The one score; None: no update is done, or scores differed."""
    updates: int = 0
    """Whose responses all had it."""
    differed: bool = False

    def add(self, lowest: float, highest: float) -> None:
        """The scores of one update."""
        if self.differed or lowest != highest or (self.updates and lowest != self.score):
            self.differed, self.score, self.updates = True, None, 0
            return
        self.score = lowest
        self.updates += 1

    @property
    def shown(self) -> str:
        return f"every answer of {self.updates} updates scored {self.score:g}"

    def refuse(self) -> None:
        """Raises UserError (4) where a training of many updates was given one score alone."""
        if self.updates >= TELLING:
            hint = "nothing was published; read rollouts.jsonl, and mend the reward or the prompts"
            raise UserError(f"{self.shown}: nothing was learned", hint, NUMERIC)


@dataclass(frozen=True)
class RolloutSums:
    """Sums over the episodes and tokens of a rollout: of this process, or of all."""

    episodes: float
    tokens: float
    kl: float
    """k1 estimates, whatever the penalty is made of; 0 without a reference."""
    penalty: float
    """KL estimates of the penalty, before its coefficient."""
    entropy: float
    scores: float
    squared_scores: float
    raw_scores: float
    """With what `rollout.unfinished` adds, before they are normalized and clipped."""
    ended: float
    rollout_difference: float

    @classmethod
    def of(cls, measured: Measured, scores: Tensor, raw_scores: Tensor, kl: Tensor) -> RolloutSums:
        """`scores` and `raw_scores` [episodes]; `kl`, of the penalty, [episodes, tokens]."""
        mask = measured.mask
        reference = measured.log_probs if measured.reference is None else measured.reference
        return cls(
            episodes=len(measured.episodes),
            tokens=float(mask.sum()),
            kl=float(((measured.log_probs - reference) * mask).sum()),
            penalty=float(kl.sum()),
            entropy=float(measured.entropies.sum()),
            scores=float(scores.sum()),
            squared_scores=float((scores.double() ** 2).sum()),
            raw_scores=float(raw_scores.sum()),
            ended=float(measured.ended.sum()),
            rollout_difference=measured.rollout_difference,
        )

    def held(self, coefficient: float) -> Metrics:
        """How far from the reference, and what a penalty of this coefficient makes of it; means
        over episodes."""
        penalty = coefficient * (self.penalty / self.episodes)
        return {
            "objective/kl": self.kl / self.episodes,
            "objective/non_score_reward": -penalty,
            "objective/rlhf_reward": self.raw_scores / self.episodes - penalty,
        }

    def metrics(self) -> Metrics:
        """What else there is to say; means over episodes and tokens."""
        score = self.scores / self.episodes
        variance = self.squared_scores / self.episodes - score**2
        return {
            "objective/scores": score,
            "objective/scores_std": math.sqrt(max(variance, 0)),
            "objective/entropy": self.entropy / self.tokens,
            "val/rollout_difference": self.rollout_difference / self.tokens,
            "answers/tokens": self.tokens / self.episodes,
            "answers/ended": self.ended / self.episodes,
        }


@dataclass(frozen=True)
class _Sign:
    """Of a policy that games its reward."""

    name: str
    metric: str
    shown: bool


PARTIAL = (
    "KL: answers are drawn from a part of the distribution (top_k, top_p), which the reference "
    "knows nothing of: it is above zero even where policy and reference are one model"
)
NEGATIVE = (
    "KL below zero: it is the mean of log p/q over what was drawn (k1), which varies around the "
    "true one; that one is near zero yet"
)


def warn(line: Metrics, first: Metrics, target: float | None, warned: list[str], say: Say) -> None:
    """Say once what looks like a policy that games its reward (Gao 2022; Stiennon 2020, section
    4.3), and add it to `warned`.

    `first`: the metrics of the first update; `target`: nats per answer that the recipe steers to.
    """
    kl, tokens, entropy = "objective/kl", "answers/tokens", "objective/entropy"
    nats, before = line.get(kl, 0.0), first.get(kl, 0.0)  # without a reference there is none
    if nats < 0 and NEGATIVE not in warned:
        warned.append(NEGATIVE)
        say(NEGATIVE)
    # more turns are no longer answers
    length, at_first = (each[tokens] / each.get("turns/policy", 1.0) for each in (line, first))
    signs = [
        _Sign("KL ran away", kl, nats - max(before, 0) > 4 * (target or 12.5)),
        _Sign("answers grow", tokens, length > 2 * at_first + 8),
        _Sign("answers shrink", tokens, length < 0.4 * at_first - 1),
        _Sign("entropy collapsed", entropy, line[entropy] < 0.1 * first[entropy]),
    ]
    for sign in signs:
        if sign.shown and sign.name not in warned:
            warned.append(sign.name)
            before, now = first[sign.metric], line[sign.metric]
            say(
                f"warning: {sign.name}: {sign.metric} {before:.2f} at first, {now:.2f} now; read "
                "rollouts.jsonl, raise reference.coefficient, or lower optim.learning_rate"
            )
