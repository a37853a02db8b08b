"""A policy that learns from pairs without a reference: SimPO and ORPO, in TRL's DPOTrainer.

Both compare the mean log-probability of a token of two answers. TRL has them in experimental
trainers alone, and takes ORPO's likelihood over all tokens of a micro-batch, prompts among them.
Here every term is of one pair, over the tokens that its answers teach, and the loss is the mean
over the pairs of a step: how the step is cut changes nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl import DPOTrainer

from llmpipe import upstream
from llmpipe.training.heldout import Batch, Measure, Sum, as_sum
from llmpipe.training.hosted import Durable
from llmpipe.training.preferences import Preferences, scored
from llmpipe.training.reference import forget
from llmpipe.training.training import Training

DECLINED = 1.5
"""Times the log-probability of a chosen token before: below that something is wrong."""


class Likelihoods(NamedTuple):
    """Mean log-probabilities of the tokens of answers, in nats: [pairs] each."""

    chosen: Tensor
    rejected: Tensor


class SimPO(NamedTuple):
    """Meng 2024, eq. 6."""

    beta: float
    gamma: float

    def margins(self, of: Likelihoods) -> Tensor:
        """Rewards of chosen answers (eq. 4) less those of rejected ones, [pairs]."""
        return self.beta * (of.chosen - of.rejected)

    def losses(self, of: Likelihoods) -> Tensor:
        """[pairs]"""
        return -logsigmoid(self.margins(of) - self.gamma)


class ORPO(NamedTuple):
    """Hong 2024, eqs. 6 and 7; beta is called lambda there."""

    beta: float

    def margins(self, of: Likelihoods) -> Tensor:
        """beta times the log odds ratios, [pairs]."""
        return self.beta * (log_odds(of.chosen) - log_odds(of.rejected))

    def losses(self, of: Likelihoods) -> Tensor:
        """[pairs]"""
        ratios = log_odds(of.chosen) - log_odds(of.rejected)
        return -of.chosen - self.beta * logsigmoid(ratios)


def log_odds(log_probs: Tensor) -> Tensor:
    """log p / (1 - p); a p that rounds to 1 is taken for the next lower number."""
    below = log_probs.clamp(max=-torch.finfo(log_probs.dtype).eps)
    return below - torch.log(-torch.expm1(below))


class ReferenceFreeTrainer(Durable, Preferences, DPOTrainer):
    """TRL's DPOTrainer, durable, that neither loads a reference nor computes one."""

    watched = ("entropy", "mean_logits", "is_top1")

    def __init__(
        self,
        training: Training[Any],
        measure: Measure,
        *,
        objective: SimPO | ORPO,
        **arguments: Any,
    ):
        self.objective = objective
        with upstream.hashing_models(lambda _: ""):
            super().__init__(training, measure, **arguments)
        forget(self.model)
        if training.hardware.device == "cuda" or training.hardware.compiles:
            self._tell_targets(training.hardware.autocast)

    def _precompute_ref_logps(self, dataset: Any, *args: Any) -> Any:
        """As it is: there is nothing to compute."""
        return dataset

    def _compute_loss(self, model: Any, inputs: Batch, return_outputs: bool) -> Tensor:
        """The mean over the pairs of a micro-batch, in place of TRL's."""
        routing: dict[str, Any] = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = scored(model, inputs, **routing)
        likelihoods = per_token(outputs.log_probs, inputs["completion_mask"])
        loss = self.objective.losses(likelihoods).mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            mean = self.accelerator.reduce(outputs.aux_loss.detach(), "mean")
            self._metrics["train"]["aux_loss"].append(mean)
        self._watch(outputs, likelihoods, inputs)
        return loss

    @torch.no_grad()
    def _watch(self, outputs: Any, likelihoods: Likelihoods, inputs: Batch) -> None:
        """Note of a micro-batch of all processes what TRL notes, by its names, and what is
        compared in place of rewards."""
        mask = inputs["completion_mask"][:, 1:]
        chosen, rejected = mask.chunk(2)
        chosen_logits, rejected_logits = outputs.mean_logits.chunk(2)
        top1, _ = outputs.is_top1.chunk(2)
        sums: dict[str, Sum] = {
            "num_tokens": (inputs["attention_mask"].sum(), 1),
            "entropy": ((outputs.entropy * mask).sum(), mask.sum()),
            "logits/chosen": ((chosen_logits * chosen).sum(), chosen.sum()),
            "logits/rejected": ((rejected_logits * rejected).sum(), rejected.sum()),
            "mean_token_accuracy": ((top1 * chosen).sum(), chosen.sum()),
            **compared(self.objective, outputs.log_probs, likelihoods),
        }
        together = torch.stack([as_sum(*each) for each in sums.values()])
        totals = dict(zip(sums, self.accelerator.reduce(together, "sum"), strict=True))
        read, _ = totals.pop("num_tokens")
        self._total_train_tokens = self._total_train_tokens + read
        averages = self._metrics["train"]
        averages["num_tokens"] = [self._total_train_tokens]
        for name, (value, count) in totals.items():
            averages[name].append(value / count)


def per_token(log_probs: Tensor, completion_mask: Tensor) -> Likelihoods:
    """Of TRL's batch, chosen answers first: log_probs [2 pairs, tokens - 1], 0 where nothing is
    learned; completion_mask [2 pairs, tokens]."""
    lengths = completion_mask[:, 1:].sum(1)
    return Likelihoods(*(log_probs.sum(1) / lengths).chunk(2))


def separation(trainer: ReferenceFreeTrainer, batch: Batch) -> dict[str, Sum]:
    """The objective on held-out pairs, and how far the policy tells their answers apart."""
    log_probs = scored(trainer.model, batch).log_probs
    likelihoods = per_token(log_probs, batch["completion_mask"])
    losses = trainer.objective.losses(likelihoods)
    return {
        "loss": (losses.sum(), len(losses)),
        **compared(trainer.objective, log_probs, likelihoods),
    }


def compared(
    objective: SimPO | ORPO, log_probs: Tensor, likelihoods: Likelihoods
) -> dict[str, Sum]:
    """What is said of a batch, by TRL's names; a pair is told apart where the margin is above 0."""
    margins = objective.margins(likelihoods)
    right = (margins > 0).double() + 0.5 * (margins == 0)
    chosen, rejected = log_probs.sum(1).chunk(2)
    count = len(margins)
    return {
        "rewards/accuracies": (right.sum(), count),
        "rewards/margins": (margins.sum(), count),
        "logps/chosen": (chosen.sum(), count),
        "logps/rejected": (rejected.sum(), count),
        "logps_per_token/chosen": (likelihoods.chosen.sum(), count),
        "logps_per_token/rejected": (likelihoods.rejected.sum(), count),
    }


class Decline(NamedTuple):
    """Log-probabilities of a token of chosen answers."""

    before: float
    after: float


def decline(lines: list[dict[str, Any]]) -> Decline | None:
    """How far the log-probability of chosen tokens fell, if it fell too far; of held-out pairs
    where there are any. `lines`: of metrics.jsonl.
    """
    for prefix in ("eval_", ""):
        name = f"{prefix}logps_per_token/chosen"
        if values := [line[name] for line in lines if name in line]:
            seen = Decline(values[0], values[-1])
            return seen if seen.after < DECLINED * seen.before else None
    return None
