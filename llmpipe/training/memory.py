"""Whether a step fits in memory, seen before the first one: the longest rows are passed forward and
backward once, and what comes of it is thrown away.

Where they do not fit, a micro-batch is cut in halves and accumulation makes up the rest, so that an
optimizer step stays what it is. The last of these passes has the size that is trained with, and
compiled layers meet that shape first, in a resumed training as well.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from llmpipe import upstream
from llmpipe.models.rng import isolated_rng
from llmpipe.run.machine import smaller_micro_batches
from llmpipe.upstream.layers import compile_anew

if TYPE_CHECKING:
    from llmpipe.training.hosted import Durable

DEVICES = {"cuda"}
"""Whose memory is all that there is: a CPU's grows into swap, and nobody says when it is full."""


def fit_memory(trainer: Durable) -> None:
    """Cut the micro-batch of a trainer, where the recipe leaves it to us, until it fits; before the
    first step. Collective.

    A resumed training keeps the one that it began with. Raises torch's OutOfMemoryError where not
    even the smallest one fits.
    """
    if trainer.recipe.launch.micro_batch_size != "auto" or trainer.hardware.device not in DEVICES:
        return
    while problem := _try(trainer):
        size = trainer.hardware.micro_batch_size
        smaller = smaller_micro_batches(trainer.recipe, trainer.world.size, size)
        if trainer.resumes or not smaller:
            raise torch.OutOfMemoryError(problem)
        trainer.say(f"memory: micro-batches of {size} do not fit; trying {smaller[0]}")
        trainer.cut(smaller[0])
        compile_anew()


def _try(trainer: Durable) -> str | None:
    """Pass the longest rows; how memory was short in any of the processes, None where it was not.
    Nothing is waited for in between: another process may be at its end.
    """
    problem = None
    with _without_a_trace(trainer):
        try:
            _pass(trainer)
        except torch.OutOfMemoryError as error:
            problem = str(error)  # alone: its traceback holds what was computed
    problems = [each for each in trainer.world.gather(problem) if each]
    return problems[0] if problems else None


def _pass(trainer: Durable) -> None:
    batch = trainer.data_collator(trainer.longest_rows(trainer.hardware.micro_batch_size))
    for counted in ("tokens", "examples"):
        batch.pop(counted, None)
    items = trainer._get_num_items_in_batch([batch], trainer.args.device)
    inputs = trainer._prepare_inputs(batch)
    trainer.model.train()
    with trainer.hardware.autocast():
        loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=items)
    loss.backward()


@contextmanager
def _without_a_trace(trainer: Durable) -> Iterator[None]:
    """Leave generators, averages, gradients and memory as they were."""
    model: Any = trainer.model
    was_training, averages = model.training, copy.deepcopy(trainer._metrics)
    tokens = trainer._total_train_tokens
    try:
        with isolated_rng(), upstream.alone(trainer.accelerator):
            yield
    finally:
        trainer._metrics = averages
        trainer._total_train_tokens = tokens
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
