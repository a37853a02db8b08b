"""A policy that learns from pairs against its parent: TRL's DPOTrainer, and what is said of it."""

from __future__ import annotations

from typing import Any, NamedTuple

from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from llmpipe import upstream
from llmpipe.training.heldout import Batch, Measure, Sum
from llmpipe.training.hosted import Durable
from llmpipe.training.preferences import Pair, Preferences, leave_out, real_pairs, scored
from llmpipe.training.reference import Referenced, fingerprint
from llmpipe.training.training import Training
from llmpipe.upstream.later import with_later_logits

# times the reference's log-probability of chosen responses: below that something is wrong
COLLAPSED = 1.5


class Collator:
    """Pairs to a batch of TRL's. `examples` says how many are real, see `ranking.Collator`."""

    def __init__(self, pad_token_id: int):
        self.collate = DataCollatorForPreference(pad_token_id)

    def __call__(self, pairs: list[Pair]) -> Batch:
        real = real_pairs(pairs)
        used = real or pairs[:1]
        batch = self.collate(used)
        answers = [(pair, side) for side in ("chosen", "rejected") for pair in used]
        for mask, (pair, side) in zip(batch["completion_mask"], answers, strict=True):
            leave_out(mask, pair["prompt_ids"], pair[f"{side}_context"])
        return {**batch, "examples": len(real)}


class PolicyTrainer(Durable, Preferences, Referenced, DPOTrainer):
    """TRL's DPOTrainer, durable, whose reference is the parent."""

    watched = ("entropy", "mean_logits", "is_top1")

    def __init__(self, training: Training[Any], measure: Measure, **arguments: Any):
        with upstream.hashing_models(lambda model: fingerprint(model.state_dict())):
            super().__init__(training, measure, **arguments)
        if training.hardware.device == "cuda" or training.hardware.compiles:
            self._tell_targets(training.hardware.autocast)

    def _compute_loss(self, model: Any, *args: Any) -> Any:
        return super()._compute_loss(with_later_logits(model), *args)


def improvement(trainer: Any, batch: Batch) -> dict[str, Sum]:
    """The objective on held-out pairs, and how far the policy is from the reference: Rafailov 2023,
    section 4.
    """
    inputs = {name: value for name, value in batch.items() if name not in ("examples", "margin")}
    outputs = scored(trainer.model, inputs)
    chosen, rejected = outputs.log_probs.sum(1).chunk(2)
    if "ref_chosen_logps" not in inputs:
        model = trainer.ref_model or trainer.model
        reference = trainer.compute_ref_log_probs(model, inputs)
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = reference
    loss = upstream.preference_loss(DPOTrainer, trainer, lambda **_: outputs, inputs)

    chosen_ratio = chosen - inputs["ref_chosen_logps"]
    rejected_ratio = rejected - inputs["ref_rejected_logps"]
    margin = trainer.beta * (chosen_ratio - rejected_ratio)
    right = (margin > 0).double() + 0.5 * (margin == 0)
    count = len(chosen)
    chosen_tokens, rejected_tokens = inputs["completion_mask"][:, 1:].sum(1).chunk(2)
    return {
        "loss": (loss * count, count),
        "rewards/accuracies": (right.sum(), count),
        "rewards/margins": (margin.sum(), count),
        "logps/chosen": (chosen.sum(), count),
        "logps/rejected": (rejected.sum(), count),
        "rewards/chosen": (trainer.beta * chosen_ratio.sum(), count),
        # of the tokens of the rows, not of the policy's own: how far it has moved there
        "log_ratio_per_token": (
            (chosen_ratio + rejected_ratio).sum(),
            chosen_tokens.sum() + rejected_tokens.sum(),
        ),
    }


class Collapse(NamedTuple):
    """Log-probabilities of chosen responses, by the reference and by the policy."""

    reference: float
    policy: float


def collapse(lines: list[dict[str, Any]], beta: float) -> Collapse | None:
    """How far the log-probability of chosen responses fell, if it fell too far; of held-out pairs
    where there are any. `lines`: of metrics.jsonl.
    """
    for prefix in ("eval_", ""):
        rewarded = [line for line in lines if f"{prefix}rewards/chosen" in line]
        if rewarded:
            last = rewarded[-1]
            policy = last[f"{prefix}logps/chosen"]
            reference = policy - last[f"{prefix}rewards/chosen"] / beta
            return Collapse(reference, policy) if policy < COLLAPSED * reference else None
    return None
