"""A reward model from pairs: TRL's RewardTrainer, and what the trained model's scores are worth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl import RewardTrainer
from trl.trainer.utils import pad

from llmpipe import screen
from llmpipe.evaluation.statistics import RESAMPLES, bootstrapped, wilson
from llmpipe.parallel.parts import looking
from llmpipe.training.heldout import Batch, Measure, Sum
from llmpipe.training.hosted import Durable
from llmpipe.training.laid import told
from llmpipe.training.preferences import Pair, Preferences, real_pairs
from llmpipe.training.training import Training

BUCKETS = 4  # of calibration
SCORED = 1000  # pairs at most


class RankingTrainer(Durable, Preferences, RewardTrainer):
    """TRL's RewardTrainer, durable, which keeps the scores of its last evaluation."""

    def __init__(self, training: Training[Any], measure: Measure, **arguments: Any):
        super().__init__(training, measure, **arguments)
        if training.hardware.device == "cuda" or training.hardware.compiles:
            self._tell_places()
        self.batches: list[Tensor] = []
        """Scores of this process's batches in an evaluation, float32 [pairs, 2] each."""
        self.evaluated: tuple[int, np.ndarray] | None = None
        """A step, and the scores of all held-out pairs then."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Durable.evaluate`; the scores are kept."""
        self.batches = []
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        lengths = [len(batch) for batch in self.batches]
        mine = torch.cat(self.batches).double().cpu().split(lengths)  # one look at the device
        scores = in_order(self.world.gather(mine), len(self.eval_dataset))
        self.evaluated = (self.state.global_step, scores)
        return metrics


def in_order(ranks: list[tuple[Tensor, ...]], count: int) -> np.ndarray:
    """Scores of `count` pairs by every process's batches, of which each had one in turn; those that
    had none left had a filler in the last turn. float64 [count, 2]."""
    batches = [batch for turn in zip(*ranks, strict=True) for batch in turn]
    return torch.cat(batches)[:count].numpy()


class Collator:
    """Pairs to a batch: chosen responses in the first half of its rows, rejected ones in the other.

    `examples` says how many are real; where all are fillers one of them stays, since every process
    has to take part.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, pairs: list[Pair]) -> Batch:
        real = real_pairs(pairs)
        used = real or pairs[:1]
        rows = [
            torch.tensor(pair["prompt_ids"] + pair[side])
            for side in ("chosen_ids", "rejected_ids")
            for pair in used
        ]
        ones = [torch.ones_like(row) for row in rows]
        return {
            "input_ids": pad(rows, padding_value=self.pad_token_id, padding_side="right"),
            "attention_mask": pad(ones, padding_value=0, padding_side="right"),
            "margin": torch.tensor([pair["margin"] if real else 0.0 for pair in used]),
            "examples": len(real),
        }


def _scores(trainer: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of the chosen and of the rejected responses, float32 [pairs] each."""
    outputs = trainer.model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        **told(batch),
        use_cache=False,
    )
    chosen, rejected = outputs.logits.float().squeeze(-1).chunk(2)
    return chosen, rejected


def ranking(trainer: Any, batch: Batch) -> dict[str, Sum]:
    """Bradley-Terry loss in nats per pair (Christiano 2017, eq. 1), share ranked right, margin."""
    chosen, rejected = _scores(trainer, batch)
    trainer.batches.append(torch.stack([chosen, rejected], 1))
    difference, count = chosen - rejected, len(chosen)
    center = trainer.args.center_rewards_coefficient * (chosen + rejected) ** 2
    loss = -logsigmoid(difference - batch["margin"]) + center
    right = (difference > 0).double() + 0.5 * (difference == 0)
    return {
        "loss": (loss.sum(), count),
        "accuracy": (right.sum(), count),
        "margin": (difference.sum(), count),
    }


def score(trainer: RankingTrainer, rows: Dataset, most: int = SCORED) -> np.ndarray:
    """Scores of `most` pairs, evenly spread over the rows, or of all; every process has them all.

    `rows`: the held-out ones, whose scores are known where they were measured of what is
    published, or others. Returns float64 [pairs, 2]: chosen, rejected.
    """
    places = np.linspace(0, len(rows) - 1, min(len(rows), most)).round().astype(int)
    step, scores = trainer.evaluated or (None, np.empty(0))
    if step == trainer.published_step:
        return scores[places]
    return _scored(trainer, [rows[place] for place in places.tolist()])


@screen.doing("scoring pairs")
def _scored(trainer: RankingTrainer, rows: list[Pair]) -> np.ndarray:
    """Scores of pairs, float64 [pairs, 2]."""
    size = trainer.args.per_device_eval_batch_size
    scores = []
    trainer.model.eval()
    for start in range(0, len(rows), size):
        pairs = rows[start : start + size]
        batch = trainer._prepare_inputs(trainer.data_collator(pairs))
        with torch.no_grad(), trainer.hardware.autocast(), looking(trainer.model):
            both = torch.stack(_scores(trainer, batch), 1)
        scores.append(both.double().cpu().numpy())
    return np.concatenate(scores)


@dataclass(frozen=True)
class Bucket:
    """Pairs of about the same margin, and how often the model is right on them."""

    margin_up_to: float
    accuracy: float
    n: int


@dataclass(frozen=True)
class Ranking:
    """What scores say of a reward model, as the manifest has it."""

    n: int
    accuracy: float
    """How often the chosen response is ahead; a tie is half."""
    accuracy_interval: tuple[float, float]
    margin: float
    """By how much, on average."""
    margin_interval: tuple[float, float] | None
    """None of too few pairs."""
    calibration: list[Bucket]
    """Whether a larger margin is right more often."""
    reward_mean: float
    """What scores in PPO can be compared with."""
    reward_std: float
    held_out: bool
    """Whether the pairs are others than those that were trained on."""

    def __str__(self) -> str:
        low, high = self.accuracy_interval
        which = "held out" if self.held_out else "trained on: there are none held out"
        return (
            f"ranked right: {self.accuracy:.3f} [{low:.3f}, {high:.3f}] of {self.n:,} pairs "
            f"{which}; rewards {self.reward_mean:.3f} +- {self.reward_std:.3f}"
        )


def describe(scores: np.ndarray, seed: int, *, held_out: bool) -> Ranking:
    """What scores, float64 [pairs, 2], say of a reward model."""
    margins = scores[:, 0] - scores[:, 1]
    right = (margins > 0) + 0.5 * (margins == 0)
    resampled = np.random.default_rng(seed).choice(margins, (RESAMPLES, len(margins))).mean(1)
    margin_interval = bootstrapped(resampled, len(margins))
    by_size = np.array_split(np.argsort(np.abs(margins)), BUCKETS)
    return Ranking(
        n=len(margins),
        accuracy=float(right.mean()),
        accuracy_interval=wilson(float(right.sum()), len(margins)),
        margin=float(margins.mean()),
        margin_interval=margin_interval if math.isfinite(sum(margin_interval)) else None,
        calibration=[_bucket(margins[part], right[part]) for part in by_size if len(part)],
        reward_mean=float(scores.mean()),
        reward_std=float(scores.std()),
        held_out=held_out,
    )


def _bucket(margins: np.ndarray, right: np.ndarray) -> Bucket:
    return Bucket(float(np.abs(margins).max()), float(right.mean()), len(margins))
