"""`llmpipe sft`: supervised fine-tuning. Learn to answer from examples, loss on the assistant's turns.

Inputs: a causal language model and rows (text, alpaca, sharegpt, messages or prompt-completion). Makes: a `model`.
The story is `train`, top to bottom; the trainer underneath is TRL's SFTTrainer on rows that llmpipe prepared.
"""

from __future__ import annotations

import shutil
from typing import Any, ClassVar, Literal

from llmpipe import rundir
from llmpipe.errors import INTEGRITY, UserError
from llmpipe.recipe import Training, owned
from llmpipe.stages import Job

ACCEPTS = ("model", "adapter")
MAKES = "model"  # or an adapter, with `adapter:`
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
    also = rundir.Artifact(job.artifact.run / f"{job.artifact.name}-merged")
    if (
        recipe.adapter
        and recipe.adapter.merge
        and also.finished
        and also.manifest()["identity"] != job.plan["identity"]
    ):
        raise UserError(f"{also.path}: is another adapter's", "move it away, or set `name:`", INTEGRITY)
    pinned = job.plan["asked"]["content"]
    folder = tokenize(recipe.data, job.model, job.prepared, seed=recipe.seed, say=job.say, pinned=pinned)
    return {"data": folder.name, **rundir.read_json(folder / "prepared.json")}


def train(job: Job, prepared: dict[str, Any]) -> dict[str, Any]:
    """Train, publish `model/` and return what the manifest says of it."""
    from llmpipe.data.prepare import facts
    from llmpipe.engine import upstream

    upstream.silence()
    from trl import SFTTrainer

    from llmpipe.engine import adapters, models, training, verify
    from llmpipe.engine.generate import answer_samples

    recipe, artifact, say = job.recipe, job.artifact, job.say
    rows = job.prepared / prepared["data"]
    hardware = models.hardware(recipe, say)
    tokenizer = models.load_tokenizer(rows / "tokenizer")
    stop, added, base = prepared["stop_tokens"], prepared["added_tokens"], job.bases.get("model")
    model = models.load(job.model, base, tokenizer, hardware, recipe, stop=stop, added=added, say=say)

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

    made: dict[str, Any] = {"final": final, "training": trainer.facts(), "hardware": hardware.describe()}
    if recipe.adapter is None:
        made["verified"] = verify.publish(trainer, tokenizer, artifact.model, say)
    else:
        base, start = base or job.model, job.plan["models"]["model"]
        reference = start.get("base", start)["reference"]
        held = recipe.quantization, hardware.frozen_dtype
        checked = adapters.publish(trainer, tokenizer, artifact.model, base, reference, *held, say)
        made |= {"kind": "adapter", "verified": checked}
        if recipe.adapter.merge and trainer.is_world_process_zero():
            name = f"{artifact.name}-merged"
            adapters.merge(base, artifact.model, artifact.run / name / "model")
            made["merged"] = [name]
    if trainer.is_world_process_zero():
        for name in ("rejected.jsonl", "seen.safetensors"):
            shutil.copyfile(rows / name, artifact.path / name)
    return facts(prepared) | made
