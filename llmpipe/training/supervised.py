"""What a stage that trains through TRL does once there are tokens and a model: train, publish, prove. `train` is that
of `sft`, its narrower stages and `pretrain`; `reward` and `dpo` share `finish`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer
from trl import SFTConfig, SFTTrainer

from llmpipe.data.kinds import Kind
from llmpipe.data.prepared import PreparedRows
from llmpipe.data.stream import Stream
from llmpipe.errors import UserError
from llmpipe.models.hardware import Hardware
from llmpipe.run.manifest import Made
from llmpipe.training import hosted
from llmpipe.training.arguments import arguments
from llmpipe.training.conclude import conclude
from llmpipe.training.crosstalk import crosstalk
from llmpipe.training.rows import stand_in, streamed
from llmpipe.training.samples import answer_samples
from llmpipe.training.setup import Training

Measure = Callable[[Any, dict], dict[str, tuple[Any, Any]]]  # see `_Durable.attach`


def nats(trainer: Any, batch: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Held-out loss in nats per supervised token."""
    out = trainer.model(
        **batch, use_cache=False, fused_lm_head=True
    )  # TRL's head; no collective in it
    return {"loss": (-out.log_probs.double().sum(), out.label_mask.sum())}


def train(
    job: Any, prepared: PreparedRows, kind: Kind, hardware: Hardware, tokenizer: Tokenizer, model: Any,
    base: Path | None = None,
) -> Made:  # fmt: skip
    """Train `model` on the prepared rows through TRL's SFTTrainer and publish it, or its adapter; returns what the
    manifest says of it. `job`: the stage's; `base`: the folder of the model under an adapter that is trained on."""
    recipe, data = job.recipe, job.recipe.data
    stream = streamed(job, prepared, hardware) if data.preparation.stream else None
    training = Training(job, prepared, hardware, tokenizer, model, stream)
    own = {
        "max_length": data.max_length if data.packing else None,  # rows are cut already
        "packing": data.packing,
        # unpacked rows are laid end to end too, instead of padded, where attention can keep them apart for free
        "padding_free": data.packing or hardware.device == "cpu" or hardware.attention != "sdpa",
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    trainer = hosted.durable(SFTTrainer)(
        model=model,
        args=arguments(SFTConfig, training, **own),
        processing_class=tokenizer,
        train_dataset=stand_in(data.packing) if stream else training.train_rows(),
        eval_dataset=training.eval_rows(),
    )
    noise = (
        0.15 if hardware.bf16 or recipe.quantization else 1e-3
    )  # in bf16 SmolLM2 shows 0.04, OPT 0.29
    if own["padding_free"] and not crosstalk(trainer, tokenizer, hardware) <= noise:
        problem = f"{model.config.model_type} does not keep documents of one row apart"
        if data.packing:
            raise UserError(
                f"data: {problem}",
                f"set data.{kind.packing_field}: false",
            )
        job.say(f"data: rows are padded: {problem}")
        trainer.data_collator.padding_free = False

    def also(final: dict[str, Any]) -> dict[str, Any]:
        tokens = prepared.tokens
        if not kind.end_to_end or not tokens.eval_bytes:
            return {}
        bits = final["eval_loss"] / math.log(2) * tokens.eval / tokens.eval_bytes
        job.say(f"held-out: {bits:.4f} bits per byte")
        return {"bits_per_byte": bits}

    return finish(trainer, job, prepared, kind, hardware, tokenizer, nats, also, base, stream)


def finish(
    trainer: Any, job: Any, prepared: PreparedRows, kind: Kind, hardware: Hardware, tokenizer: Tokenizer,
    measure: Measure, also: Callable[[dict], dict], base: Path | None = None, stream: Stream | None = None,
) -> Made:  # fmt: skip
    """Fit, answer the recipe's prompts before and after, publish; what the manifest says. `also`: more of the final
    metrics, from the trained model that is still in memory."""
    recipe, artifact, say = job.recipe, job.artifact, job.say
    identity = (
        f"{job.plan.identity}:{prepared.content_digest}"  # of the recipe, and of the very tokens
    )
    trainer.attach(artifact, recipe, identity, hardware, job.signals, say, kind=kind, measure=measure,
                   inexact=job.inexact, stream=stream)  # fmt: skip
    generates = trainer.plain_model().can_generate()
    if generates:
        answer_samples(trainer, tokenizer, "before")
    final = trainer.fit()
    final |= also(final)
    if generates:
        answer_samples(trainer, tokenizer, "after")

    return conclude(trainer, Training(job, prepared, hardware, tokenizer, None, stream), final)
