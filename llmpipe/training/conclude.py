"""The end of every stage that trains: publish, prove, and say what the manifest will hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save_file

from llmpipe import upstream
from llmpipe.data.stream import Stream, counted
from llmpipe.errors import NUMERIC, UserError
from llmpipe.export.ask import ask
from llmpipe.faults import reading, remembering
from llmpipe.files.json import json_lines
from llmpipe.files.writing import to_write
from llmpipe.models.adapters import Base
from llmpipe.models.publish import (
    merge,
    publish_adapter,
    publish_adapter_on_parts,
    publish_model,
    publish_sharded,
)
from llmpipe.models.verify.saved import Verified
from llmpipe.parallel.parts import is_sharded
from llmpipe.parallel.world import World
from llmpipe.recipe import sections
from llmpipe.run.made import Made
from llmpipe.run.probe import Probe
from llmpipe.run.reference import Model
from llmpipe.sums import content
from llmpipe.training.training import Trained, Training

PUBLISHED_LATER = (
    "training is done and its last checkpoint kept: on a machine with more memory the same command "
    "only publishes"
)
"""What to do where the model that was trained could not be looked at once more."""


def conclude(
    trainer: Trained, training: Training[sections.Training], final: dict[str, Any]
) -> Made:
    """Publish what was trained; what the manifest says of it, with its `final` metrics.

    Raises UserError (3) when what was saved is not what was trained, and (4) when nothing was;
    nothing is published then.
    """
    _refuse_unmoved(trainer, training)
    writes, adapter = trainer.is_world_process_zero(), training.recipe.adapter
    facts = trainer.facts()
    result = Made(final, training=facts, hardware=training.hardware.describe())
    if adapter and trainer.plain_model().can_generate():
        result.kind = "adapter"  # one that scores stays a reward model
    world = World(trainer.accelerator)
    world.wait()
    with remembering(PUBLISHED_LATER):
        if writes or is_sharded(trainer.plain_model()):
            result.verified = _publish(trainer, training).record()
        if writes and not is_sharded(trainer.plain_model()):
            result.probe = _probe(trainer, training)
        world.wait()
        if writes and adapter and adapter.merge:
            result.merged = [_merge(training)]

    result.facts = training.prepared.facts()
    if training.stream:
        blocks = facts["steps"] * training.recipe.batch_size
        length = training.preparation.max_length
        count_streamed(result.facts["data"], training.stream, blocks, length)
    elif writes:
        _keep_what_was_seen(training)
    return result


def _refuse_unmoved(trainer: Trained, training: Training[sections.Training]) -> None:
    """Raise UserError (4), in every process, when not one weight is another than before."""
    moved = trainer.start.moved(trainer.plain_model())
    world = World(trainer.accelerator)
    if world.greatest(moved):  # of parts of a model, some may rest
        return
    steps, optim = trainer.facts()["steps"], training.recipe.optim
    start = training.recipe.model or "the weights that were drawn"
    lines = world.told(lambda: json_lines(training.artifact.path / "metrics.jsonl"))
    norms = [norm for line in lines if (norm := line.get("grad_norm")) is not None]
    if any(norms) or not norms:
        reason = (
            f"optim.learning_rate ({optim.learning_rate:g}) over {steps:,} steps is too small to "
            "change a weight in fp32"
        )
        hint = "raise it, or train for more steps"
    else:
        reason = f"the gradients were 0 in all of {steps:,} steps"
        hint = (
            "nothing to learn reaches the weights: look at the data, the objective or the rewards"
        )
    raise UserError(
        f"not one weight moved, and what would be published equals {start}: {reason}",
        f"{hint}; nothing was published, checkpoints are kept",
        NUMERIC,
    )


def _publish(trainer: Trained, training: Training[sections.Training]) -> Verified:
    """Save the model, or the adapter, as `model/`, and compare what was saved. Collective where the
    model is sharded.
    """
    model = trainer.plain_model()
    upstream.forget_debugging(model)
    trainer.forget_optimizer()
    tokenizer, folder, say = training.tokenizer, training.artifact.model, training.say
    adapter, spread = training.recipe.adapter, training.hardware.spread
    world = World(trainer.accelerator)
    if adapter is None and spread:
        return publish_sharded(model, tokenizer, folder, world, spread, say)
    if adapter is None:
        return publish_model(model, tokenizer, folder, say)
    trained_on = _true_base(training)
    base = Base(
        folder=training.job.weights,
        reference=trained_on.reference,
        revision=trained_on.identity.get("revision"),
        quantization=training.recipe.quantization,
        dtype=training.hardware.frozen_dtype(adapter),
    )
    if spread:
        verified = publish_adapter_on_parts(model, tokenizer, folder, base, world, say)
    else:
        verified = publish_adapter(model, tokenizer, folder, base, say)
    if lies_at := trained_on.seen_from(training.artifact.path):
        say(f"adapter: for PEFT its base is {lies_at}, seen from {training.artifact.path}")
    elif trained_on.kind == "gguf":
        say(f"adapter: for PEFT its base is {training.job.weights}")
    return verified


def _probe(trainer: Trained, training: Training[sections.Training]) -> Probe | None:
    """What the model that was trained says; None of one that gives scores."""
    model, recipe = trainer.plain_model(), training.recipe
    if not model.can_generate():
        return None
    kwargs = recipe.data.preparation.template_kwargs
    precision = f"{recipe.quantization.bits} bits" if recipe.quantization else ""
    probe = ask(model, training.tokenizer, kwargs, precision)
    if probe.unasked:
        training.say(f"probe: {probe.unasked}")
    return probe


def _true_base(training: Training[sections.Training]) -> Model:
    """The model whose weights stayed frozen: what was started from, or what is under it."""
    start = training.job.plan.models["model"]
    if start.is_adapter and start.base:
        return start.base
    return start


def _merge(training: Training[sections.Training]) -> str:
    """Publish the merged model beside the adapter; returns the name of its artifact."""
    name = f"{training.artifact.name}-merged"
    folder = training.artifact.run / name / "model"
    merge(training.job.weights, training.artifact.model, folder)
    return name


def count_streamed(data: dict[str, Any], stream: Stream, blocks: int, length: int) -> None:
    """Put into a manifest's `data` what was read of a stream: `blocks` of `length` tokens."""
    tokens = blocks * length
    data["rows"] = counted(stream.position(blocks).rows, data["rows"])
    data["tokens"] |= {"train": tokens, "train_supervised": tokens}
    data["sequences"]["train"] = blocks


def _keep_what_was_seen(training: Training[sections.Training]) -> None:
    """Leave in the artifact which rows were rejected, and hashes of the questions seen."""
    folders = [training.folder]
    if training.prepared.mixture:
        folders.append(training.prepared.mixture.folder(training.job.prepared))
    home: Path = training.artifact.path
    rejected = b"".join(content(folder, "rejected.jsonl") for folder in folders)
    with to_write(home / "rejected.jsonl", "wb") as file:
        file.write(rejected)
    asks = [_asks(content(folder, "seen.safetensors"), folder) for folder in folders]
    save_file({"asks": np.unique(np.concatenate(asks))}, home / "seen.safetensors")


def _asks(content: bytes, folder: Path) -> np.ndarray:
    with reading(folder / "seen.safetensors", "hashes of questions"):
        asks: np.ndarray = load(content)["asks"]
        return asks
