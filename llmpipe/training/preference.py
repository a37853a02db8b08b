"""`reward` and `dpo` once there are pairs and a model: TRL's trainers on pairs that llmpipe prepared.

A pair weighs the same in every step, however the step is cut into micro-batches and processes: TRL takes the mean of a
micro-batch, and `_Pairs` weighs those means by the pairs in them. No pair is cut or dropped here.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerBase as Tokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import pad

from llmpipe.data.kinds.pairs import PAIRS
from llmpipe.data.prepared import PreparedRows
from llmpipe.errors import INTEGRITY, UserError
from llmpipe.evaluation.statistics import RESAMPLES, interval, wilson
from llmpipe.files import digest
from llmpipe.models.adapters import tensors_hash, upcast_trained
from llmpipe.models.hardware import Hardware
from llmpipe.models.load import load_copy, load_policy, load_ranker, set_up
from llmpipe.run.manifest import Made
from llmpipe.training import hosted, supervised
from llmpipe.training.arguments import arguments
from llmpipe.training.setup import Training

BUCKETS = 4  # of calibration
COLLAPSED = (
    1.5  # times the reference's log-probability of chosen answers: below that something is wrong
)


class _Collator:
    """Pairs to a batch: chosen answers in the first half of its rows, rejected ones in the second.

    `pairs` says how many are real; where all are fillers (`hosted.with_fillers`) one of them stays, since every
    process has to take part.
    """

    def __init__(self, pad_token_id: int, whole: bool):
        """`whole`: a reward model's batch, which does not tell prompts from answers but has margins."""
        self.whole, self.pad = whole, pad_token_id
        self.policy = DataCollatorForPreference(pad_token_id)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        real = [example for example in examples if example["margin"] == example["margin"]]
        used = real or examples[:1]
        if not self.whole:
            return self.policy(used) | {"pairs": len(real)}
        rows = [
            torch.tensor(e["prompt_ids"] + e[side])
            for side in ("chosen_ids", "rejected_ids")
            for e in used
        ]
        margin = torch.tensor([example["margin"] if real else 0.0 for example in used])
        return {
            "input_ids": pad(rows, padding_value=self.pad, padding_side="right"),
            "attention_mask": pad(
                [torch.ones_like(row) for row in rows], padding_value=0, padding_side="right"
            ),
            "margin": margin,
            "pairs": len(real),
        }


class _Pairs:
    """Mixed in before one of TRL's trainers of pairs."""

    _even = True  # whether every process has as many pairs in this step

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # they are prepared

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "chosen_ids", "rejected_ids", "margin"]
        self._signature_columns += ["ref_chosen_logps", "ref_rejected_logps"]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """The batches of a step, each with what its mean counts in the step's."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        total, world = (
            torch.tensor(sum(batch["pairs"] for batch in batches), device=self.args.device),
            self.args.world_size,
        )
        if world > 1:
            torch.distributed.all_reduce(total)
        self._even = int(total) == len(batches) * world * self.args.per_device_train_batch_size
        for batch in batches:
            batch["weight"] = batch.pop("pairs") * len(batches) * world / max(int(total), 1)
        return batches, items

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        weight, gather = inputs.pop("weight", 1.0), self.accelerator.gather
        if not self._even:  # TRL gathers a metric per pair, and processes with other numbers of pairs would not meet
            self.accelerator.gather = lambda found: gather(found) if found.ndim == 0 else found
        try:
            return super().compute_loss(model, inputs, *args, **kwargs) * weight
        finally:
            self.accelerator.gather = gather


class _Reward(_Pairs, RewardTrainer):
    pass


class _Policy(_Pairs, DPOTrainer):
    def _precompute_ref_logps(self, dataset: Any, *args: Any) -> Any:
        parent_as_reference(self.model)
        how = [
            dataset._fingerprint,
            self.args.bf16,
            str(self.args.device),
            torch.get_num_threads(),
            torch.__version__,
        ]
        how += [
            self.args.per_device_train_batch_size,
            self.args.world_size,
            self.model.config._attn_implementation,
        ]
        dataset._fingerprint = digest(how)[
            :32
        ]  # TRL's cache knows nothing of how the numbers are computed
        return super()._precompute_ref_logps(dataset, *args)


def _halves(trainer: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of a reward model on the chosen and on the rejected answers, float32 [pairs] each."""
    out = trainer.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    )
    return out.logits.float().squeeze(-1).chunk(2)


