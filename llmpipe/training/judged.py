"""A policy that learns from judged responses against its parent: TRL's KTOTrainer.

KTO (Ethayarajh 2024, eqs. 7 and 8) holds the log-ratio of a response against z, an estimate of
KL(policy || reference) from responses to other prompts. TRL takes the mean of a micro-batch for it;
here z is the mean of the whole step, so that how a step is cut changes nothing, and on held-out
rows the mean of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import sigmoid
from trl import KTOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference
from trl.trainer.utils import use_adapter

from llmpipe.data.kinds.labels import FILLER, GOOD
from llmpipe.training.heldout import Batch, HeldOut, Measure, Sum
from llmpipe.training.hosted import Durable
from llmpipe.training.preferences import Preferences, leave_out
from llmpipe.training.reference import Referenced
from llmpipe.training.training import Training


class Collator:
    """Judged responses to a batch of TRL's.

    `examples` says how many are real; where all are fillers one of them stays, since every process
    has to take part. A mismatched response is cut where `max_length` ends: it is only weighed.
    """

    def __init__(self, pad_token_id: int, max_length: int):
        self.collate = DataCollatorForUnpairedPreference(pad_token_id, max_length)

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        real = [row for row in rows if row["label"] != FILLER]
        used = real or rows[:1]
        batch = self.collate(used)
        for prefix in ("", "KL_"):
            for mask, row in zip(batch[f"{prefix}completion_mask"], used, strict=True):
                leave_out(mask, row["prompt_ids"], row[f"{prefix}completion_context"])
        batch["label"] = batch["label"] == GOOD
        return {**batch, "examples": len(real)}


class JudgedTrainer(Durable, Preferences, Referenced, KTOTrainer):
    """TRL's KTOTrainer, durable, whose reference is the parent."""

    step_divergence: Tensor
    """z of the step, float32 [1]."""
    held_out_divergence = 0.0
    """z of the held-out rows, in nats."""

    def __init__(self, training: Training[Any], measure: Measure, **arguments: Any):
        super().__init__(training, measure, **arguments)
        self.step_divergence = torch.zeros(1, device=self.args.device)
        self.divergences = HeldOut(self, divergence, self.hardware, self.world, self.stop_asked)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The micro-batches of a step, once it is known how far the policy is from the parent."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if self.calculate_KL and batches:
            self.step_divergence = self._mean_divergence(batches)
        return batches, items

    @torch.no_grad()
    def _mean_divergence(self, batches: list[Batch]) -> Tensor:
        """z over the rows of all processes; fillers weigh nothing."""
        total = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            with self.hardware.autocast():
                ratios = self.log_ratios(self._prepare_inputs(batch), "KL_")
            if batch["weight"]:
                total += torch.tensor([float(ratios.double().sum()), float(len(ratios))])
        value, count = self.world.sum(total)
        return (value / count).to(self.args.device, torch.float32)[None]

    def _compute_kl_logps(self, model: Any, batch: Batch) -> Tensor | None:
        """What TRL subtracts from one another: z is known already, so the reference gives 0.

        TRL asks for the reference's part, and for that alone, without a gradient.
        """
        if not self.calculate_KL:
            return None
        of_policy = torch.is_grad_enabled()
        return self.step_divergence if of_policy else torch.zeros_like(self.step_divergence)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Durable.evaluate`, once z of the held-out rows is known."""
        if self.calculate_KL:
            was_training = self.model.training
            self.model.eval()
            self.held_out_divergence = max(0.0, self.divergences.metrics()["eval_kl"])
            self.model.train(was_training)
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    def log_ratios(self, batch: Batch, prefix: str = "") -> Tensor:
        """log p / q of each response by policy and reference, in nats, float32 [rows].

        `prefix`: "KL_" for the mismatched responses.
        """
        policy = log_probs(self.model, batch, prefix)
        with torch.no_grad(), self._reference() as model:
            return policy - log_probs(model, batch, prefix)

    @contextmanager
    def _reference(self) -> Iterator[Any]:
        """The model that gives the reference's log-probabilities meanwhile."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        model = self.accelerator.unwrap_model(self.model)
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            yield self.model


def log_probs(model: Any, batch: Batch, prefix: str) -> Tensor:
    """Of whole responses, in nats, float32 [rows]."""
    ids = batch[f"{prefix}input_ids"]
    labels = ids.masked_fill(batch[f"{prefix}completion_mask"] == 0, -100)
    outputs = model(
        input_ids=ids,
        attention_mask=batch[f"{prefix}attention_mask"],
        labels=labels,
        fused_lm_head=True,
        use_cache=False,
    )
    return outputs.log_probs.sum(1)


def divergence(trainer: JudgedTrainer, batch: Batch) -> dict[str, Sum]:
    """The policy's mean log-ratio on mismatched responses, which estimates KL(policy || parent)."""
    ratios = trainer.log_ratios(batch, "KL_")
    return {"kl": (ratios.sum(), len(ratios))}


def judgement(trainer: JudgedTrainer, batch: Batch) -> dict[str, Sum]:
    """The objective on held-out rows, and which responses the policy has moved towards."""
    good = batch["label"].bool()
    bad = ~good
    ratios = trainer.log_ratios(batch)
    losses = losses_of(ratios, good, trainer)
    rewards = trainer.beta * ratios
    count = len(ratios)
    tokens = batch["completion_mask"][:, 1:].sum()
    return {
        "loss": (losses.sum(), count),
        "rewards/accuracies": (((rewards > 0) == good).sum(), count),
        "rewards/chosen": (rewards[good].sum(), int(good.sum())),
        "rewards/rejected": (rewards[bad].sum(), int(bad.sum())),
        "log_ratio_per_token": (ratios.sum(), tokens),
    }


def losses_of(ratios: Tensor, good: Tensor, trainer: JudgedTrainer) -> Tensor:
    """KTO's loss of each response (eq. 7), or its unpaired relative APO-zero (D'Oosterlinck 2024).

    `ratios`: float32 [rows]; `good`: bool [rows].
    """
    beta = trainer.beta
    if trainer.loss_type == "kto":
        z = trainer.held_out_divergence
        liked = 1 - sigmoid(beta * (ratios - z))
        disliked = 1 - sigmoid(beta * (z - ratios))
    else:
        liked = 1 - sigmoid(beta * ratios)
        disliked = sigmoid(beta * ratios)
    return torch.where(
        good, trainer.desirable_weight * liked, trainer.undesirable_weight * disliked
    )
