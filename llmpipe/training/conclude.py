"""The end of every stage that trains: publish, prove, and say what the manifest will hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from llmpipe.data.stream import Stream, counted
from llmpipe.models import publish, verify
from llmpipe.run.manifest import Made
from llmpipe.training.setup import Trained, Training


def conclude(trainer: Trained, training: Training, final: dict[str, Any]) -> Made:
    """Publish what was trained; what the manifest says of it, with its `final` metrics.

    Raises UserError (3) when what was saved is not what was trained; nothing is published then.
    """
    facts = trainer.facts()
    made = Made(final, training=facts, hardware=training.hardware.describe())
    if training.recipe.adapter is None:
        made.verified = verify.publish(trainer, training.tokenizer)
    else:
        _publish_adapter(trainer, training, made)

    made.facts = training.prepared.facts()
    if training.stream:
        blocks = facts["steps"] * training.recipe.batch_size
        count_streamed(made.facts["data"], training.stream, blocks, training.recipe.data.max_length)
    elif trainer.is_world_process_zero():
        _keep_what_was_seen(training)
    return made


def _publish_adapter(trainer: Trained, training: Training, made: Made) -> None:
    """Publish the adapter and, where the recipe says so, the merged model beside it."""
    job = training.job
    start = job.plan.models["model"]
    base = training.base or job.model
    reference = (start.base if start.is_adapter else start).reference
    made.kind = "adapter" if trainer.plain_model().can_generate() else None
    made.verified = publish.publish(trainer, training.tokenizer, base, reference)
    if training.recipe.adapter.merge and trainer.is_world_process_zero():
        name = f"{training.artifact.name}-merged"
        publish.merge(base, training.artifact.model, training.artifact.run / name / "model")
        made.merged = [name]


def count_streamed(data: dict[str, Any], stream: Stream, blocks: int, length: int) -> None:
    """Put into a manifest's `data` what was read of a stream: `blocks` of `length` tokens."""
    tokens = blocks * length
    data["rows"] = counted(stream.position(blocks)["rows"], data["rows"])
    data["tokens"] |= {"train": tokens, "train_supervised": tokens}
    data["sequences"]["train"] = blocks


def _keep_what_was_seen(training: Training) -> None:
    """Leave in the artifact which rows were rejected, and hashes of the questions seen."""
    folders = [training.folder]
    if training.prepared.mixture:
        folders.append(training.prepared.mixture.folder(training.job.prepared))
    home: Path = training.artifact.path
    rejected = b"".join((folder / "rejected.jsonl").read_bytes() for folder in folders)
    (home / "rejected.jsonl").write_bytes(rejected)
    asks = [load_file(folder / "seen.safetensors")["asks"] for folder in folders]
    save_file({"asks": np.unique(np.concatenate(asks))}, home / "seen.safetensors")