def ranking(trainer: Any, batch: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Bradley-Terry loss in nats per pair (Christiano 2017, eq. 1), share ranked right, margin."""
    chosen, rejected = _halves(trainer, batch)
    apart, count = chosen - rejected, len(chosen)
    loss = (
        -logsigmoid(apart - batch["margin"])
        + trainer.args.center_rewards_coefficient * (chosen + rejected) ** 2
    )
    right = (apart > 0).double() + 0.5 * (apart == 0)
    return {
        "loss": (loss.sum(), count),
        "accuracy": (right.sum(), count),
        "margin": (apart.sum(), count),
    }


def reward(job: Any, prepared: PreparedRows) -> Made:
    """Train a reward model and publish it; returns what the manifest says of it."""
    recipe, say = job.recipe, job.say
    setup = set_up(job, prepared)
    hardware, tokenizer = setup.hardware, setup.tokenizer
    model = load_ranker(setup)
    own = {"max_length": None, "center_rewards_coefficient": recipe.center}
    trainer = _trainer(_Reward, RewardConfig, job, prepared, hardware, tokenizer, model, own)

    def also(final: dict[str, Any]) -> dict[str, Any]:
        held_out = trainer.eval_dataset or trainer.train_dataset.select(
            range(prepared.rows.train)
        )  # no fillers
        about = describe(score(trainer, held_out), recipe.seed) | {
            "held_out": trainer.eval_dataset is not None
        }
        low, high = about["accuracy_interval"]
        say(f"ranked right: {about['accuracy']:.3f} [{low:.3f}, {high:.3f}] of {about['n']:,} pairs "
            f"{'held out' if about['held_out'] else 'trained on: there are none held out'}; "
            f"rewards {about['reward_mean']:.3f} +- {about['reward_std']:.3f}")  # fmt: skip
        return {"ranking": about}

    return supervised.finish(trainer, job, prepared, PAIRS, hardware, tokenizer, ranking, also)


@torch.no_grad()
def score(trainer: Any, rows: Any, most: int = 1000) -> np.ndarray:
    """Scores of `most` pairs, evenly spread over the rows, or of all: float64 (pairs, 2): chosen, rejected. Every
    process computes them all."""
    size, found = trainer.args.per_device_eval_batch_size, []
    taken = np.linspace(0, len(rows) - 1, min(len(rows), most)).round().astype(int).tolist()
    trainer.model.eval()
    for start in range(0, len(taken), size):
        batch = trainer._prepare_inputs(
            trainer.data_collator([rows[i] for i in taken[start : start + size]])
        )
        with torch.autocast(
            trainer.args.device.type, torch.bfloat16, enabled=trainer.hardware.bf16
        ):
            found.append(torch.stack(_halves(trainer, batch), 1).double().cpu().numpy())
    return np.concatenate(found)


def describe(scores: np.ndarray, seed: int) -> dict[str, Any]:
    """What pairs of scores say of a reward model: how often the chosen answer is ahead, by how much, whether a larger
    margin is right more often, and the mean and deviation that scores in PPO can be compared with."""
    apart = scores[:, 0] - scores[:, 1]
    right = (apart > 0) + 0.5 * (apart == 0)
    draws = np.random.default_rng(seed).choice(apart, (RESAMPLES, len(apart))).mean(1)
    order = np.argsort(np.abs(apart))
    buckets = [part for part in np.array_split(order, BUCKETS) if len(part)]
    return {
        "n": len(apart),
        "accuracy": float(right.mean()),
        "accuracy_interval": wilson(float(right.sum()), len(apart)),
        "margin": float(apart.mean()),
        "margin_interval": interval(draws),
        "calibration": [
            {
                "margin_up_to": float(np.abs(apart[part]).max()),
                "accuracy": float(right[part].mean()),
                "n": len(part),
            }
            for part in buckets
        ],
        "reward_mean": float(scores.mean()),
        "reward_std": float(scores.std()),
    }


def improvement(trainer: Any, batch: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The objective on held-out pairs, and how far the policy is from the reference: Rafailov 2023, section 4."""
    inputs = {name: value for name, value in batch.items() if name not in ("pairs", "margin")}
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    known = {
        name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")
    }
    out = trainer.model(**known, labels=labels, fused_lm_head=True, use_cache=False)
    chosen, rejected = out.log_probs.sum(1).chunk(2)
    if "ref_chosen_logps" not in inputs:
        model = trainer.ref_model or trainer.model
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = trainer.compute_ref_log_probs(
            model, inputs
        )
    better, worse = chosen - inputs["ref_chosen_logps"], rejected - inputs["ref_rejected_logps"]
    kept = trainer.precompute_ref_logps, trainer.accelerator.gather
    trainer.precompute_ref_logps, trainer.accelerator.gather = (
        True,
        lambda found: found,
    )  # ranks differ in their pairs
    loss = trainer._compute_loss(
        lambda **_: out, inputs, False
    )  # TRL's formula on what is computed already
    trainer.precompute_ref_logps, trainer.accelerator.gather = kept
    trainer._metrics["eval"].clear()
    margin, count = trainer.beta * (better - worse), len(better)
    right = (margin > 0).double() + 0.5 * (margin == 0)
    tokens = inputs["completion_mask"][:, 1:].sum(1).chunk(2)
    return {
        "loss": (loss * count, count),
        "rewards/accuracies": (right.sum(), count),
        "rewards/margins": (margin.sum(), count),
        "logps/chosen": (chosen.sum(), count),
        "logps/rejected": (rejected.sum(), count),
        "rewards/chosen": (trainer.beta * better.sum(), count),
        # of the tokens of the rows, not of the policy's own: how far its distribution has moved there
        "log_ratio_per_token": ((better + worse).sum(), tokens[0].sum() + tokens[1].sum()),
    }


def dpo(job: Any, prepared: PreparedRows) -> Made:
    """Train a policy on preferences against its parent, and publish it; returns what the manifest says of it."""
    recipe, say = job.recipe, job.say
    setup = set_up(job, prepared)
    hardware, tokenizer, base = setup.hardware, setup.tokenizer, setup.base
    _refuse_micro_batches(recipe, hardware)
    model = load_policy(setup)
    weights = recipe.weights
    own = {
        "max_length": None,
        "beta": recipe.beta,
        "loss_type": list(weights),
        "loss_weights": list(weights.values()),
        "label_smoothing": recipe.label_smoothing,
        "precompute_ref_log_probs": recipe.precompute,
    }
    reference = None
    if recipe.adapter is None and not recipe.precompute:
        reference = load_copy(setup)
        reference.requires_grad_(False)
    trainer = _trainer(
        _Policy, DPOConfig, job, prepared, hardware, tokenizer, model, own, ref_model=reference
    )
    if recipe.adapter and not base:
        trainer.model.delete_adapter(
            "ref"
        )  # of an adapter that begins at nothing: without it is the same, and faster
    else:
        parent_as_reference(trainer.model)
    which = (
        "the parent's adapter"
        if base
        else "the parent, the adapter off"
        if recipe.adapter
        else "a copy of the parent"
    )
    say(
        f"reference: {'its log-probabilities, computed beforehand' if recipe.precompute else which}"
    )
    before = frozen_state(trainer)

    def also(final: dict[str, Any]) -> dict[str, Any]:
        if frozen_state(trainer) != before:
            raise UserError(
                "the reference changed in training",
                "please report it; nothing was published",
                INTEGRITY,
            )
        if "ref" in getattr(trainer.model, "peft_config", {}):
            trainer.model.delete_adapter("ref")
        lines = [
            json.loads(x) for x in (job.artifact.path / "metrics.jsonl").read_text().splitlines()
        ]
        if fell := collapse(lines, recipe.beta):
            say(f"warning: the log-probability of chosen answers fell from {fell[0]:.1f} to {fell[1]:.1f}: the policy "
                "leaves what it was taught; raise beta, or lower optim.learning_rate")  # fmt: skip
        return {"reference": before} if before else {}

    return supervised.finish(
        trainer, job, prepared, PAIRS, hardware, tokenizer, improvement, also, base
    )


def collapse(lines: list[dict], beta: float) -> tuple[float, float] | None:
    """The reference's and the policy's log-probability of chosen answers, if that fell too far; of held-out pairs where
    there are any."""
    for kind in ("eval_", ""):
        if found := [line for line in lines if f"{kind}rewards/chosen" in line]:
            now = found[-1][f"{kind}logps/chosen"]
            held = now - found[-1][f"{kind}rewards/chosen"] / beta
            return (held, now) if now < COLLAPSED * held else None
    return None


def parent_as_reference(model: Any) -> None:
    """Make the adapter `ref` the very copy of `default`: TRL's leaves out trained rows of the embeddings."""
    named = dict(model.named_parameters())
    for name, tensor in named.items():
        if ".ref" in name:
            tensor.data = named[name.replace(".ref", ".default")].data.clone()
    upcast_trained(model)


def _refuse_micro_batches(recipe: Any, hardware: Hardware) -> None:
    """Some of TRL's objectives are no sum over pairs: what they mean depends on how a step is cut."""
    uneven = recipe.whole_steps
    if uneven and hardware.accumulation * hardware.processes > 1:
        raise UserError(
            f"objective: {uneven[0]} depends on how a step is cut into micro-batches",
            f"set launch.micro_batch_size to optim.batch_size ({recipe.batch_size}), with one process",
        )


def frozen_state(trainer: Any) -> str | None:
    """A hash of what the reference's log-probabilities come from, or nothing where they are computed beforehand."""
    if trainer.precompute_ref_logps:
        return None
    if trainer.ref_model is not None:
        return tensors_hash(trainer.accelerator.unwrap_model(trainer.ref_model).state_dict())
    model = trainer.accelerator.unwrap_model(trainer.model)
    fixed = {name: tensor for name, tensor in model.state_dict().items() if ".default" not in name}
    return tensors_hash(fixed)


def _trainer(
    kind: type, config: type, job: Any, prepared: PreparedRows, hardware: Hardware, tokenizer: Tokenizer, model: Any,
    own: dict[str, Any], **more: Any,
) -> Any:  # fmt: skip
    adapter = job.recipe.adapter
    training = Training(job, prepared, hardware, tokenizer, model)
    configuration = arguments(config, training, **own, disable_dropout=True)
    try:
        trainer = hosted.durable(kind)(
            model=model,
            args=configuration,
            processing_class=tokenizer,
            data_collator=_Collator(tokenizer.pad_token_id, whole=kind is _Reward),
            train_dataset=training.train_rows(),
            eval_dataset=training.eval_rows(),
            **more,
        )
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{job.recipe.stage}: TRL refuses: {str(error).splitlines()[0]}") from error
    for name, module in trainer.model.named_modules():
        if name.endswith("lora_dropout.default") and adapter.dropout:
            module.p = (
                adapter.dropout
            )  # of the policy's own adapter alone: a reference is no random function
    return trainer
