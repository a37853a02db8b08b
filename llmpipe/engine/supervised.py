"""What `sft`, its narrower stages and `pretrain` do once there are tokens and a model: train, publish, prove."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer
from trl import SFTTrainer

from llmpipe import launch
from llmpipe.data.prepare import facts
from llmpipe.data.stream import Stream, counted
from llmpipe.engine import adapters, models, training, verify
from llmpipe.engine.generate import answer_samples


def train(
    job: Any,
    prepared: dict[str, Any],
    hardware: models.Hardware,
    tokenizer: Tokenizer,
    model: Any,
    base: Path | None = None,
) -> dict[str, Any]:
    """Train `model` on the prepared rows through TRL's SFTTrainer and publish it, or its adapter; returns what the
    manifest says of it. `job`: the stage's; `base`: the folder of the model under an adapter that is trained on."""
    recipe, artifact, say = job.recipe, job.artifact, job.say
    rows, stream = job.prepared / prepared["data"], None
    if recipe.data.stream:
        processes = 1 if hardware.device == "cpu" else max(1, (os.cpu_count() or 1) // hardware.processes - 1)
        pinned, length = job.plan["asked"]["content"], recipe.steps * recipe.batch_size
        stream = Stream(recipe.data, rows, length, recipe.batch_size, seed=recipe.seed, pinned=pinned,
                        processes=processes)  # fmt: skip
        stream.rejected = artifact.path / "rejected.jsonl" if launch.rank() == 0 else None
    trainer = training.durable(SFTTrainer)(
        model=model,
        args=training.sft_arguments(recipe, artifact, hardware),
        processing_class=tokenizer,
        train_dataset=training.stand_in(recipe.data) if stream else training.dataset(rows / "train.arrow"),
        eval_dataset=training.dataset(rows / "eval.arrow") if prepared["rows"]["eval"] else None,
    )
    identity = f"{job.plan['identity']}:{prepared['content_digest']}"  # of the recipe, and of the very tokens
    trainer.attach(job.artifact, recipe, identity, hardware, job.signals, say, inexact=job.inexact, stream=stream)

    answer_samples(trainer, tokenizer, "before")
    final = trainer.fit()
    tokens = prepared["tokens"]
    if recipe.data.blocks and tokens["eval_bytes"]:
        final["bits_per_byte"] = final["eval_loss"] / math.log(2) * tokens["eval"] / tokens["eval_bytes"]
        say(f"held-out: {final['bits_per_byte']:.4f} bits per byte")
    answer_samples(trainer, tokenizer, "after")

    made: dict[str, Any] = {"final": final, "training": trainer.facts(), "hardware": hardware.describe()}
    if recipe.adapter is None:
        made["verified"] = verify.publish(trainer, tokenizer)
    else:
        base, start = base or job.model, job.plan["models"]["model"]
        reference = (start["base"] if job.bases else start)["reference"]
        made |= {"kind": "adapter", "verified": adapters.publish(trainer, tokenizer, base, reference)}
        if recipe.adapter.merge and trainer.is_world_process_zero():
            name = f"{artifact.name}-merged"
            adapters.merge(base, artifact.model, artifact.run / name / "model")
            made["merged"] = [name]
    about = facts(prepared)
    if stream:
        tokens, read = len(stream) * recipe.data.max_length, stream.position(len(stream))["rows"]
        about["data"]["rows"] = counted(read, about["data"]["rows"])
        about["data"]["tokens"] |= {"train": tokens, "train_supervised": tokens}
        about["data"]["sequences"]["train"] = len(stream)
    elif trainer.is_world_process_zero():
        for name in ("rejected.jsonl", "seen.safetensors"):
            shutil.copyfile(rows / name, artifact.path / name)
    return about | made
