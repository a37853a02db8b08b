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
from llmpipe.parallel.parts import looking
from llmpipe.training.heldout import Batch, HeldOut, Measure, Sum
from llmpipe.training.hosted import Durable
from llmpipe.training.preferences import Preferences, leave_out, scored
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
        good = int(batch["label"].sum())
        return {**batch, "examples": len(real), "judged": (good, len(used) - good)}


class JudgedTrainer(Durable, Preferences, Referenced, KTOTrainer):
    """TRL's KTOTrainer, durable, whose reference is the parent.

    TRL parts good from bad rows by looking at the device; here it is not asked.
    """

    watched = ("entropy", "mean_logits")
    step_divergence: Tensor
    """z of the step, float32 [1]; 0 before the first one."""
    held_out_divergence = 0.0
    """z of the held-out rows, in nats."""

    def __init__(self, training: Training[Any], measure: Measure, **arguments: Any):
        super().__init__(training, measure, **arguments)
        if training.hardware.device == "cuda" or training.hardware.compiles:
            self._tell_targets(training.hardware.autocast)
        self.step_divergence = torch.zeros(1, device=self.args.device)
        self.divergences = HeldOut(self, divergence, self.hardware, self.world, self.stop_asked)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The micro-batches of a step, once it is known how far the policy is from the parent."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if self.calculate_KL and batches:
            self.step_divergence = self._mean_divergence(batches)
        judged = torch.tensor([batch["judged"] for batch in batches])
        for batch, (good, bad) in zip(batches, self.world.sum(judged).tolist(), strict=True):
            batch["judged"] = (good, bad)
        return batches, items

    @torch.no_grad()
    def _mean_divergence(self, batches: list[Batch]) -> Tensor:
        """z over the rows of all processes; fillers weigh nothing."""
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for batch in batches:
            with self.hardware.autocast(), looking(self.training.model):
                ratios = self.log_ratios(self._prepare_inputs(batch), "KL_").double()
            if batch["weight"]:
                total += torch.stack([ratios.sum(), torch.ones_like(ratios).sum()])
        value, count = self.accelerator.reduce(total, "sum")
        return (value / count).float()[None]

    def _compute_loss(self, model: Any, inputs: Batch, return_outputs: bool) -> Tensor:
        """The mean of a micro-batch, in place of TRL's."""
        good = inputs["label"].bool()
        z = torch.zeros(1, device=self.args.device)
        if self.calculate_KL:
            z = self.step_divergence.clamp(min=0)
        routing: dict[str, Any] = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = scored(model, inputs, **routing)
        policy = outputs.log_probs.sum(1)
        with torch.no_grad(), self._reference() as reference:
            parent = log_probs(reference, inputs, "")
        ratios = policy - parent
        loss = losses_of(ratios, good, self, z).mean()
        averages = self._metrics["train"]
        averages["kl"].append(z[0])
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            averages["aux_loss"].append(self.accelerator.reduce(outputs.aux_loss.detach(), "mean"))
        self._watch(outputs, ratios, inputs)
        return loss

    @torch.no_grad()
    def _watch(self, outputs: Any, ratios: Tensor, inputs: Batch) -> None:
        """Note what TRL notes of a micro-batch of all processes, by its names."""
        mask = inputs["completion_mask"][:, 1:]
        good = inputs["label"].bool()
        kinds = {"chosen": good, "rejected": ~good}
        sums = {"entropy": (outputs.entropy * mask).sum(), "tokens": mask.sum()}
        sums["num_tokens"] = inputs["attention_mask"].sum()
        for kind, rows in kinds.items():
            of_kind = mask * rows[:, None]
            sums[f"tokens/{kind}"] = of_kind.sum()
            sums[f"logits/{kind}"] = (outputs.mean_logits * of_kind).sum()
            sums[f"rewards/{kind}"] = self.beta * ratios.where(rows, 0).sum()
            sums[f"logps/{kind}"] = outputs.log_probs.sum(1).where(rows, 0).sum()
        together = torch.stack([value.double() for value in sums.values()])
        total = dict(zip(sums, self.accelerator.reduce(together, "sum"), strict=True))

        averages = self._metrics["train"]
        averages["entropy"].append(total["entropy"] / total["tokens"].clamp(min=1))
        self._total_train_tokens = self._total_train_tokens + total["num_tokens"]
        averages["num_tokens"] = [self._total_train_tokens]
        for kind, count in zip(kinds, inputs["judged"], strict=True):
            if count:
                tokens = total[f"tokens/{kind}"].clamp(min=1)
                averages[f"logits/{kind}"].append(total[f"logits/{kind}"] / tokens)
                averages[f"rewards/{kind}"].append(total[f"rewards/{kind}"] / count)
                averages[f"logps/{kind}"].append(total[f"logps/{kind}"] / count)
        if all(inputs["judged"]):
            margin = averages["rewards/chosen"][-1] - averages["rewards/rejected"][-1]
            averages["rewards/margins"].append(margin)

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
    of_tokens: Tensor = scored(model, batch, prefix).log_probs
    return of_tokens.sum(1)


def divergence(trainer: JudgedTrainer, batch: Batch) -> dict[str, Sum]:
    """The policy's mean log-ratio on mismatched responses, which estimates KL(policy || parent)."""
    ratios = trainer.log_ratios(batch, "KL_")
    return {"kl": (ratios.sum(), len(ratios))}


def judgement(trainer: JudgedTrainer, batch: Batch) -> dict[str, Sum]:
    """The objective on held-out rows, and which responses the policy has moved towards."""
    good = batch["label"].bool()
    bad = ~good
    ratios = trainer.log_ratios(batch)
    losses = losses_of(ratios, good, trainer, trainer.held_out_divergence)
    rewards = trainer.beta * ratios
    count = len(ratios)
    tokens = batch["completion_mask"][:, 1:].sum()
    return {
        "loss": (losses.sum(), count),
        "rewards/accuracies": (((rewards > 0) == good).sum(), count),
        "rewards/chosen": (rewards.where(good, 0).sum(), good.sum()),
        "rewards/rejected": (rewards.where(bad, 0).sum(), bad.sum()),
        "log_ratio_per_token": (ratios.sum(), tokens),
    }


def losses_of(ratios: Tensor, good: Tensor, trainer: JudgedTrainer, z: Tensor | float) -> Tensor:
    """KTO's loss of each response (eq. 7), or its unpaired relative APO-zero (D'Oosterlinck 2024).

    `ratios`: float32 [rows]; `good`: bool [rows]; `z`: in nats, of the objective `kto`.
    """
    beta = trainer.beta
    if trainer.loss_type == "kto":
        liked = 1 - sigmoid(beta * (ratios - z))
        disliked = 1 - sigmoid(beta * (z - ratios))
    else:
        liked = 1 - sigmoid(beta * ratios)
        disliked = sigmoid(beta * ratios)
    return torch.where(
        good, trainer.desirable_weight * liked, trainer.undesirable_weight * disliked
    )
