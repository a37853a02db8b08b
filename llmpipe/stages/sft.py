"""`llmpipe sft`: supervised fine-tuning. Learn to answer from examples, loss on the assistant's turns.

Inputs: a causal language model and rows (text, alpaca, sharegpt, messages or prompt-completion). Makes: a `model`.
The story is `train`, top to bottom; the trainer underneath is TRL's SFTTrainer on rows that llmpipe prepared.
"""

from __future__ import annotations

import shutil
from typing import Any, ClassVar, Literal

from llmpipe import rundir
from llmpipe.recipe import Training, owned
from llmpipe.stages import Job

ACCEPTS = ("model",)
MAKES = "model"
PROGRESS = "checkpoints/step-*"


class Schema(Training):
    stage: Literal["sft"] = "sft"
    """Supervised fine-tuning."""

    trainer_config: ClassVar[tuple[str, str, str]] = ("trl", "trainer.sft_config", "SFTConfig")
    trainer_owned: ClassVar[dict[str, str]] = owned("""
        activation_checkpointing=launch.activation_checkpointing max_length=data.max_length packing=data.packing
        packing_strategy=data.packing eval_packing=data.packing padding_free=data.packing
        truncation_mode=data.max_length chat_template_path=data.template assistant_only_loss=data.loss
        completion_only_loss=data.loss dataset_text_field=data.train.N.columns shuffle_dataset=data
        eos_token=data.template
    """)


def prepare(job: Job) -> dict[str, Any]:
    """Rows -> tokens. Returns what the trainer and the manifest need to know of them."""
    from llmpipe.data.prepare import prepare as tokenize

    recipe = job.recipe
    folder = tokenize(
        recipe.data, job.model, job.prepared, seed=recipe.seed, say=job.say, pinned=job.plan["asked"]["content"]
    )
    return {"data": folder.name, **rundir.read_json(folder / "prepared.json")}


def train(job: Job, prepared: dict[str, Any]) -> dict[str, Any]:
    """Train, publish `model/` and return what the manifest says of it."""
    from llmpipe.data.prepare import facts
    from llmpipe.engine import upstream

    upstream.silence()
    from trl import SFTTrainer

    from llmpipe.engine import models, training, verify
    from llmpipe.engine.generate import answer_samples

    recipe, artifact, say = job.recipe, job.artifact, job.say
    rows = job.prepared / prepared["data"]
    hardware = models.hardware(recipe, say)
    tokenizer = models.load_tokenizer(rows / "tokenizer")
    model = models.load(
        job.model, tokenizer, hardware, stop=prepared["stop_tokens"], packed=recipe.data.packing, say=say
    )

    arguments = training.sft_arguments(recipe, artifact, hardware)
    trainer = training.durable(SFTTrainer)(
        model=model,
        args=arguments,
        processing_class=tokenizer,
        train_dataset=training.dataset(rows / "train.arrow"),
        eval_dataset=training.dataset(rows / "eval.arrow") if prepared["rows"]["eval"] else None,
    )
    identity = f"{job.plan['identity']}:{prepared['content_digest']}"  # of the recipe, and of the very tokens
    trainer.attach(job.artifact, recipe, identity, hardware, job.signals, say, inexact=job.inexact)

    kwargs = recipe.data.chat_template_kwargs
    answer_samples(trainer, tokenizer, recipe.samples, artifact.path / "samples.jsonl", "before", kwargs)
    final = trainer.fit()
    answer_samples(trainer, tokenizer, recipe.samples, artifact.path / "samples.jsonl", "after", kwargs)

    verified = verify.publish(trainer, tokenizer, artifact.model, say)
    if trainer.is_world_process_zero():
        for name in ("rejected.jsonl", "seen.safetensors"):
            shutil.copyfile(rows / name, artifact.path / name)
    made = {"final": final, "verified": verified, "training": trainer.facts(), "hardware": hardware.describe()}
    return facts(prepared) | made
